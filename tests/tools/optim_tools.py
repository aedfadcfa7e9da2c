"""What the tests of AdamWEWC share: a model of awkward sizes, gradients that two copies of it agree
on, how far they come apart, and the step's formula.
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


Step = dict[str, Tensor]


def formula(
    state: dict[str, Step],
    grads: dict[str, Tensor],
    held: dict[str, tuple[Tensor, Tensor]],
    t: int,
    mode: str,
    strength: float,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    second_moment: float = 0.0,
) -> float:
    """AdamWEWC's docstring in float64, written anew; returns the penalty before the step."""
    penalty = 0.0
    for name, s in state.items():
        theta, g = s["theta"], -grads[name] if maximize else grads[name].clone()
        anchor, fisher = held.get(name, (theta, torch.zeros_like(theta)))
        if second_moment and name in held and mode == "grad":
            fisher = (
                second_moment * s["v"] / (1 - betas[1] ** (t - 1))
                if t > 1
                else torch.zeros_like(theta)
            )
        if mode == "grad":
            g = g + strength * fisher * (theta - anchor)
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
        s["most"] = torch.maximum(s["most"], s["v"]) if amsgrad else s["v"]
        metric = (s["most"] / (1 - betas[1] ** t)).sqrt() + eps
        if second_moment and name in held and mode == "prox":
            fisher = second_moment * s["v"] / (1 - betas[1] ** t)
        penalty += strength / 2 * float((fisher * (theta - anchor) ** 2).sum())
        u = theta * (1 - lr * weight_decay) - lr / (1 - betas[0] ** t) * s["m"] / metric
        s["theta"] = (
            anchor + (u - anchor) * metric / (metric + lr * strength * fisher)
            if mode == "prox"
            else u
        )
    return penalty
