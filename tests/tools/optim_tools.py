"""What the tests of AdamWEWC share: a model of awkward sizes, gradients that two copies of it agree
on, and how far they come apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sizes(nn.Module):
    """Parameters of 1, 256, 257 and `last` elements, below, at and above what a kernel takes at
    once, and one that no EWC covers.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, last: int = 1000) -> None:
        super().__init__()
        self.held = nn.ParameterList(
            [torch.randn(n, dtype=torch.float64).to(dtype) for n in (1, 256, 257, last)]
        )
        self.free = nn.Parameter(torch.randn(300, dtype=torch.float64).to(dtype))

    def fisher(self) -> dict[str, Tensor]:
        wide = self.free.dtype == torch.float64
        return {
            n: (2 * torch.randn(p.shape)).exp().to(torch.float64 if wide else torch.float32)
            for n, p in self.named_parameters()
            if n != "free"
        }


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((p.detach().double() - q.detach().double()).abs().max())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )
