"""Linear layers: the weight's gradient is d^T x, the bias's the sum of d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttax.fisher.passes import Pass, address
from fasttax.fisher.pieces import Piece
from fasttax.fisher.tap import Call, Tap


class LinearTap(Tap):
    """nn.Linear, weight (out, in), and bitsandbytes' subclasses, whose own forward is x W^T too."""

    role = "head"
    linear = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Plain nn.Linear by its forward: a subclass with another one may use the weight freely."""
        if type(module).forward is nn.Linear.forward:
            return True
        return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")

    def tapped(self, call: Call) -> Any:
        """As every tap, and notes whose output lies where: the logits' is the head."""
        out = super().tapped(call)
        call.current.outputs[address(out)] = self
        return out

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """`d` (..., out), x (..., in); of the head of "exact_head" all labels' squares."""
        x, d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])
        if d.dtype in (torch.bfloat16, torch.float16) and x.dtype == torch.float32:
            x = x.to(d.dtype)  # autocast: what the layer multiplied
        if current.score is not None and current.head is self:
            score = current.score.reshape(-1, current.score.shape[-1])
            self.give(current, "bias", Piece("head", bounds, d, None, score))
            self.give(current, "weight", Piece("head", bounds, d, x, score))
        else:
            self.give(current, "bias", Piece("bias", bounds, d))
            self.give(current, "weight", self.weight_piece(bounds, d, x))

    def weight_piece(self, bounds: Tensor, d: Tensor, x: Tensor) -> Piece:
        """(out, in): d^T x."""
        return Piece("linear", bounds, d, x)


class Conv1DTap(LinearTap):
    """transformers' Conv1D, as in GPT-2: a linear layer whose weight is (in, out)."""

    role = ""
    turned = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """By name: transformers need not be installed."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")

    def weight_piece(self, bounds: Tensor, d: Tensor, x: Tensor) -> Piece:
        """(in, out): x^T d."""
        return Piece("linear", bounds, x, d)
