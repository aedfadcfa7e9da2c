"""The end of the functions of tokens, and gradients that a forward has left: csrc/cuda/weigh.cuh.

One launch for all results of a call; a few numbers a token, whose estimates are in float64. float64
values, which are there for gradcheck, are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax import reference
from fasttax.reference.weigh import K1, K2, MEAN, NONE
from fasttax.triton import on_device

BLOCK = 1024  # tokens
WARPS = 8  # 4 tokens a thread, whose doubles stay in registers
ENTRIES = 4096  # of a gradient, that a program takes at a time
PROGRAMS_PER_SM = 8
IS_K1, IS_K2 = tl.constexpr(K1), tl.constexpr(K2)
MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def unmasked(mask_ptr, n, BLOCK: tl.constexpr):
    """What a mean divides by: the tokens that count, at least 1."""
    count = tl.full((), 0, tl.int32) + n
    if mask_ptr is not None:
        total = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, n, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            total += (tl.load(mask_ptr + at, mask=at < n, other=0) != 0).to(tl.int32)
        count = tl.sum(total, 0)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def counted(mask_ptr, at, n):
    """Whether a token is one that counts."""
    live = at < n
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + at, mask=live, other=0) != 0)
    return live


@triton.jit
def factors(weight_ptr, scale, at, live):
    """What a token's value is multiplied by, without a mean's divisor."""
    by = tl.zeros(at.shape, tl.float32) + scale
    if weight_ptr is not None:
        by = by * tl.load(weight_ptr + at, mask=live, other=0.0)
    return by


@triton.jit
def log_ratio(lp, lq):
    """The log-ratio lp - lq, and whether both are impossible: then it is 0, and has no slope."""
    lost = (lp == float("-inf")) & (lq == float("-inf"))
    return tl.where(lost, 0.0, lp - lq), lost


@triton.jit
def unweighed(r, clip, top, KIND: tl.constexpr):
    """K1, K2 or K3 of the log-ratio, and its slope."""
    if KIND == IS_K1:
        return -r, tl.full(r.shape, -1.0, tl.float64)
    if KIND == IS_K2:
        return r * r * 0.5, r
    far = r > clip
    e = tl.exp(tl.where(far, clip, r))
    series = r * r * (0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120))))
    value = tl.where(tl.abs(r) < 0.01, series, e - 1 - r)
    value = tl.where(far, (top - 1) * (r - clip) + (top - 1 - clip), value)
    near = r * (1 + r * (0.5 + r * (1.0 / 6)))
    return value, tl.where(tl.abs(r) < 1e-4, near, e - 1)


@triton.jit
def estimated(rows, at, live, clip, top, KIND: tl.constexpr, PAIR: tl.constexpr):
    """(value, log-ratio, importance ratio, slopes by the log-probs): fasttax/reference/weigh.py."""
    logp = tl.load(rows[PAIR[0]] + at, mask=live, other=0.0).to(tl.float64)
    ref_logp = tl.load(rows[PAIR[1]] + at, mask=live, other=0.0).to(tl.float64)
    r, lost = log_ratio(ref_logp, logp)
    ratio = tl.full(at.shape, 1.0, tl.float64)
    by_old = tl.zeros(at.shape, tl.float64)
    if len(PAIR) == 3:
        old_logp = tl.load(rows[PAIR[2]] + at, mask=live, other=0.0).to(tl.float64)
        x, unchanged = log_ratio(logp, old_logp)
        # of float32, below whose least number a ratio counts nothing
        ratio = tl.exp(tl.where(x > clip, clip, x)).to(tl.float32).to(tl.float64)
        ratio = tl.where(x > clip, top * (1 + (x - clip)), ratio)
        ratio = tl.where(x != x, x, ratio)
        r = tl.where(ratio == 0, 0.0, r)
    value, slope = unweighed(r, clip, top, KIND)
    by_ref = tl.where(lost | (ratio == 0), 0.0, ratio * slope)
    if len(PAIR) == 3:
        by_old = tl.where(unchanged | (ratio == 0), 0.0, tl.where(ratio > top, top, ratio) * value)
    return ratio * value, -ratio * r, by_old - by_ref, by_ref, -by_old, logp


@triton.jit
def value_of(rows, at, live, clip, top, OUTPUT: tl.constexpr, PAIR: tl.constexpr):
    """A result of every token, unweighed."""
    if OUTPUT >= 0:
        return tl.load(rows[OUTPUT] + at, mask=live, other=0.0)
    return estimated(rows, at, live, clip, top, OUTPUT, PAIR)[0].to(tl.float32)


@triton.jit
def tokens_kernel(
    rows,
    results,
    mask_ptr,
    weight_ptr,
    n,
    scale,
    clip,
    top,
    OUTPUTS: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: tokens."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = counted(mask_ptr, at, n)
    by = factors(weight_ptr, scale, at, live)
    for k in tl.static_range(len(OUTPUTS)):
        value = value_of(rows, at, live, clip, top, OUTPUTS[k], PAIR)
        tl.store(results[k] + at, tl.where(live, value * by, 0.0), mask=at < n)


@triton.jit
def sums_kernel(
    rows,
    results,
    mask_ptr,
    weight_ptr,
    n,
    scale,
    clip,
    top,
    OUTPUTS: tl.constexpr,
    PAIR: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: 1."""
    divisor = 1.0
    if MEAN:
        divisor = unmasked(mask_ptr, n, BLOCK)
    for k in tl.static_range(len(OUTPUTS)):
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, n, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            live = counted(mask_ptr, at, n)
            by = factors(weight_ptr, scale, at, live)
            value = value_of(rows, at, live, clip, top, OUTPUTS[k], PAIR)
            total += tl.where(live, value.to(tl.float64) * by, 0.0)
        tl.store(results[k], (tl.sum(total, 0) / divisor).to(tl.float32))


