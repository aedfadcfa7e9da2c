"""Convolutions of one group: linear layers over patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece
from fasttax.fisher.tap import Call, Tap


class ConvTap(Tap):
    """nn.Conv1d and nn.Conv2d of one group.

    A linear layer over the patches (C * kernel), every position of the output a token.
    """

    linear = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Plain ones by their forward; several groups run again on their own."""
        plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
        return plain and isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1

    def check(self, call: Call) -> None:
        """Refuses an input without a batch dimension, which torch's convolutions take too."""
        super().check(call)
        module: Any = self.module
        dims = len(module.kernel_size) + 2
        if call.input.dim() != dims:
            reason = f"expected a batch of {dims} dimensions, got {tuple(call.input.shape)}"
            raise self.refusal(reason, ValueError)

    def leading(self, x: Tensor) -> int:
        """The examples: positions are the output's, not the input's."""
        return 1

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` (B, O, positions...), x (B, C, positions...)."""
        bounds, d = current.layout.by_position(bounds, d)
        self.give(current, "bias", Piece("bias", bounds, d))
        if "weight" in self.names:
            self.give(current, "weight", Piece("linear", bounds, d, self.patches(x)))

    def patches(self, x: Tensor) -> Tensor:
        """(B * output positions, C * kernel): what the kernel met at each position."""
        module: Any = self.module
        mode = module.padding_mode.replace("zeros", "constant")
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        sizes: list[tuple[int, ...]] = [module.kernel_size, module.dilation, module.stride]
        if x.dim() == 3:
            x, sizes = x[:, :, None], [(1, *size) for size in sizes]
        kernel, dilation, stride = sizes
        # (B, C * kernel, positions)
        unfolded = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)
        return unfolded.transpose(1, 2).flatten(0, 1)
