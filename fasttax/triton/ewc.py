"""The Triton kernels of EWC: a list in one launch (tables.py), csrc/math/ewc.h by element.

Bytes per element as csrc/cuda/ewc.cuh has them: every operand once, by 16-byte accesses but for the
last elements of a tensor whose number is no multiple of BLOCK. The penalty's parts, one for each
program, are added in float64 in a fixed order, by a second launch.

What AdamWEWC (ewc_adamw.py) and LoRA (ewc_lora.py) share with it: the loads, the proximal step, the
way of float64 to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.tables import (
    BLOCK,
    PARTS,
    dtype_of,
    elements,
    grouped,
    load,
    operand,
    row_of,
    store,
    sum_kernel,
)

WIDTH = tl.constexpr(7)  # of a row: five addresses, elements, first program
VALUE, ADD, WRITE, PROX = (tl.constexpr(mode) for mode in range(4))
SPLIT_STEP = tl.constexpr(2.0**-7 / 254)
MOST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def prox(theta, anchor, metric, pull):
    """argmin_t metric (t - theta)^2 / 2 + pull (t - anchor)^2 / 2."""
    delta = theta - anchor
    share = 1.0 / (metric + pull)
    return tl.where(
        pull < metric, theta - delta * (pull * share), anchor + delta * (metric * share)
    )


@triton.jit
def timed(first, second, times):
    """The product of three as one of two float32 again; finite, but NaN where `times` is."""
    product = tl.full((), first, tl.float64) * second * times
    second = tl.where(tl.abs(product) > 2.0**127, 2.0**126, 1.0)
    first = product / second
    first = tl.where(first > MOST, MOST, tl.where(first < -MOST, -MOST, first))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT: tl.constexpr):
    """lo_ptr: a split anchor's bytes as int8, anchor_ptr the same as bfloat16."""
    if SPLIT:
        block = at // 256
        place = at % 256
        hi = load(anchor_ptr, block * 384 + place, live)
        lo = load(lo_ptr, block * 768 + 512 + place, live)
        power = (hi.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        anchor = hi + lo * (power * SPLIT_STEP)
    else:
        anchor = load(anchor_ptr, at, live)
    return anchor


@triton.jit
def load_fisher(fisher_ptr, scales_ptr, at, live, U8: tl.constexpr):
    """Floats, or u8log's codes by their block's (lo, step)."""
    if U8:
        code = load(fisher_ptr, at, live)
        lo = load(scales_ptr, at // 256 * 2, live)
        step = load(scales_ptr, at // 256 * 2 + 1, live)
        fisher = tl.where(code == 0.0, 0.0, tl.exp2(lo + step * (code - 1.0)))
    else:
        fisher = load(fisher_ptr, at, live)
    return fisher


@triton.jit
def anchor_pointers(row, column: tl.constexpr, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """What `load_anchor` reads; uint8 is a split anchor, of 3 bytes an element."""
    if DTYPE == tl.uint8:
        hi = operand(row, column, begin // 2 * 3, tl.bfloat16, ALIGNED)
        lo = operand(row, column, begin * 3, tl.int8, ALIGNED)
    else:
        hi = operand(row, column, begin, DTYPE, ALIGNED)
        lo = hi
    return hi, lo


@triton.jit
def part(
    pointers,
    at,
    live,
    first,
    second,
    MODE: tl.constexpr,
    SPLIT: tl.constexpr,
    U8: tl.constexpr,
):
    """BLOCK elements; the penalty's terms."""
    theta_ptr, anchor_ptr, lo_ptr, fisher_ptr, scales_ptr, out_ptr = pointers
    theta = load(theta_ptr, at, live)
    anchor = load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT)
    fisher = load_fisher(fisher_ptr, scales_ptr, at, live, U8)
    pull = fisher * (theta - anchor)
    if MODE == ADD:
        store(out_ptr, at, load(out_ptr, at, live) + pull * first * second, live)
    if MODE == WRITE:
        store(out_ptr, at, pull * first * second, live)
    if MODE == PROX:
        step = fisher * first * second
        store(out_ptr, at, prox(theta, anchor, 1.0, step), live)
    return pull * (theta - anchor)


@triton.jit(do_not_specialize=["rows"])
def ewc_kernel(
    table_ptr,
    parts_ptr,
    times_ptr,
    rows,
    first,
    second,
    MODE: tl.constexpr,
    THETA: tl.constexpr,
    ANCHOR: tl.constexpr,
    FISHER: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: theta, anchor, fisher, scales, and the gradient (ADD, WRITE) or theta itself (PROX).

    times_ptr: one float32 that multiplies first * second, or None.
    """
    program = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table_ptr, rows, program, WIDTH)
    count = elements(row, begin, WIDTH)
    if times_ptr is not None:
        first, second = timed(first, second, tl.load(times_ptr))
    SPLIT: tl.constexpr = ANCHOR == tl.uint8
    U8: tl.constexpr = FISHER == tl.uint8
    anchor_ptr, lo_ptr = anchor_pointers(row, 1, begin, ANCHOR, ALIGNED)
    pointers = (
        operand(row, 0, begin, THETA, ALIGNED),
        anchor_ptr,
        lo_ptr,
        operand(row, 2, begin, FISHER, ALIGNED),
        operand(row, 3, begin // 128, tl.float32, False),
        operand(row, 4, begin, OUT, ALIGNED),
    )
    terms = tl.zeros([BLOCK], tl.float32)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        terms += part(pointers, at, None, first, second, MODE, SPLIT, U8)
    if whole < count:
        at = whole + tl.arange(0, BLOCK)
        live = at < count
        rest = part(pointers, at, live, first, second, MODE, SPLIT, U8)
        terms += tl.where(live, rest, 0.0)
    if (MODE == VALUE) | (MODE == ADD):
        tl.store(parts_ptr + program, tl.sum(terms.to(tl.float64), 0))


# --- what the ops share ------------------------------------------------------------------------


def by_reference(name: str) -> Callable[..., Any]:
    """An op's reference, whatever is registered over it."""
    return getattr(torch.ops.fasttax, f"_reference_{name}")


def float64_by_reference(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, but for float64 and for nothing at all, which the reference takes."""

    @functools.wraps(op)
    def call(*args: Any) -> Any:
        params = next((arg for arg in args if isinstance(arg, (list, tuple))), args[:1])
        if not params or params[0].dtype == torch.float64:
            return by_reference(op.__name__)(*args)
        return op(*args)

    return call


def factors(value: float) -> tuple[float, float]:
    """`value` as a product of two float32, beyond 3e38 too (ewc_step in csrc/math/ewc.h)."""
    second = 1.0
    while abs(value) > 2.0**127 and second < 2.0**126:
        value, second = value / 2, second * 2
    most = torch.finfo(torch.float32).max
    return max(-most, min(most, value)), second


def scalar_of(parts: Tensor, factor: float) -> Tensor:
    """The sum of `parts` times `factor`, float32."""
    out = parts.new_empty((), dtype=torch.float32)
    first, second = factors(factor)
    sum_kernel[(1,)](parts, out, len(parts), first, second, PARTS=PARTS)
    return out


# --- the ops -----------------------------------------------------------------------------------


def _run(
    mode: tl.constexpr,
    lists: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    scale: float = 0.0,
    times: Tensor | None = None,
) -> Tensor:
    """The parts of the sum of fisher (theta - anchor)^2, where the mode has one."""
    params, anchors, fishers = lists
    groups = grouped(
        len(params),
        lambda i: tuple(map(dtype_of, (params[i], anchors[i], fishers[i], outs[i]))),
        lambda i: (params[i], anchors[i], fishers[i], scales[i] if scales else None, outs[i]),
        unaligned=(3,),
    )
    parts = params[0].new_empty(sum(g.programs for g in groups), dtype=torch.float64)
    first, second = factors(scale)
    if times is not None:
        times = times.float()
    done = 0
    with on_device(params[0]):
        for g in groups:
            theta, anchor, fisher, out = g.kind
            if g.programs:
                ewc_kernel[(g.programs,)](
                    g.table(params[0]),
                    parts[done:],
                    times,
                    len(g.rows),
                    first,
                    second,
                    MODE=mode.value,
                    THETA=theta,
                    ANCHOR=anchor,
                    FISHER=fisher,
                    OUT=out,
                    ALIGNED=g.aligned,
                    BLOCK=BLOCK,
                )
            done += g.programs
    return parts


@float64_by_reference
def ewc_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> Tensor:
    """reference.ewc_penalty."""
    parts = _run(VALUE, (params, anchors, fishers), scales, params)
    with on_device(params[0]):
        return scalar_of(parts, strength / 2)


@float64_by_reference
def ewc_penalty_backward(
    grad: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> list[Tensor]:
    """reference.ewc_penalty_backward."""
    out = [torch.empty_like(p) for p in params]
    _run(WRITE, (params, anchors, fishers), scales, out, strength, grad)
    return out


@float64_by_reference
def ewc_add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
    scale: float,
    times: Tensor | None = None,
) -> Tensor:
    """reference.ewc_add_grad_."""
    parts = _run(ADD, (params, anchors, fishers), scales, grads, strength * scale, times)
    with on_device(params[0]):
        return scalar_of(parts, strength / 2)


@float64_by_reference
def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength_times_lr: float,
    times: Tensor | None = None,
) -> None:
    """reference.ewc_prox_."""
    _run(PROX, (params, anchors, fishers), scales, params, strength_times_lr, times)
