"""The ops over logits under torch.func (vmap, grad, vjp, jacrev).

Batching rules, and an autograd.Function that functorch accepts where it refuses an op's registered
autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base.library import lib, second_derivative_message


def register_vmap(
    name: str, tensors: int, first: int = 0, outputs: tuple[int, ...] | None = None
) -> None:
    """Leading dimensions of the ops are free, so one more is all that vmap needs.

    The first `tensors` arguments take it in front (the first of all at `first`), the outputs give
    it at `outputs` (None: the gradients of a backward op, which may be left out).
    """
    backward = outputs is None
    # leading strides are free; the others must be contiguous
    logits = (1, 2) if backward else (0, 1)

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        moved = []
        for i, (value, dim) in enumerate(zip(args[:tensors], dims[:tensors], strict=True)):
            if value is not None:
                value = (
                    value.expand(info.batch_size, *value.shape)
                    if dim is None
                    else value.movedim(dim, 0)
                )
                value = (
                    value
                    if i in logits
                    else (value.movedim(0, first) if i == 0 else value).contiguous()
                )
            moved.append(value)
        results = getattr(torch.ops.fasttax, name)(*moved, *args[tensors:])
        return results, tuple(
            0 if need else None for need in args[-2:]
        ) if outputs is None else outputs

    torch.library.register_vmap(f"fasttax::{name}", rule, lib=lib)


class _Backward(torch.autograd.Function):
    """The op `name`_backward: torch.func always asks for a graph of it, and only using that graph
    is an error.
    """

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
        values, stats = getattr(torch.ops.fasttax, name)(*tensors, *options)
        return values, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, d_values: Tensor, d_stats: Tensor) -> Any:
        tensors = ctx.saved_tensors
        d_logits, d_ref = _Backward.apply(d_values.contiguous(), ctx.name, ctx.options, *tensors)
        return (
            None,
            None,
            d_logits,
            None if tensors[1] is None else d_ref,
            *[None] * (len(tensors) - 3),
        )


def differentiable(
    name: str, options: tuple[Any, ...], *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(values, stats) of the op `name` on (logits, ref_logits, ...), for code that torch.func
    transforms.
    """
    values, stats = _Differentiable.apply(name, options, *tensors)
    return values, stats
