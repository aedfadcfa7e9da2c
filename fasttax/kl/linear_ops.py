"""The linear ops: schemas, shapes, autograd, over `Sweep`.

As ops, torch.compile and checkpointing take any number of tokens whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax._base.interrupts import surfaced
from fasttax._base.library import (
    define,
    lib,
    no_double_backward,
    no_second_derivative,
    second_derivative_message,
)
from fasttax._base.modes import transforming, without_autocast
from fasttax.kl.gradients import only_needed
from fasttax.kl.linear_sweep import SCHEMA, Inputs, Sweep, empty_saved
from fasttax.reference.numbers import empty_gradient
from fasttax.reference.rows import LINEAR

NAMES = "linear_token_kl or linear_token_logprobs"
OF_RESULT = "the gradient of its result"
TENSORS = 6  # of the inputs: those with gradients
# what a Sweep calls
FORWARD = ("token_kl", "token_stats")
BACKWARD = ("token_kl_backward_", "token_stats_backward")


def _gradients(sweep: Sweep, like: Tensor) -> tuple[Tensor, ...]:
    """As an op gives them: those not needed are empty."""
    return tuple(like.new_empty(0) if d is None else d for d in sweep.gradients())


def _gradients_fake(
    like: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(0) if t is None else empty_gradient(t, need)
        for t, need in zip(tensors, needs, strict=True)
    )


# the rows of every tile of the vocabulary and every token


def _rows(*args: Any) -> tuple[Tensor, ...]:
    """(rows (8, tiles, N), what the backward wants of them)."""
    with without_autocast(args[0].device):
        sweep = Sweep(Inputs.of_args(args))
        sweep.run(None)
        return sweep.results()


def _rows_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, _, _, _, asked = Inputs.of_args(args)
    shape = (len(LINEAR), asked.tiles(tensors.weight.shape[0]), tensors.hidden.shape[0])
    rows = tensors.hidden.new_empty(shape, dtype=tensors.dtype)
    return rows, *empty_saved(rows, asked)


def _rows_backward(
    d_rows: Tensor, kl_saved: Tensor, saved: Tensor, ref_saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Gradients of sum(d_rows * rows) by `Tensors`; those not needed are empty."""
    with without_autocast(d_rows.device):
        sweep = Sweep(Inputs.of_args(args[:-1]), needs=args[-1])
        sweep.resume((kl_saved, saved, ref_saved)).run(d_rows, fresh=False)
        return _gradients(sweep, d_rows)


def _rows_backward_fake(
    d_rows: Tensor, kl_saved: Tensor, saved: Tensor, ref_saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _gradients_fake(d_rows, args[:TENSORS], args[-1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # zeros for what is saved, which has no gradient
    tensors = TENSORS + 2  # and ids, mask
    ctx.rest = inputs[tensors:]
    ctx.save_for_backward(*inputs[:tensors], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


@surfaced
def _backward(ctx: Any, d_rows: Tensor | None, *others: Any) -> Any:
    if d_rows is None:
        return (None,) * (TENSORS + 2 + len(ctx.rest))
    checks.no_tangent(NAMES, OF_RESULT, d_rows)
    tensors, needs = TENSORS + 2, list(ctx.needs_input_grad[:TENSORS])
    both = ctx.saved_tensors  # read once: checkpointing unpacks each of them but once
    inputs, saved = both[:tensors], both[tensors:]
    op = torch.ops.fasttax.linear_token_rows_backward
    backward = _RowsBackward.apply if transforming() else op
    gradients = backward(d_rows, *saved, *inputs, *ctx.rest, needs)
    return *only_needed(gradients, needs), None, None, *[None] * len(ctx.rest)


class _RowsBackward(torch.autograd.Function):
    """The backward op, whose graph is an error to use: torch.func always asks for one."""

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


def linear_token_rows(inputs: Inputs) -> Tensor:
    """Rows (8, tiles, N) of every tile of the vocabulary and every token, differentiable."""
    op = _Rows.apply if transforming() else torch.ops.fasttax.linear_token_rows
    rows: Tensor = op(*inputs.args())[0]
    return rows


# the weighted sum of one row, whose op leaves the gradients beside it


def _total(by_token: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(sum(by_token * rows[row]), its gradients by `Tensors`); those not needed are empty."""
    *inputs, row, needs = args
    with without_autocast(by_token.device):
        sweep = Sweep(Inputs.of_args(inputs), needs)
        d_rows = by_token.new_zeros((len(LINEAR), 1, by_token.shape[0]))
        d_rows[row, 0] = by_token
        sweep.run(d_rows)
        total = (sweep.results()[0][row, 0] * by_token).sum()
        return total, *_gradients(sweep, by_token)


def _total_fake(by_token: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return by_token.new_empty(()), *_gradients_fake(by_token, args[:TENSORS], args[-1])


def _setup_total(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.needs, ctx.others = inputs[-1], len(inputs) - 1 - TENSORS
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_total(ctx: Any, d_total: Tensor, *others: Any) -> Any:
    checks.no_tangent(NAMES, OF_RESULT, d_total)
    needed = only_needed(ctx.saved_tensors, ctx.needs)
    gradients = [d if d is None else d * d_total for d in needed]
    return None, *no_second_derivative(gradients, NAMES), *[None] * ctx.others


def linear_token_total(by_token: Tensor, inputs: Inputs, row: int) -> Tensor:
    """sum(by_token * rows[row]) by whole rows, with the gradients made in the forward.

    For code that torch.compile traces.
    """
    needs = [t is not None and t.requires_grad for t in inputs.tensors]
    total: Tensor = torch.ops.fasttax.linear_token_total(by_token, *inputs.args(), row, needs)[0]
    return total


define(
    f"linear_token_rows({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _rows,
    _rows_fake,
    FORWARD,
)
define(
    "linear_token_rows_backward(Tensor d_rows, Tensor kl_saved, Tensor saved, Tensor ref_saved, "
    f"{SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_backward_fake,
    BACKWARD,
)
torch.library.register_autograd(
    "fasttax::linear_token_rows", _backward, setup_context=_setup, lib=lib
)
no_double_backward("linear_token_rows_backward", NAMES)
define(
    f"linear_token_total(Tensor by_token, {SCHEMA}, int row, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _total,
    _total_fake,
    (*FORWARD, "token_kl_grad", *BACKWARD),
)
torch.library.register_autograd(
    "fasttax::linear_token_total", _backward_total, setup_context=_setup_total, lib=lib
)
