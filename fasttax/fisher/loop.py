"""The definition itself: one example at a time through autograd.

The fallback for any model, and what the first batch is checked against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttax.fisher import batches, labels, parts
from fasttax.fisher.sums import Sums
from fasttax.fisher.view import View, without_gradients


def examples(view: View, batch: Any, ready: batches.Batch) -> Iterator[batches.Batch]:
    """The examples of `batch`, which was read as `ready`, as batches of their own."""
    for n in range(ready.examples):
        part = view.read(parts.example(batch, ready, n))
        yield part
        ready.ranges.join(part.ranges)


@contextlib.contextmanager
def explained(view: View, part: batches.Batch, whole: Any = None) -> Iterator[None]:
    """Inside, an error of a model that was given a part of a batch says so.

    Args:
        view: the model.
        part: what it is given.
        whole: the batch, where the model, now in eval mode, has not run on it yet: what fails on
            that, too, is no fault of the part.

    Raises:
        ValueError: the model cannot run on the part.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if str(error).startswith("DiagonalFisher"):
            raise
        if whole is not None and not _runs(view, whole):
            raise ValueError(
                f"DiagonalFisher.update: batch: {type(view.model).__name__} does not run on it in "
                f"eval mode: {type(error).__name__}: {str(error)[:200]}; give a batch that "
                "model(**batch) takes; where that runs in train mode alone, "
                "DiagonalFisher(model, verify=False) leaves the proof in eval mode out"
            ) from error
        shapes = ", ".join(
            f"{k} {tuple(v.shape)}" for k, v in part.inputs.items() if isinstance(v, Tensor)
        )
        raise ValueError(
            f"DiagonalFisher.update: batch: {type(view.model).__name__} does not run on a part of "
            f"the batch ({shapes}): {type(error).__name__}: {str(error)[:200]}; give batches whose "
            "tensors all have the examples in their first dimension (as many images for each), or "
            "use observe() with a loss= of one example"
        ) from error


def _runs(view: View, batch: Any) -> bool:
    """Whether the model runs on a batch as it is."""
    try:
        without_gradients(lambda: view.run(view.read(batch).inputs))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


def update(
    view: View,
    sums: Sums,
    batch: Any,
    ready: batches.Batch,
    *,
    draws: int,
    drawing: torch.Generator | None,
) -> None:
    """Adds one batch's squares to the sums, one example and one draw of its labels at a time."""
    params = {n: s.param for n, s in sums.slots.items() if s.param is not None}

    def found() -> Iterator[dict[str, Tensor]]:
        for part in examples(view, batch, ready):

            def score(logits: Tensor, part: batches.Batch = part) -> Tensor:
                return labels.score(logits, part.settled(logits), drawing)

            for _ in range(draws):
                with explained(view, part):
                    gradients = view.gradients(params, part, score)
                yield gradients

    sums.add_by_example(found())


def squares(
    view: View, params: Mapping[str, Tensor], batch: Any, ready: batches.Batch, score: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float64 sums, and sums of squares, of the gradients of a batch's examples.

    Args:
        view: the model.
        params: name -> parameter.
        batch: as `view.read` takes it; `ready` as it gave it.
        ready: see batch.
        score: the gradient at the logits, (B, T, V), or a classifier's (B, V).
    """

    def found() -> Iterator[dict[str, Tensor]]:
        for n, part in enumerate(examples(view, batch, ready)):
            mine = score[n : n + 1]
            if score.dim() > 2:
                mine = mine[:, : part.shape[1]]

            def given(logits: Tensor, mine: Tensor = mine) -> Tensor:
                return mine

            with explained(view, part):
                gradients = view.gradients(params, part, given)
            yield gradients

    return totals(found())


def totals(
    gradients: Iterable[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float64 sums, and sums of squares, of examples' gradients by name."""
    sums: dict[str, Tensor] = {}
    squared: dict[str, Tensor] = {}
    for found in gradients:
        for name, g in found.items():
            wide = g.double()
            sums[name] = sums.get(name, 0) + wide
            squared[name] = squared.get(name, 0) + wide**2
    return sums, squared
