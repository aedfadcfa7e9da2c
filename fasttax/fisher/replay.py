"""One example of a batch run alone, which every tapped module must meet as it did in the batch.

Squares are of examples then, and of nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fasttax._base.modes import evaluated
from fasttax.fisher.layout import WAY_OUT, Layout
from fasttax.fisher.passes import Met, Pass
from fasttax.fisher.proof import alike
from fasttax.fisher.sums import Sums
from fasttax.fisher.view import View, without_gradients

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)
WAYS_OUT = (
    f"{WAY_OUT} and loss=; where you know that the model keeps its examples apart, verify=False"
)


def replay(
    view: View, sums: Sums, layout: Callable[[], Layout], args: tuple[Any, ...], kwargs: Any
) -> bool:
    """Holds the taps' view of a batch's second example against that example alone.

    In eval mode; nothing is added to the sums.

    Args:
        view: the model, its taps in place.
        sums: the taps' sink.
        layout: makes the batch's layout, as far as it is known before the model runs.
        args: the model's arguments, by position.
        kwargs: and by name.

    Returns:
        Whether there was a second example.

    Raises:
        ValueError, TypeError: what a module meets of an example depends on the others, or the
            model cannot run on one example.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [_own(leaf) for leaf in leaves]
    before = sums.current
    with evaluated(view.model), torch.random.fork_rng(devices=view.cuda_devices):
        try:
            whole, outputs = _run(view, sums, layout, 1, leaves, spec)
            known = whole.layout
            if known.shape is None or known.examples < 2:
                return False
            problem = ""
            for part in _parts(known, leaves):
                try:
                    alone, found = _run(view, sums, _of_one, 0, part, spec)
                except _FAILURES as error:
                    problem = problem or _fails(view, leaves, error)
                    continue
                problem = _difference(view, whole, alone) or _mixes(view, known, outputs, found)
                if not problem:
                    return True
        finally:
            sums.current = before
    raise ValueError(problem)


def _own(leaf: Any) -> Any:
    """A copy, since a model may write into what it is given."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf)


def _of_one() -> Layout:
    return Layout("example", batch=1)


def _run(
    view: View, sums: Sums, layout: Callable[[], Layout], example: int, leaves: list[Any], spec: Any
) -> tuple[Pass, Any]:
    """A pass in which taps note what their modules meet of an example, and the model's outputs."""

    def run() -> tuple[Pass, Any]:
        args, kwargs = pytree.tree_unflatten([_own(leaf) for leaf in leaves], spec)
        sums.current = Pass(layout(), met=Met(example))
        with sums.current.explained():
            return sums.current, view.model(*args, **kwargs)

    return without_gradients(run)


def _parts(layout: Layout, leaves: list[Any]) -> Iterator[list[Any]]:
    """The second example's part of the model's arguments.

    Yields:
        First with every tensor cut whose first dimension counts rows or tokens, then with those
        cut too of which each row has several (images).
    """
    for folded in (False, True):
        yield [_part(layout, leaf, folded) for leaf in leaves]


def _part(layout: Layout, leaf: Any, folded: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    B, T, bounds = layout.known()
    begin, end = int(bounds[1]), int(bounds[2])
    if not layout.packed:
        return layout.cut(leaf, 1, "the model", folded=folded)
    if leaf.dim() == 1 and torch.equal(leaf.cpu().long(), bounds):
        return torch.tensor([0, end - begin], dtype=leaf.dtype, device=leaf.device)
    if tuple(leaf.shape[:2]) == (B, T):
        row, first = divmod(begin, T)
        return leaf[row : row + 1, first : first + end - begin]
    return leaf[begin:end] if leaf.dim() and leaf.shape[0] == B * T else leaf


def _fails(view: View, leaves: list[Any], error: Exception) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor))
    return (
        f"DiagonalFisher.observe: {type(view.model).__name__}: expected a model that runs on one "
        f"example's part of its inputs (of shapes {shapes}), got {type(error).__name__}: "
        f"{str(error)[:200]}; {WAYS_OUT}"
    )


def _difference(view: View, whole: Pass, alone: Pass) -> str:
    """The first module that meets something else of the example; empty where none does."""
    assert whole.met is not None
    assert alone.met is not None
    for where, expected in whole.met.by_place.items():
        found = alone.met.by_place.get(where, [])
        same = len(found) == len(expected) and all(map(alike, found, expected))
        if not same:
            module = type(view.model.get_submodule(where)).__name__
            return (
                f"DiagonalFisher.observe: {where} ({module}): what it meets of one example in the "
                f"batch is not what it meets of that example alone, so that the examples' gradients"
                f" cannot be told apart; {WAYS_OUT}"
            )
    return ""


def _mixes(view: View, layout: Layout, outputs: Any, found: Any) -> str:
    """Which of the model's outputs of an example depends on the others; empty where none does."""
    whole, alone = (_floats(tree) for tree in (outputs, found))
    for n, mine in enumerate(alone):
        # lists with an item for each example are longer in the batch
        among = whole[n : n + 1] if len(whole) == len(alone) else whole
        if not any(alike(mine, part) for t in among for part in _candidates(layout, t, mine)):
            return (
                f"DiagonalFisher.observe: {type(view.model).__name__}: its output {n}, of shape "
                f"{[tuple(t.shape) for t in among]} for the batch and {tuple(mine.shape)} for one "
                f"example alone, does not keep the examples apart; {WAYS_OUT}"
            )
    return ""


def _floats(outputs: Any) -> list[Tensor]:
    """The outputs that examples may have a part of: no sums over all."""
    leaves = pytree.tree_leaves(outputs)
    tensors = [t.detach() for t in leaves if isinstance(t, Tensor)]
    return [t for t in tensors if t.is_floating_point() and t.dim()]


def _candidates(layout: Layout, whole: Tensor, alone: Tensor) -> Iterator[Tensor]:
    """What may be the second example's part of a model's output."""
    B, _, bounds = layout.known()
    begin, end = int(bounds[1]), int(bounds[2])
    yield whole  # of no example
    if layout.packed:
        yield whole.reshape(-1, *whole.shape[2:])[begin:end].reshape(alone.shape)
        return
    for dim, size in enumerate(whole.shape):
        if size == B * alone.shape[dim : dim + 1].numel() and alone.dim() == whole.dim():
            yield whole.narrow(dim, alone.shape[dim], alone.shape[dim])
