"""One pass of a model under its taps.

Which rows belong to which example, how often each layer ran, and what waits for the end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

WAY_OUT = "leave its parameters out with params=, or pass fallback='loop'"


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


class Pass:
    """A forward and its backward.

    Attributes:
        shape: (B, T) of the batch; None until the first layer shows it.
        bounds: (examples + 1,) int64 on the CPU over the B * T tokens in order.
        calls: how often each tap's module ran forward, recomputations not counted.
        only: the one example that runs now, inside a block that is run example by example.
        head: the tap of the head whose Fisher is taken in closed form, `score` then being the
            gradient at the logits.
        keeps: whether another backward through the same graph may follow (observe() with several
            losses).
    """

    def __init__(
        self,
        unit: str,
        shape: tuple[int, int] | None = None,
        bounds: Tensor | None = None,
        *,
        observed: bool = False,
    ) -> None:
        self.unit, self.shape, self.observed = unit, shape, observed
        # rows; what the first inputs show where observe() was not told
        self.batch = 1 if shape is None else shape[0]
        self.bounds = None if bounds is None else bounds.detach().cpu().long()
        self.calls: Counter[Hashable] = Counter()
        self.only: int | None = None
        self.head: Any = None
        self.score: Tensor | None = None
        self.waiting: dict[str, list[Any]] = {}
        self.done: set[str] = set()
        self.ids: dict[str, Tensor] = {}  # embedding parameter -> the ids of its last call
        self.outputs: dict[
            int, Any
        ] = {}  # where in memory a linear layer's last output is -> its tap
        # reentrant checkpointing: inner backward passes do not show whether the outer one keeps its
        # graph
        self.recomputed = False
        self.muted = False  # a backward that is to add nothing
        self.seen = False  # a layer has added to the sums
        self.local: dict[Any, list[Any]] = {}

    def see(self, leading: torch.Size) -> None:
        """Takes the layout from the first layer's input where observe() was not told.

        Its rows are the examples.
        """
        if self.shape is None and leading:
            self.shape = (leading[0], leading[1] if len(leading) > 1 else 1)
            self.bounds = torch.arange(leading[0] + 1) * self.shape[1]

    def layout(self) -> tuple[int, int, Tensor]:
        assert self.shape is not None
        assert self.bounds is not None
        return self.shape[0], self.shape[1], self.bounds

    @property
    def examples(self) -> int:
        return 0 if self.bounds is None else self.bounds.numel() - 1

    @property
    def packed(self) -> bool:
        return self.shape is not None and self.examples != self.shape[0]

    def keeps(self) -> bool:
        return self.observed and (self.recomputed or graph_is_kept())

    def segments(self, leading: torch.Size, where: str, only: int | None) -> Tensor:
        """Boundaries of the units over a layer's rows, from the leading shape of its input."""
        self.see(leading)
        B, T, bounds = self.layout()
        rows = leading.numel()
        if self.unit == "batch":
            return torch.tensor([0, rows])
        if only is not None:
            if self.unit == "token":
                raise ValueError(
                    f"DiagonalFisher: {where}: unit='token' has no rule inside a block that routes "
                    f"tokens to experts; {WAY_OUT}"
                )
            return torch.tensor([0] * (only + 1) + [rows] * (self.examples - only))
        if tuple(leading[:2]) == (B, T) or (len(leading) == 1 and leading[0] == B * T):
            per_token = rows // (B * T)
            return (
                torch.arange(B * T + 1) * per_token if self.unit == "token" else bounds * per_token
            )
        if leading and leading[0] == B and not self.packed:
            return (
                torch.arange(rows + 1)
                if self.unit == "token"
                else torch.arange(B + 1) * (rows // B)
            )
        raise ValueError(
            f"DiagonalFisher: {where}: expected an input that keeps the batch's {B} rows (of {T} "
            "tokens) apart, got leading shape "
            f"{tuple(leading)}; {WAY_OUT}"
        )

    def cut(self, x: Tensor, n: int, where: str) -> Tensor:
        """The part of a module's tensor that belongs to example n.

        By rows, by (row, token), or the whole where it has neither.
        """
        B, T, bounds = self.layout()
        begin, end = int(bounds[n]), int(bounds[n + 1])
        if self.packed:
            if x.dim() >= 2 and tuple(x.shape[:2]) == (B, T):
                row = begin // T
                x, begin, end = x[row : row + 1], begin - row * T, end - row * T
                if T in x.shape[2:]:
                    raise ValueError(
                        f"DiagonalFisher: {where}: a tensor of shape {tuple(x.shape)} cannot be "
                        f"cut into packed documents; {WAY_OUT}"
                    )
                return x[:, begin:end]
            if x.dim() >= 1 and x.shape[0] == B * T:
                return x[begin:end]
            if T in x.shape:
                raise ValueError(
                    f"DiagonalFisher: {where}: a tensor of shape {tuple(x.shape)} cannot be cut "
                    f"into packed documents; {WAY_OUT}"
                )
            return x
        if x.dim() >= 1 and x.shape[0] == B:
            return x[n : n + 1]
        return x[begin:end] if x.dim() >= 1 and x.shape[0] == B * T else x

    def join(self, parts: list[Tensor], where: str) -> Tensor:
        """The whole of what a module returned example by example."""
        B, T, bounds = self.layout()
        lengths = [b - a for a, b in itertools.pairwise(bounds.tolist())]
        if all(p.dim() >= 1 and p.shape[0] == n for p, n in zip(parts, lengths, strict=True)):
            return torch.cat(parts)
        if all(
            p.dim() >= 2 and tuple(p.shape[:2]) == (1, n)
            for p, n in zip(parts, lengths, strict=True)
        ):
            return torch.cat(parts, 1).unflatten(1, (B, T))[0] if self.packed else torch.cat(parts)
        if not self.packed and all(p.dim() >= 1 and p.shape[0] == 1 for p in parts):
            return torch.cat(parts)
        raise ValueError(
            f"DiagonalFisher: {where}: what it returns for one example, shape "
            f"{tuple(parts[0].shape)}, cannot be joined to a batch; {WAY_OUT}"
        )
