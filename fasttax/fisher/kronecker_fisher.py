"""KroneckerFisher: DiagonalFisher's passes, with factors in place of linear layers' squares."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from fasttax._base import checks, files
from fasttax.fisher.diagonal import DiagonalFisher
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.factored import FactoredSums
from fasttax.fisher.kronecker import KroneckerEstimate
from fasttax.fisher.sums import Slot
from fasttax.fisher.view import NoClosedForm

MAX_DIM = 8192  # rows of a factor, 256 MB, where max_dim is None


class KroneckerFisher(DiagonalFisher):
    """Accumulates a model's Fisher batch by batch, a Kronecker product for each linear layer.

    What `KroneckerEstimate` holds. The head's G is the closed form over all labels wherever its
    outputs are the logits entry by entry (softcap and scale are fine), also with labels="sample".
    A weight that embedding and head share keeps its diagonal, of the labels that were asked for.

    Args:
        model: as of DiagonalFisher.
        max_dim: rows of a factor, above which it is cut into the fewest equal blocks on its
            diagonal, or to the diagonal itself; None is 8192 (256 MB). Factors take in^2 + out^2
            floats a layer.
        options: those of DiagonalFisher, but for unit="batch", fallback= and observe().

    Raises:
        ValueError, TypeError: as DiagonalFisher; no linear layer's weight is among the parameters.
    """

    def __init__(self, model: nn.Module, *, max_dim: int | None = None, **options: Any) -> None:
        op = "estimate_fisher"
        self.max_dim = MAX_DIM
        if max_dim is not None:
            self.max_dim = checks.count(op, "max_dim", max_dim)
        for option, value, fits in (
            ("unit", "batch", "'example' or 'token'"),
            ("fallback", "loop", "None"),
        ):
            if options.get(option) == value:
                expected, way_out = f"{fits} with structure='kron'", "use structure='diagonal'"
                raise checks.fail(op, option, expected, repr(value), way_out)
        self._asked = options.get("labels", "sample")
        self.head_is_closed = self._asked in ("sample", "exact_head")
        if self.head_is_closed:
            options["labels"] = "exact_head"
        super().__init__(model, **options)

    def _sums_of(self, slots: Mapping[str, Slot]) -> FactoredSums:
        return FactoredSums(slots, self.tied, 1 / self.mc_samples, self.max_dim)

    def _settle(self) -> None:
        self._factored.settle()
        head = self.view.output_embedding()
        tied = head is not None and head.names.get("weight") not in self._factored.factors
        if tied and self._asked == "sample":
            self._sample_the_head()

    def _sample_the_head(self) -> None:
        """Labels as drawn, of a head that has no factors, or none over all labels at once."""
        self.head_is_closed = False
        self.labels = "sample"
        self.view = dataclasses.replace(self.view, labels="sample")

    @property
    def _factored(self) -> FactoredSums:
        assert isinstance(self.sums, FactoredSums)
        return self.sums

    def update(self, batch: Mapping[str, Any] | Tensor | tuple[Tensor, Tensor]) -> None:
        """As of DiagonalFisher."""
        if self._asked != "sample" or not self.head_is_closed:
            super().update(batch)
            return
        try:
            super().update(batch)
        except NoClosedForm:
            self._sample_the_head()
            super().update(batch)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """As of DiagonalFisher; a head that was sampled there goes on being sampled."""
        with files.opened(path, "DiagonalFisher") as (_, metadata):
            sampled = metadata.get("head") == "labels"
        if sampled and self._asked == "sample":
            self._sample_the_head()
        super().resume(path)

    def observe(self, **options: Any) -> NoReturn:
        """There is none: the first batch's proof is of squares.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "KroneckerFisher: observe: expected update(batch), the user's own passes have no "
            "Kronecker estimate; use DiagonalFisher"
        )

    def _facts(self) -> dict[str, Any]:
        facts = super()._facts()
        return {
            **facts,
            "estimator": "kronecker_fisher",
            "structure": "kron",
            "labels": self._asked,
            "head": "closed form" if self.head_is_closed else "labels",
            "max_dim": self.max_dim,
        }

    def _estimate(self, count: int, metadata: dict[str, Any], storage: str) -> KroneckerEstimate:
        diagonal: FisherEstimate = super()._estimate(count, metadata, storage)
        sums = self._factored
        groups = [] if self._reduced else sums.data_groups
        factors = sums.estimates(count, groups)
        shapes = {n: list(sums.slots[n].shape) for n in factors}
        turned = [n for n in factors if sums.factors[n].turned]
        about = {**metadata, "shapes": shapes, "turned": turned}
        return KroneckerEstimate(factors, diagonal, about)
