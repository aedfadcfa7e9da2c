"""Group norms: elementwise weights of channels, which are the second dimension."""

from __future__ import annotations

from torch import Tensor, nn

from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece
from fasttax.fisher.rules.elementwise import ElementwiseTap


class GroupNormTap(ElementwiseTap):
    """nn.GroupNorm: y = xhat(x) * weight + bias by channel, every position a token."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Plain ones: a subclass may use its weight otherwise."""
        return type(module).forward is nn.GroupNorm.forward

    def leading(self, x: Tensor) -> int:
        """The examples, x being (B, C, positions...)."""
        return 1

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` and x (B, C, positions...)."""
        ends, flat = current.layout.by_position(bounds, d)
        self.give(current, "bias", Piece("bias", ends, flat))
        if "weight" in self.names:
            _, xhat = current.layout.by_position(bounds, self.normalised(x))
            self.give(current, "weight", Piece("scale", ends, flat, xhat))
