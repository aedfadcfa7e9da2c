"""One pass of a model under its taps: how often each layer ran, and what waits for the end."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from fasttax._base import dtensor
from fasttax.fisher.layout import WAY_OUT, Layout
from fasttax.fisher.pieces import Piece, TiedHead

UnitGradients = Callable[[int], dict[str, Tensor]]  # a unit -> its gradients, by parameter


def in_backward() -> bool:
    """Whether this thread runs inside autograd's backward.

    Where activation checkpointing runs a forward a second time.
    """
    return torch._C._current_graph_task_id() != -1


def graph_is_kept() -> bool:
    """Whether this backward was called with retain_graph=True, so that another may follow.

    True where torch cannot tell.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def address(t: Tensor) -> int:
    """Where in memory a tensor begins; 0 for every DTensor, which has no memory of its own."""
    return 0 if dtensor.is_sharded(t) else t.data_ptr()


class Met:
    """What every tapped module met of example `n`, call by call."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.by_place: dict[str, list[Tensor]] = {}

    def add(self, where: str, t: Tensor) -> None:
        """A module at `where` met t."""
        self.by_place.setdefault(where, []).append(t)


class Pass:
    """A forward of the model and its backward.

    Attributes:
        layout: which part of a layer's tensors belongs to which example.
        observed: the forward and the backward are the user's own, of which there may be several.
        calls: how often each tap's module ran forward, recomputations not counted.
        recomputed: a checkpoint has run a layer again; reentrant ones' inner backward passes do not
            show whether the outer one keeps its graph.
        seen: a layer has added to the sums.
        head: the tap of the head whose Fisher is taken in closed form, `score` (..., V) then being
            the gradient at the logits.
        outputs: the address of a linear layer's last output -> its tap.
        ids: an embedding's parameter -> the ids of its last call.
        waiting: a parameter -> what waits for its other uses.
        reruns: a tap -> the gradients of its calls, of a module that runs again unit by unit.
        done: the parameters that this backward has squared.
        diverted: where pieces go in place of the sums, in a backward that is to add nothing.
        expanded: modules whose one output for all examples was copied for each of them.
        met: where taps put what their modules meet of one example, in a run that adds nothing.
    """

    def __init__(self, layout: Layout, *, observed: bool = False, met: Met | None = None) -> None:
        self.layout, self.observed = layout, observed
        self.calls: Counter[Hashable] = Counter()
        self.recomputed = self.seen = False
        self.head: Hashable = None
        self.score: Tensor | None = None
        self.outputs: dict[int, Any] = {}
        self.ids: dict[str, Tensor] = {}
        self.waiting: dict[str, list[Piece | TiedHead]] = {}
        self.reruns: dict[Any, list[UnitGradients]] = {}
        self.done: set[str] = set()
        self.diverted: list[Piece] | None = None
        self.expanded: list[str] = []
        self.met = met

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, an error of the model's own code is laid to the copies that taps made for it.

        Raises:
            ValueError: the model cannot go on with a module's output copied for each example.
        """
        try:
            yield
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if not self.expanded or str(error).startswith("DiagonalFisher"):
                raise
            places = ", ".join(dict.fromkeys(self.expanded))
            raise ValueError(
                f"DiagonalFisher: {places}: computed once for all examples, and the model takes no "
                f"copy for each ({type(error).__name__}: {str(error)[:200]}); {WAY_OUT}"
            ) from error

    def keeps(self) -> bool:
        """Whether another backward through the same graph may follow."""
        return self.observed and (self.recomputed or graph_is_kept())
