"""estimate_fisher: a DiagonalFisher over an iterable of batches, with a progress bar and
checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttax._base import checks
from fasttax._base.packed import STORAGES
from fasttax.fisher import batches
from fasttax.fisher.diagonal import NORMALIZE, DiagonalFisher
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.plan import Filter


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    labels: str = "sample",
    unit: str = "example",
    max_examples: int | None = None,
    progress: bool = True,
    params: Filter = None,
    tied: str = "exact",
    lora: str = "factors",
    generator: torch.Generator | None = None,
    mc_samples: int = 1,
    shift: bool = True,
    fallback: str | None = None,
    normalize: str = "mean",
    storage: str = "fp32",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
) -> FisherEstimate:
    """The diagonal Fisher of `model` over `batches`, with a progress bar.

    Options as in `DiagonalFisher` and its `finalize`.

    Args:
        batches: an iterable of what `DiagonalFisher.update` takes.
        max_examples: stop after this many rows; the last batch is cut to fit.
        progress: show examples done, examples/s, the time left, and the estimate's own relative
            error.
        checkpoint: a file that is written every `checkpoint_every` batches and removed at the end.
            Where it exists, estimation continues after the batches that it holds, to the same bits;
            `batches` must come in the same order.

    Example:
        >>> fisher = fasttax.estimate_fisher(model, loader, max_examples=256)
        >>> ewc = fasttax.EWC(model, fisher, strength=1e3)
    """
    op = "estimate_fisher"
    for name, value in (("max_examples", max_examples), ("checkpoint_every", checkpoint_every)):
        if (value is not None or name == "checkpoint_every") and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise checks.fail(
                op, name, f"{'None or ' if name == 'max_examples' else ''}an integer >= 1", value
            )
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise checks.fail(
            op,
            "batches",
            "an iterable of batches",
            batches,
            "for one batch pass [batch]",
            TypeError,
        )
    estimator = DiagonalFisher(
        model,
        labels=labels,
        unit=unit,
        params=params,
        tied=tied,
        lora=lora,
        generator=generator,
        mc_samples=mc_samples,
        shift=shift,
        fallback=fallback,
    )
    checks.choice(op, "normalize", normalize, NORMALIZE)
    checks.choice(op, "storage", storage, STORAGES)
    total = max_examples if max_examples is not None else _examples_in(batches)
    done = 0
    if checkpoint is not None and os.path.exists(checkpoint):
        estimator.resume(checkpoint)
        done = estimator.batches
    with tqdm(
        total=total, initial=estimator.examples, unit="ex", desc="Fisher", disable=not progress
    ) as bar:
        for i, batch in enumerate(batches):
            if i < done:
                continue
            if max_examples is not None:
                if estimator.examples >= max_examples:
                    break
                batch = _cut(batch, max_examples - estimator.examples)
            before = estimator.examples
            estimator.update(batch)
            error = estimator.relative_error()
            if not math.isnan(error):
                bar.set_postfix_str(f"error {100 * error:.0f} %", refresh=False)
            bar.update(estimator.examples - before)
            if checkpoint is not None and estimator.batches % checkpoint_every == 0:
                estimator.checkpoint(checkpoint)
            if max_examples is not None and estimator.examples >= max_examples:
                break
    if estimator.examples == 0:
        raise checks.fail(op, "batches", "at least one batch", "an empty iterable")
    estimate = estimator.finalize(normalize=normalize, storage=storage)
    if checkpoint is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(checkpoint)
    return estimate


def _cut(batch: Any, room: int) -> Any:
    """At most `room` rows of a batch of unpacked rows."""
    ids = (
        batch
        if isinstance(batch, Tensor)
        else batch.get("input_ids")
        if isinstance(batch, Mapping)
        else None
    )
    return (
        batches.rows(batch, 0, room) if isinstance(ids, Tensor) and ids.shape[0] > room else batch
    )


def _examples_in(batches: Any) -> int | None:
    """For the time left: of a data loader, or a list of batches of ids.

    None where it cannot be known.
    """
    if isinstance(batches, torch.utils.data.DataLoader):
        try:
            return len(batches.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
    if isinstance(batches, (list, tuple)):
        ids = [
            b if isinstance(b, Tensor) else b.get("input_ids") if isinstance(b, Mapping) else None
            for b in batches
        ]
        return (
            sum(t.shape[0] for t in ids if isinstance(t, Tensor))
            if all(isinstance(t, Tensor) for t in ids)
            else None
        )
    return None
