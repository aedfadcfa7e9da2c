"""Group norms: elementwise weights of channels, which are the second dimension."""

from __future__ import annotations

from torch import Tensor, nn

from fasttax.fisher.rules.elementwise import ElementwiseTap


class GroupNormTap(ElementwiseTap):
    """nn.GroupNorm: y = xhat(x) * weight + bias by channel, every position a token."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Plain ones: a subclass may use its weight otherwise."""
        return type(module).forward is nn.GroupNorm.forward

    def axis(self, x: Tensor, y: Tensor) -> int:
        """The channels', x being (B, C, positions...)."""
        self._axes[x.dim()] = 1
        return 1

    def leading(self, x: Tensor) -> int:
        """The examples."""
        return 1
