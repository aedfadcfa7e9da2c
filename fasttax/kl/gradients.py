"""Gradients that a forward makes while it is at it, held until the backward only scales them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks, waits
from fasttax._base.library import define, no_second_derivative
from fasttax._base.modes import compiling, transforming
from fasttax._base.optional import given

NO_GRAD = "nothing requires grad"
FLOAT16 = "a float16 gradient would underflow before a GradScaler's factor reaches it"


def obstacle_to_gradients(
    tensors: Sequence[Tensor | None], weight: Tensor | None, stateless: bool = False
) -> str:
    """Why a forward can't write the gradients of `tensors` while it is at it; "" where it can.

    float16 gradients would underflow before a GradScaler's factor reaches them; torch.compile and
    torch.func want ops without state (`stateless`: there is one).
    """
    given = [t for t in tensors if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
        return NO_GRAD
    if any(t.dtype == torch.float16 and t.requires_grad for t in given):
        return FLOAT16
    if weight is not None and weight.requires_grad:
        return "the tokens' weights require grad"
    if transforming() or (compiling() and not stateless):
        return "torch.compile and torch.func want ops without state"
    return ""


def only_needed(gradients: Iterable[Any], needs: Iterable[bool]) -> list[Any]:
    """The gradients with None for those that are not needed, as autograd wants them."""
    return [d if need else None for d, need in zip(gradients, needs, strict=True)]


def hold_gradients(ctx: Any, gradients: Sequence[Tensor | None], token_weight: Tensor) -> None:
    """Keeps a forward's gradients for `held_gradients`."""
    ctx.gradients = list(gradients)
    # a second backward without retain_graph gets autograd's own error
    ctx.save_for_backward(token_weight)


def held_gradients(ctx: Any, op: str, factor: Tensor) -> list[Tensor | None]:
    """The gradients that the forward left, times what came from above.

    Nobody else holds them, so they are multiplied where they lie; where the graph is kept, a copy.

    Args:
        ctx: what `hold_gradients` was given.
        op: the public function.
        factor: one number, or one for each of the gradients' first dimension.
    """
    checks.no_tangent(op, "the gradient of its result", factor)
    ctx.saved_tensors  # noqa: B018  (raises on a freed graph)
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    gradients = ctx.gradients
    if not keep:
        ctx.gradients = None
    scaled = [given(d, lambda d: _scaled(d, factor.detach(), keep)) for d in gradients]
    return no_second_derivative(scaled, op)


def _scaled(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """Gradient * factor; over `gradient` unless it is to be kept."""
    if transforming():  # torch.func's batches of factors
        return gradient * factor.reshape(*factor.shape, *[1] * (gradient.dim() - factor.dim()))
    if keep or not gradient.is_contiguous():
        gradient = gradient.clone(memory_format=torch.contiguous_format)
    scale = torch.ops.fasttax.scale_held_ if waits.waits(factor) else reference.scale_held_
    scale(gradient, factor.contiguous())
    return gradient


# On a GPU the factor is read on the device: a launch that goes over nothing where it is 1, and no
# host sync to learn so.
define(
    "scale_held_(Tensor(a!) held, Tensor factor) -> ()",
    reference.scale_held_,
    lambda held, factor: None,
)
