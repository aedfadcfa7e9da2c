"""Weights quantised as torchao quantises them: a tensor subclass with int8 values and scales.

It says float32 and the weight's shape, has no memory of its own, and knows the few ops that a
linear layer's forward and backward and a copy take. torchao itself is no dependency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


class Int8Weight(torch.Tensor):
    """q * scale, a scale for each row."""

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale = q, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    def dense(self) -> Tensor:
        """As floats."""
        return self.q.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A linear layer's ops, and copies; all others are errors, as torchao's are."""
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(args[0].q, args[0].scale)
        if func in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default):
            dense = [a.dense() if isinstance(a, cls) else a for a in args]
            return func(*dense, **(kwargs or {}))
        raise NotImplementedError(f"{cls.__name__}: unimplemented {func}")


def quantise(layer: nn.Linear) -> nn.Linear:
    """Its weight in int8, in place, frozen."""
    weight = layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Int8Weight(q, scale), requires_grad=False)
    return layer


def dequantise(layer: nn.Linear) -> nn.Linear:
    """The same weight as floats, in place."""
    weight: Any = layer.weight
    layer.weight = nn.Parameter(weight.detach().dense(), requires_grad=False)
    return layer
