"""What every specification computes with."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, float64 as it is: what sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Weight * value with 0 * inf = 0 * NaN = 0."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * value)