@triton.jit
def weights_kernel(
    by_token_ptr, mask_ptr, weight_ptr, n, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: tokens."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    if weight_ptr is not None:  # without one a masked token has the others'
        live = counted(mask_ptr, at, n)
    by = factors(weight_ptr, scale, at, live)
    if MEAN:
        by = by / unmasked(mask_ptr, n, BLOCK)
    tl.store(by_token_ptr + at, tl.where(live, by, 0.0), mask=at < n)


@triton.jit
def of_estimate(of, upstream, row: tl.constexpr, PAIR: tl.constexpr, REVERSE: tl.constexpr):
    """What a row has of the gradient of `estimated`; nothing of a token without one."""
    d = tl.zeros(upstream.shape, tl.float32)
    for place in tl.static_range(len(PAIR)):
        if PAIR[place] == row:
            slope = of[2 + place]
            if REVERSE:
                slope = reverse_slope(of, place)
            slope = slope.to(tl.float32)
            skip = (upstream == 0) | (slope == 0)
            d = tl.where(skip, 0.0, upstream * slope)
    return d


@triton.jit
def reverse_slope(of, place: tl.constexpr):
    """That of KL(policy || ref) by a log-prob, finite."""
    if place != 0:
        return tl.zeros(of[1].shape, tl.float64)
    slope = tl.where(of[5] == float("-inf"), 0.0, of[1])
    slope = tl.where(slope > MOST, MOST, slope)
    return tl.where(slope < -MOST, -MOST, slope)


@triton.jit
def backward_kernel(
    rows,
    grads,
    mask_ptr,
    weight_ptr,
    by_row_ptr,
    n,
    scale,
    clip,
    top,
    OUTPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    PAIR: tl.constexpr,
    MEAN: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: tokens. OUTPUTS are those that have a gradient, which goes on by its STEP a token."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = counted(mask_ptr, at, n)
    by = factors(weight_ptr, scale, at, live)
    if MEAN:
        by = by / unmasked(mask_ptr, n, BLOCK)
    for row in tl.static_range(len(rows)):
        d = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(len(OUTPUTS)):
            upstream = by * tl.load(grads[k] + at * STEPS[k], mask=live, other=0.0)
            if OUTPUTS[k] == row:
                d += upstream
            if OUTPUTS[k] < 0:
                of = estimated(rows, at, live, clip, top, OUTPUTS[k], PAIR)
                d += of_estimate(of, upstream, row, PAIR, REVERSE)
        here = by_row_ptr + tl.full((), row, tl.int64) * n + at
        tl.store(here, tl.where(live, d, 0.0), mask=at < n)


@triton.jit
def scale_kernel(held_ptr, factor_ptr, rows, width, ENTRIES: tl.constexpr):
    """Grid: some programs, that take items in turn; an item whose factor is 1 is not read."""
    chunks = (width + ENTRIES - 1) // ENTRIES
    for item in range(tl.program_id(0), rows * chunks, tl.num_programs(0)):
        row = (item // chunks).to(tl.int64)
        by = tl.load(factor_ptr + row)
        if by != 1:
            at = (item % chunks) * ENTRIES + tl.arange(0, ENTRIES)
            here = held_ptr + row * width + at
            x = tl.load(here, mask=at < width, other=0.0).to(tl.float32)
            tl.store(here, (x * by.to(tl.float32)).to(held_ptr.dtype.element_ty), mask=at < width)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK),)


def _rows(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(row for value in values for row in value.unbind(0))


def token_weights(
    like: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: int, scale: float
) -> Tensor:
    """As reference.token_weights."""
    if like.dtype == torch.float64:
        return reference.token_weights(like, mask, weight, reduction, scale)
    by_token, n = like.new_empty(like.shape), like.numel()
    if n:
        with on_device(like):
            weights_kernel[_grid(n)](
                by_token,
                mask,
                weight,
                n,
                scale,
                MEAN=reduction == MEAN,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return by_token


def weigh_tokens(
    values: Sequence[Tensor],
    outputs: Sequence[int],
    pair: Sequence[int],
    mask: Tensor | None,
    weight: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    """As reference.weigh_tokens."""
    reduction, scale, clip, _ = options
    rows = _rows(values)
    if rows[0].dtype == torch.float64:
        return reference.weigh_tokens(values, outputs, pair, mask, weight, *options)
    shape = rows[0].shape if reduction == NONE else ()
    results, n = [rows[0].new_empty(shape) for _ in outputs], rows[0].numel()
    numbers = (n, scale, clip, math.exp(clip))
    meta = {"OUTPUTS": tuple(outputs), "PAIR": tuple(pair), "BLOCK": BLOCK, "num_warps": WARPS}
    with on_device(rows[0]):
        if reduction != NONE:
            mean = reduction == MEAN
            sums_kernel[(1,)](rows, tuple(results), mask, weight, *numbers, MEAN=mean, **meta)
        elif n:
            tokens_kernel[_grid(n)](rows, tuple(results), mask, weight, *numbers, **meta)
    return results


def weigh_tokens_backward(
    grads: Sequence[Tensor],
    which: Sequence[int],
    values: Sequence[Tensor],
    outputs: Sequence[int],
    pair: Sequence[int],
    mask: Tensor | None,
    weight: Tensor | None,
    *options: Any,
) -> Tensor:
    """As reference.weigh_tokens_backward."""
    reduction, scale, clip, reverse = options
    rows = _rows(values)
    if rows[0].dtype == torch.float64:
        return reference.weigh_tokens_backward(
            grads, which, values, outputs, pair, mask, weight, *options
        )
    by_row, n = rows[0].new_empty((len(rows), *rows[0].shape)), rows[0].numel()
    # of a sum, a gradient is one number, expanded
    steps = tuple(int(any(grad.stride()) and grad.numel() > 1) for grad in grads)
    given = tuple(
        grad.contiguous() if step else grad for grad, step in zip(grads, steps, strict=True)
    )
    if n:
        with on_device(rows[0]):
            backward_kernel[_grid(n)](
                rows,
                given,
                mask,
                weight,
                by_row,
                n,
                scale,
                clip,
                math.exp(clip),
                OUTPUTS=tuple(outputs[i] for i in which),
                STEPS=steps,
                PAIR=tuple(pair),
                MEAN=reduction == MEAN,
                REVERSE=reverse,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return by_row


def scale_held_(held: Tensor, factor: Tensor) -> None:
    """As reference.scale_held_."""
    if held.dtype == torch.float64:
        reference.scale_held_(held, factor)
        return
    if held.numel() == 0:
        return
    rows, width = factor.numel(), held.numel() // factor.numel()
    programs = 4 * PROGRAMS_PER_SM  # of the interpreter
    if held.is_cuda:
        of = torch.cuda.get_device_properties(held.device)
        programs = int(of.multi_processor_count) * PROGRAMS_PER_SM
    with on_device(held):
        scale_kernel[(min(programs, rows * triton.cdiv(width, ENTRIES)),)](
            held, factor, rows, width, ENTRIES=ENTRIES
        )
