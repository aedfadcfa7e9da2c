"""Norms with an elementwise weight: its gradient is the sum of d times what it multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece
from fasttax.fisher.tap import Tap, computing_with

# their statistics run over examples, or their weight over channels that are not last
_OTHERS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class ElementwiseTap(Tap):
    """y = xhat(x) * weight + bias elementwise, whatever xhat and the weight's offset are.

    LayerNorm, any RMSNorm, Gemma's (1 + w). xhat is the module's own output at weight 1 less that
    at weight 0, so nothing is divided by a weight and no eps is guessed.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Leaves called a norm with nothing but a weight and a bias of one dimension.

        By name: transformers has an RMSNorm of its own in every model.
        """
        own = dict(module.named_parameters(recurse=False))
        named = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (
            "norm" in type(module).__name__.lower() and not isinstance(module, _OTHERS)
        )
        leaf = not any(True for _ in module.children())
        vectors = set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())
        return named and leaf and vectors

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` and x (..., H)."""
        flat = d.reshape(-1, d.shape[-1])
        self.give(current, "bias", Piece("bias", bounds, flat))
        if "weight" in self.names:
            xhat = self.normalised(x).reshape(flat.shape)
            self.give(current, "weight", Piece("scale", bounds, flat, xhat))

    def normalised(self, x: Tensor) -> Tensor:
        """xhat, what the weight multiplies."""
        return self._at(x, 1.0) - self._at(x, 0.0)

    def _at(self, x: Tensor, value: float) -> Tensor:
        """The module's output at that weight and without its bias."""
        plain = {}
        for own, p in self.module.named_parameters(recurse=False):
            fill = 0.0
            if own == "weight":
                fill = value
            plain[own] = torch.full(p.shape, fill, dtype=p.dtype, device=x.device)
        with computing_with(self.module, plain):
            out: Tensor = self.module.forward(x)
        return out
