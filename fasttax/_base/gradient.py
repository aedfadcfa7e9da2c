"""A parameter's gradient, as optimizers take it."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_of(p: Tensor) -> Tensor:
    """p.grad; a missing one is made, 0 and lying in memory as `p` does.

    torch's fused optimizers on CPUs go through both by their memory and do not look at strides.
    """
    if p.grad is None:
        p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
    return p.grad
