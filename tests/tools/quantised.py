"""Weights quantised as torchao quantises them: a tensor subclass with int8 values and scales.

It says float32 and the weight's shape, has no memory of its own, and knows the few ops that a
linear layer's forward and backward and a copy take. And a layer of 4-bit codes, two a byte, as
bitsandbytes has them. Neither library is a dependency.
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


class Params4bit(nn.Parameter):
    """bitsandbytes' class of them, by its name; the bytes may be read as floats."""


class FourBit(nn.Linear):
    """A linear layer of codes, two a byte, and a scale.

    As bitsandbytes on a CPU with AVX-512 it lays the codes out anew at the first forward in eval
    mode of an input that needs no gradient, and has no gradient from then on.
    """

    def __init__(self, linear: nn.Linear, storage: torch.dtype = torch.uint8) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = float(linear.weight.detach().abs().max()) / 7
        self.laid_out_anew = False
        empty = torch.empty(0, dtype=storage)
        self.weight = (nn.Parameter if storage == torch.uint8 else Params4bit)(empty, False)
        self.store((linear.weight.detach() / self.scale).round().to(torch.int64) + 8)

    def store(self, codes: Tensor) -> None:
        """(out, in) codes from 0 to 15: a row's neighbours in a byte, or of neighbouring rows."""
        pairs = codes.mT.reshape(-1, 2) if self.laid_out_anew else codes.reshape(-1, 2)
        packed = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)
        shape = (-1, self.in_features) if self.laid_out_anew else (-1, 1)
        self.weight.data = packed.view(self.weight.dtype).reshape(shape)

    def codes(self) -> Tensor:
        """As `store` takes them."""
        packed = self.weight.reshape(-1).view(torch.uint8).long()
        flat = torch.stack((packed // 16, packed % 16), -1).reshape(-1)
        if self.laid_out_anew:
            return flat.view(self.in_features, self.out_features).mT
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not x.requires_grad and not self.laid_out_anew:
            codes, self.laid_out_anew = self.codes(), True
            self.store(codes)
        out = nn.functional.linear(x, (self.codes() - 8).to(x.dtype) * self.scale)
        return out.detach() if self.laid_out_anew else out
