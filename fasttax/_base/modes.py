"""Which of torch's modes a call runs in."""

from __future__ import annotations

import torch


def compiling() -> bool:
    """Whether torch.compile traces the call: its tensors have no values."""
    return torch.compiler.is_compiling()


def transforming() -> bool:
    """Whether torch.func's transforms (vmap, grad, vjp, jacrev) are at work."""
    return bool(torch._C._are_functorch_transforms_active())
