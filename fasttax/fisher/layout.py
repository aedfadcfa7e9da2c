"""Which part of a layer's tensors belongs to which example."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

WAY_OUT = "leave its parameters out with params=, or pass fallback='loop'"


class Layout:
    """How a batch's examples lie in the tensors that layers see.

    Attributes:
        unit: "example", "token" or "batch", what is summed before it is squared.
        shape: (B, T) of the batch; None until the first layer shows it.
        bounds: (examples + 1,) int64 on the CPU over the B * T tokens in order.
        batch: how many examples what was computed once for all of them stands for: B, or the length
            of observe()'s first input; 0 while neither is known.
        only: the one example that runs at the moment, inside a block run example by example.
    """

    def __init__(
        self,
        unit: str,
        shape: tuple[int, int] | None = None,
        bounds: Tensor | None = None,
        batch: int = 0,
    ) -> None:
        self.unit, self.shape, self.bounds = unit, shape, bounds
        self.batch, self.only = batch, None  # type: int, int | None
        self._segments: dict[tuple[Any, ...], Tensor] = {}
        if shape is not None:
            self.batch = shape[0]
        if bounds is not None:
            self.bounds = bounds.detach().cpu().long()

    def see(self, leading: torch.Size) -> None:
        """Takes the layout from a layer's leading shape (B, T, ...) where observe() was not told.

        Its first dimension counts the examples, or the model's first input did.
        """
        if self.shape is None and leading:
            B, T = leading[0], leading[1:2].numel()
            if self.batch and self.batch != B:
                B, T = self.batch, 1
            self.shape = (B, T)
            self.bounds = torch.arange(B + 1, device="cpu") * T

    def known(self) -> tuple[int, int, Tensor]:
        """(B, T, bounds), which a layer has shown."""
        assert self.shape is not None
        assert self.bounds is not None
        return self.shape[0], self.shape[1], self.bounds

    @property
    def examples(self) -> int:
        """0 until the layout is known."""
        return 0 if self.bounds is None else self.bounds.numel() - 1

    @property
    def packed(self) -> bool:
        """Whether a row of the batch may hold several examples."""
        return self.shape is not None and self.examples != self.shape[0]

    @property
    def copies(self) -> int:
        """How many examples a tensor that was computed once stands for."""
        return max(1, self.batch) if self.only is None else 1

    def per_example(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's output and input, with one copy for each example of what was computed once.

        Position embeddings are: of (1, T) or (T,) ids.
        """
        copies = self.copies
        if copies == 1:
            return y, x
        if y.dim() > 1 and y.shape[0] == 1:
            return y.expand(copies, *y.shape[1:]), x.expand(copies, *x.shape[1:])
        if x.dim() != 1 or y.dim() != 2 or self.shape is None:
            return y, x
        B, T = self.shape
        if x.shape[0] % B or x.shape[0] == T != B:
            return y.expand(copies, *y.shape), x.expand(copies, *x.shape)
        return y, x

    def segments(self, leading: torch.Size, where: str, only: int | None) -> Tensor:
        """The units' boundaries over a layer's `leading.numel()` vectors.

        The first dimension may be the batch's rows or tokens times anything (heads, windows): the
        vectors of one row, or token, lie side by side then. The first batch shows whether they do.

        Args:
            leading: the shape of the layer's input without its features.
            where: the layer, for the error.
            only: the example that the layer ran on, in a block run example by example.

        Raises:
            ValueError: the leading shape does not keep the examples apart.

        Layers of one leading shape get one tensor, so that it crosses to their device once.
        """
        self.see(leading)
        key = (leading, only)
        if key not in self._segments:
            self._segments[key] = self._cut(leading, where, only)
        return self._segments[key]

    def _cut(self, leading: torch.Size, where: str, only: int | None) -> Tensor:
        """What `segments` keeps."""
        B, T, bounds = self.known()
        count = leading.numel()
        if not count:
            return bounds * 0
        if self.unit == "batch":
            return torch.tensor([0, count], device="cpu")
        if only is not None:
            if self.unit == "token":
                raise ValueError(
                    f"DiagonalFisher: {where}: unit='token' has no rule inside a block that routes "
                    f"tokens to experts; {WAY_OUT}"
                )
            return torch.tensor([0] * (only + 1) + [count] * (self.examples - only), device="cpu")
        by_token = tuple(leading[:2]) == (B, T) or (leading and leading[0] % (B * T) == 0)
        if by_token:
            units = bounds
            if self.unit == "token":
                units = torch.arange(B * T + 1, device="cpu")
            return units * (count // (B * T))
        if self.unit == "token" and leading and leading[0] == B:
            return torch.arange(count + 1, device="cpu")
        if leading and leading[0] % B == 0 and not self.packed and self.unit == "example":
            return torch.arange(B + 1, device="cpu") * (count // B)
        raise ValueError(
            f"DiagonalFisher: {where}: expected an input that keeps the batch's {B} rows (of {T} "
            f"tokens) apart, got leading shape {tuple(leading)}; {WAY_OUT}"
        )

    def by_position(self, bounds: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor (B, C, positions...) as (B * positions, C), every position a token.

        `bounds` over the B turn into bounds over B * positions.
        """
        vectors = x.flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() > 2 else x
        positions = vectors.shape[0] // x.shape[0]
        if self.unit == "token":
            return torch.arange(len(vectors) + 1, device="cpu"), vectors
        return bounds * positions, vectors

    def cut(self, x: Tensor, n: int, where: str, *, folded: bool = False) -> Tensor:
        """The part of a module's tensor that belongs to example n.

        By row of the batch, by token, or the whole where it has neither.

        Args:
            x: any tensor that came into the module or left it.
            n: which example.
            where: the module, for the error.
            folded: a first dimension that is a multiple of the batch's rows holds as many (heads,
                windows) of each row.

        Raises:
            ValueError: tokens lie in another dimension than the second, so that a packed document
                cannot be cut out.
        """
        B, T, bounds = self.known()
        begin, end = int(bounds[n]), int(bounds[n + 1])
        rows = x.shape[:1].numel() if x.dim() else 0
        by_token = rows == B * T
        if not self.packed:
            each = 0
            if rows in (B, B * T) or (folded and rows % B == 0):
                each = rows // B
            return x[n * each : (n + 1) * each] if each else x
        if tuple(x.shape[:2]) == (B, T):
            if T not in x.shape[2:]:
                row, first = divmod(begin, T)
                return x[row : row + 1, first : first + end - begin]
        elif by_token:
            return x[begin:end]
        elif T not in x.shape:
            return x
        raise ValueError(
            f"DiagonalFisher: {where}: a tensor of shape {tuple(x.shape)} cannot be cut into "
            f"packed documents; {WAY_OUT}"
        )

    def join(self, parts: list[Tensor], where: str) -> Tensor:
        """The whole of what a module returned example by example, the inverse of `cut`.

        Raises:
            ValueError: the parts have neither an example's tokens nor one row each.
        """
        B, T, bounds = self.known()
        lengths = [end - begin for begin, end in itertools.pairwise(bounds.tolist())]
        leading = [tuple(part.shape[:2]) for part in parts]
        if [shape[:1] for shape in leading] == [(n,) for n in lengths]:
            return torch.cat(parts)
        if leading == [(1, n) for n in lengths]:
            if self.packed:
                return torch.cat(parts, 1).unflatten(1, (B, T))[0]
            return torch.cat(parts)
        if not self.packed and all(shape[:1] == (1,) for shape in leading):
            return torch.cat(parts)
        raise ValueError(
            f"DiagonalFisher: {where}: what it returns for one example, shape "
            f"{tuple(parts[0].shape)}, cannot be joined to a batch; {WAY_OUT}"
        )
