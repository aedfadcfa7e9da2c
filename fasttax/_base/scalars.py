"""Numbers beside tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def number_on(value: Tensor | float, device: torch.device) -> Tensor:
    """A 0-d tensor on the device, where a Python number is filled in: a copy would be a sync."""
    if isinstance(value, Tensor):
        return value.to(device)
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    return torch.full((), value, dtype=dtype, device=device)
