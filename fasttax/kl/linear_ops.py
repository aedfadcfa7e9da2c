"""The linear ops: schemas, shapes, autograd, over `Sweep`.

As ops, torch.compile and checkpointing take any number of tokens whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax._base.library import define, lib, no_double_backward, second_derivative_message
from fasttax.kl.linear_sweep import ROWS, Sweep, Work, empty_kept, wide_dtype
from fasttax.kl.token_kl import _OPTIONS as KL_OPTIONS
from fasttax.kl.token_kl import Tempering, no_second_derivative

NAMES = "linear_token_kl or linear_token_logprobs"
_TENSORS = "Tensor hidden, Tensor weight, Tensor? ref_hidden, Tensor? ref_weight, Tensor? bias, Tensor? ref_bias, Tensor? ids, Tensor? mask"
_REST = f"{KL_OPTIONS}, bool kl, bool stats, bool pair, int? token_chunk, int? vocab_chunk"


def _sweep(args: Sequence[Any], needs: Sequence[bool] = (False,) * 6) -> Sweep:
    return Sweep(args[:6], args[6], args[7], Tempering(*args[8:17]), Work(*args[17:]), needs)


def _rows(*args: Any) -> tuple[Tensor, ...]:
    """(rows (8, tiles, N), what the backward wants of them)."""
    with torch.autocast(args[0].device.type, enabled=False):
        sweep = _sweep(args)
        sweep.run(None)
        return sweep.results()


def _rows_backward(
    d_rows: Tensor, kl_kept: Tensor, kept: Tensor, ref_kept: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Gradients of sum(d_rows * rows) by hidden, weight, ref_hidden, ref_weight, bias, ref_bias.

    Those not needed are empty.
    """
    with torch.autocast(d_rows.device.type, enabled=False):
        sweep = _sweep(args[:-1], args[-1]).resume((kl_kept, kept, ref_kept))
        sweep.run(d_rows, fresh=False)
        return tuple(d_rows.new_empty(0) if d is None else d for d in sweep.gradients())


def _rows_fake(*args: Any) -> tuple[Tensor, ...]:
    work, V = Work(*args[17:]), args[1].shape[0]
    rows = args[0].new_empty(
        (len(ROWS), -(-V // work.columns(V)), args[0].shape[0]), dtype=wide_dtype(*args[:6])
    )
    return (rows, *empty_kept(rows, work))


def _rows_backward_fake(
    d_rows: Tensor, kl_kept: Tensor, kept: Tensor, ref_kept: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if need else d_rows.new_empty(0)
        for t, need in zip(args[:6], args[-1], strict=True)
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.rest = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_rows: Tensor, *others: Any) -> Any:
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
    backward = (
        _RowsBackward.apply
        if torch._C._are_functorch_transforms_active()
        else torch.ops.fasttax.linear_token_rows_backward
    )
    d = backward(d_rows, *saved[8:], *saved[:8], *ctx.rest, needs)
    return (
        *(g if need else None for g, need in zip(d, needs, strict=True)),
        None,
        None,
        *[None] * len(ctx.rest),
    )


class _RowsBackward(torch.autograd.Function):
    """The backward op: torch.func always asks for a graph of it, and only using that graph is an
    error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fasttax.linear_token_rows_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(NAMES, "its backward"))


class _Rows(torch.autograd.Function):
    """The op for code that torch.func transforms: functorch refuses an op's registered autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fasttax.linear_token_rows(*args)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def linear_token_rows(
    tensors: Sequence[Tensor | None],
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    work: Work,
) -> Tensor:
    """ROWS of every tile of the vocabulary and every token, differentiable by all of `tensors` (as
    in `Sweep`).
    """
    args = (*tensors, ids, mask, *t.args(), *work.args())
    rows: Tensor = (
        _Rows.apply
        if torch._C._are_functorch_transforms_active()
        else torch.ops.fasttax.linear_token_rows
    )(*args)[0]
    return rows


# The weighted sum of one row, whose op leaves the gradients beside it.


def _total(by_token: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(sum(by_token * rows[row]), its gradients by hidden, weight, ref_hidden, ref_weight, bias,
    ref_bias); those not needed are empty.
    """
    row, needs = args[-2:]
    with torch.autocast(by_token.device.type, enabled=False):
        sweep = _sweep(args[:-2], needs)
        d_rows = by_token.new_zeros((len(ROWS), 1, by_token.shape[0]))
        d_rows[row, 0] = by_token
        sweep.run(d_rows)
        total = (sweep.results()[0][row, 0] * by_token).sum()
        return (total, *(by_token.new_empty(0) if d is None else d for d in sweep.gradients()))


def _total_fake(by_token: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (
        by_token.new_empty(()),
        *(
            t.new_empty(t.shape) if need else by_token.new_empty(0)
            for t, need in zip(args[:6], args[-1], strict=True)
        ),
    )


def _setup_total(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.needs, ctx.others = inputs[-1], len(inputs) - 7
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_total(ctx: Any, d_total: Tensor, *others: Any) -> Any:
    gradients = [
        d * d_total if need else None for d, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return (None, *no_second_derivative(gradients, NAMES), *[None] * ctx.others)


def linear_token_total(
    by_token: Tensor,
    tensors: Sequence[Tensor | None],
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    work: Work,
    row: int,
) -> Tensor:
    """sum(by_token * rows[row]) by whole rows, with the gradients made in the forward.

    For code that torch.compile traces.
    """
    needs = [t is not None and t.requires_grad for t in tensors]
    total: Tensor = torch.ops.fasttax.linear_token_total(
        by_token, *tensors, ids, mask, *t.args(), *work.args(), row, needs
    )[0]
    return total


define(
    f"linear_token_rows({_TENSORS}, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)", _rows, _rows_fake
)
define(
    "linear_token_rows_backward(Tensor d_rows, Tensor kl_kept, Tensor kept, Tensor ref_kept, "
    f"{_TENSORS}, {_REST}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_backward_fake,
)
torch.library.register_autograd(
    "fasttax::linear_token_rows", _backward, setup_context=_setup, lib=lib
)
no_double_backward("linear_token_rows_backward", NAMES)
define(
    f"linear_token_total(Tensor by_token, {_TENSORS}, {_REST}, int row, bool[] needs) -> (Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _total,
    _total_fake,
)
torch.library.register_autograd(
    "fasttax::linear_token_total", _backward_total, setup_context=_setup_total, lib=lib
)
