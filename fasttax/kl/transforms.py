"""The ops over logits under torch.func (vmap, grad, vjp, jacrev).

Batching rules, and an autograd.Function that functorch accepts where it refuses an op's registered
autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base.library import lib, second_derivative_message
from fasttax._base.modes import transforming


def register_vmap(
    name: str, tensors: int, first: int = 0, outputs: tuple[int, ...] | None = None
) -> None:
    """Registers how vmap runs the op: leading dimensions are free, so one more is all it needs.

    The first `tensors` arguments take it in front (the first of all at `first`), the outputs give
    it at `outputs` (None: the gradients of a backward op, which may be left out).
    """
    # leading strides of logits are free; other tensors must be contiguous
    logits = (0, 1) if outputs is not None else (1, 2)

    def batched(i: int, value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
        if value is None:
            return None
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        if i in logits:
            return value
        if i == 0:
            value = value.movedim(0, first)
        return value.contiguous()

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        given = enumerate(zip(args[:tensors], dims[:tensors], strict=True))
        moved = [batched(i, value, dim, info.batch_size) for i, (value, dim) in given]
        results = getattr(torch.ops.fasttax, name)(*moved, *args[tensors:])
        if outputs is not None:
            return results, outputs
        return results, tuple(0 if need else None for need in args[-2:])

    torch.library.register_vmap(f"fasttax::{name}", rule, lib=lib)


class _Backward(torch.autograd.Function):
    """The op `name`_backward, whose graph is an error to use: torch.func always asks for one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, name: str, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        has_ref = tensors[1] is not None
        d_logits, d_ref = getattr(torch.ops.fasttax, f"{name}_backward")(
            grad, *tensors, *options, True, has_ref
        )
        return d_logits, d_ref

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(ctx.name, "its backward"))


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values, saved = getattr(torch.ops.fasttax, name)(*tensors, *options)
        return values, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, d_values: Tensor, d_saved: Tensor) -> Any:
        tensors = ctx.saved_tensors
        d_logits, d_ref = _Backward.apply(d_values.contiguous(), ctx.name, ctx.options, *tensors)
        if tensors[1] is None:
            d_ref = None
        return None, None, d_logits, d_ref, *[None] * (len(tensors) - 3)


def run(name: str, options: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
    """The values that op `name` gives of (logits, ref_logits, ...), under torch.func too."""
    if transforming():
        values: Tensor = _Differentiable.apply(name, options, *tensors)[0]
        return values
    values = getattr(torch.ops.fasttax, name)(*tensors, *options)[0]
    return values
