"""token_kl under torch.func (vmap, grad, vjp, jacrev): batching rules for its ops, and an autograd.Function that functorch accepts
where it refuses an op's registered autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._library import lib, second_derivative_message

_STRIDED = {"token_kl": (0, 1), "token_kl_backward": (1, 2)}  # arguments whose leading strides are free: the logits
_TENSORS = {"token_kl": 3, "token_kl_backward": 5}


def _lead(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The vmapped dimension in front; expanded where this argument has none."""
    if value is None:
        return None
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _register_vmap(name: str) -> None:
    """Leading dimensions of the ops are free, so one more is all that vmap needs."""
    tensors = _TENSORS[name]

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        moved = [_lead(value, dim, info.batch_size) for value, dim in zip(args[:tensors], dims[:tensors], strict=True)]
        moved = [value if value is None or i in _STRIDED[name] else value.contiguous() for i, value in enumerate(moved)]
        return getattr(torch.ops.fasttax, name)(*moved, *args[tensors:]), (0, 0)

    torch.library.register_vmap(f"fasttax::{name}", rule, lib=lib)


class _Backward(torch.autograd.Function):
    """The op token_kl_backward: torch.func always asks for a graph of it, and only using that graph is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        d_logits, d_ref = torch.ops.fasttax.token_kl_backward(grad, logits, ref_logits, mask, stats, *options, True, True)
        return d_logits, d_ref

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message("token_kl", "its backward"))


class FunctionalTokenKL(torch.autograd.Function):
    """(kl, stats) of the op token_kl, for code that torch.func transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        kl, stats = torch.ops.fasttax.token_kl(logits, ref_logits, mask, *options)
        return kl, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, ref_logits, mask, ctx.options = inputs
        ctx.save_for_backward(logits, ref_logits, mask, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, d_kl: Tensor, d_stats: Tensor) -> Any:
        return *_Backward.apply(d_kl.contiguous(), *ctx.saved_tensors, ctx.options), None, None


for _name in _TENSORS:
    _register_vmap(_name)
