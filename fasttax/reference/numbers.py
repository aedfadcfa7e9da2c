"""What every specification computes with."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What sums are taken in: float32, or float64 where any tensor has it."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32, float64 as it is: what sums are taken in."""
    return x.to(wide_dtype(x))


def times(weight: Tensor, value: Tensor) -> Tensor:
    """The product weight * value with 0 * inf = 0 * NaN = 0."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * value)


def hide(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (..., tokens) with 0 where the mask is false."""
    return values if mask is None else values.masked_fill(~mask, 0)


def hide_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (tokens, V) with 0 where the token's mask is false."""
    return rows if mask is None else rows.masked_fill(~mask[..., None], 0)


def empty_gradient(like: Tensor, need: bool) -> Tensor:
    """Room for the gradient of `like`, contiguous; a backward op that needs none gives it empty."""
    return like.new_empty(like.shape if need else (0,))
