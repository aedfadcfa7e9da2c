"""Where a GPU's host would wait for it, seen without a GPU: a dispatch mode that refuses what reads
values back, and counts the ops that a call makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# their result, or its shape, is made of values
READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")  # by a mask: nonzero inside


class NoSync(TorchDispatchMode):
    """Inside, what would wait for a GPU is an AssertionError.

    Args:
        device: "cpu": every tensor counts as a GPU's. "meta": those on it do, which have no values
            at all, and those of the CPU are the host's own.

    Attributes:
        calls: how often each op was called.
        largest: the elements of the largest tensor that an op of torch's made.
        crossed: how many tensors of several elements were copied from one device to another.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.calls: Counter[str] = Counter()
        self.largest = self.crossed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        name = func._schema.name
        self.calls[name] += 1
        there = any(isinstance(a, Tensor) and a.device.type == self.device for a in args)
        assert name not in READS or not there, f"{name} waits for the device"
        masks = args[1] if name in INDEXING and there else ()
        assert not any(m is not None and m.dtype == torch.bool for m in masks), f"{name} by a mask"
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            source = next((a for a in args if isinstance(a, Tensor)), out)
            self.crossed += source.device != out.device and source.numel() > 1
            if not any(_share(out, a) for a in args if isinstance(a, Tensor)):
                self.largest = max(self.largest, out.numel())
        return out


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether one is a view of the other."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
