"""Tensor subclasses that lie in tensors of their own, as torchao's quantised weights do.

They have the dtype and shape of the floats that they stand for, no memory behind them, and few ops.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttax._base import dtensor


def lies_in_others(t: Any) -> bool:
    """Whether the values lie in other tensors, by torch's protocol of it; not so of a DTensor."""
    return hasattr(t, "__tensor_flatten__") and not dtensor.is_sharded(t)


def in_four_bits(weight: Any) -> bool:
    """Whether it is bitsandbytes', two codes a byte, the bytes of any dtype (quant_storage)."""
    return type(weight).__name__ == "Params4bit"


def is_float(weight: Tensor) -> bool:
    """Whether its entries are the weight's values as floats, and no codes under a float's name."""
    return weight.is_floating_point() and not in_four_bits(weight)


def parts(t: Any) -> list[Tensor]:
    """The tensors that the values lie in: the tensor itself, but of such a subclass its own."""
    if not lies_in_others(t):
        return [t]
    names, _ = t.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(t, name))]
