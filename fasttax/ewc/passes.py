"""Once a backward pass, also where a reentrant checkpoint runs passes of its own within it.

A parameter that several of a model's reentrant checkpoints share (a layer that is called again)
has its gradient in parts, one from each inner pass, and a hook on it runs after each of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fasttax._base import checks
from fasttax._base.modes import compiling

ENGINE = torch.autograd.backward.__code__
FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__
UNKNOWN = -1  # a pass whose outermost graph showed nothing of itself


class Passes:
    """The outermost backward pass under way, which the model's outputs and parameters show."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._now = UNKNOWN
        self._last: dict[str, int] = {}  # by a parameter's name, the pass that it was last seen in

    def watch(self, module: Any, args: Any, output: Any) -> None:
        """A forward hook of the model: a gradient at its output is the outermost pass's."""
        if compiling() or inside():
            return
        for t in pytree.tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(self._see)

    def first(self, name: str) -> bool:
        """Whether a parameter whose hook runs is met for the first time in this pass.

        Raises:
            ValueError: it may be the same pass, or another one.
        """
        self._see()
        before, self._last[name] = self._last.get(name), self._now
        if before == UNKNOWN == self._now:
            raise checks.fail(
                self.op,
                f"the gradient of {name}",
                "one in each backward pass",
                "a second one, from a reentrant checkpoint, which may be of the same pass",
                "checkpoint with use_reentrant=False, call the model itself, or use attach",
            )
        return before != self._now or before is None

    def _see(self, grad: Tensor | None = None) -> None:
        now = torch._C._current_graph_task_id()
        if now != self._now and not inside():
            self._now = now
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._over)

    def _over(self) -> None:
        self._now = UNKNOWN


def inside() -> bool:
    """Whether this runs in a backward pass that a custom Function's backward has begun."""
    frame, inner = inspect.currentframe(), False
    while frame is not None:
        if frame.f_code is ENGINE:
            inner = True
        elif inner and frame.f_code is FUNCTION:
            return True
        frame = frame.f_back
    return False
