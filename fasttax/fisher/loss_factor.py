"""By what the cross-entropy inside a block is a multiple of its sum over tokens.

The squares of a mean, or under a GradScaler, are off by the square of the factor, which nothing in
the layers shows. A cross-entropy shows it at its logits: the gradient of each row is factor * (p -
e_label).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import dtensor

_ROWS = 64  # that are looked at
_CLOSE = 2e-2  # relative: bfloat16's rounding of p and of the gradient


class LossFactor:
    """The factor of the loss inside a block; None of what is no cross-entropy of one factor."""

    def __init__(self) -> None:
        self.found: float | None = None
        self._backwards = 0

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, the first forward with a graph is looked at, and the gradient at its logits."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            if not isinstance(logits, Tensor) or not logits.requires_grad:
                return
            if seen or dtensor.is_sharded(logits) or not logits.is_floating_point():
                return
            seen.append(logits)
            values = logits.detach()
            logits.register_hook(lambda gradient: self._see(values, gradient))

        handle = model.register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _see(self, logits: Tensor, gradient: Tensor) -> None:
        self._backwards += 1
        # of several backwards each is a part of the loss
        self.found = factor_of(logits, gradient) if self._backwards == 1 else None


def factor_of(logits: Tensor, gradient: Tensor) -> float | None:
    """What a cross-entropy's sum over rows is multiplied by; None of any other loss.

    Args:
        logits: (..., V).
        gradient: at them.
    """
    V = logits.shape[-1] if logits.dim() > 1 else 0
    if V < 3:  # of two classes whatever sums to 0 is a multiple
        return None
    z, g = logits.reshape(-1, V), gradient.reshape(-1, V)
    rows = torch.linalg.vector_norm(g, torch.inf, -1).nonzero()[:, 0]  # no copy of g
    rows = rows[:: max(1, len(rows) // _ROWS)]
    p, g = torch.softmax(z[rows].double(), -1), g[rows].double()
    label = g.argmin(-1, keepdim=True)
    missing = 1 - p.gather(-1, label)
    factors = -g.gather(-1, label) / missing
    off = (g - factors * p.scatter_add(-1, label, -torch.ones_like(missing))).norm(dim=-1)
    told = missing[:, 0] > _CLOSE  # of a label that is certain the gradient is rounding
    if int(told.sum()) < 2 or bool((off > _CLOSE * g.norm(dim=-1))[told].any()):
        return None
    factors = factors[told]
    factor = float(factors.median())
    if bool(((factors - factor).abs() > _CLOSE * abs(factor)).any()):
        return None  # weights of tokens, as an advantage
    return factor
