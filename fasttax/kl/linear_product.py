"""A head's logits as a differentiable product of the operands that the linear ops multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base.library import no_second_derivative
from fasttax._base.optional import given
from fasttax.kl.linear_sweep import Projection

NOTHING = (False, False, False)


def linear_head(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gemm_dtype: torch.dtype | None
) -> Projection:
    """A head as it is multiplied, to be shared by many `linear_logits`."""
    nothing, bias = weight.detach().new_empty((0, weight.shape[1])), given(bias, Tensor.detach)
    return Projection(nothing, weight.detach(), bias, NOTHING, dtype, gemm_dtype, None)


def linear_logits(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Projection
) -> Tensor:
    """Hidden (N, H) @ weight (V, H)^T + bias, in the dtype that the head sums in.

    Args:
        op: the public function.
        hidden: (N, H).
        weight: (V, H), for its gradient; the head's own is multiplied.
        bias: (V,) or None, for its gradient.
        head: of these.
    """
    logits: Tensor = _Logits.apply(op, hidden, weight, bias, head)
    return logits


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Projection
    ) -> Tensor:
        ctx.op, ctx.head = op, head
        ctx.save_for_backward(hidden, weight, bias)
        model = _model(head, hidden, weight, bias, NOTHING)
        V = weight.shape[0]
        buffer = hidden.new_empty(hidden.shape[0] * V, dtype=head.dtype)
        return model.project(model.hidden, slice(0, V), buffer)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        model = _model(ctx.head, hidden, weight, bias, tuple(ctx.needs_input_grad[1:4]))
        model.begin(all_tokens=True, all_columns=True)
        model.add(slice(0, hidden.shape[0]), slice(0, weight.shape[0]), d_logits)
        return None, *no_second_derivative(model.gradients(), ctx.op), None


def _model(
    head: Projection, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Any
) -> Projection:
    return Projection(hidden, weight, bias, needs, head.dtype, head.gemm_dtype, head)
