"""The Triton kernels of AdamWEWC: a list in two launches (tables.py), csrc/math/adamw_element.h.

Bytes per element as csrc/cuda/adamw.cuh has them: every operand once. The second launch counts the
steps, when all programs of the first have read them, and makes the value.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.ewc import (
    PROX,
    anchor_pointers,
    factors,
    float64_by_reference,
    load_anchor,
    load_fisher,
    prox,
    timed,
)
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
    sum_of_parts,
)

# modes, beside PROX: not held, and held by the gradient
PLAIN, GRAD = tl.constexpr(0), tl.constexpr(1)
# of a row: nine addresses, elements, first program
WIDTH, STEP_COLUMN = tl.constexpr(11), tl.constexpr(5)
ROWS = 512  # steps counted at a time


@triton.jit
def one_less_power(beta, t):
    """1 - beta^t, in float64."""
    return 1.0 - tl.exp2(tl.log2(beta) * t)


@triton.jit
def wide(pair):
    """A float64 that comes as a float32 and what is left of it: 48 bits."""
    return tl.full((), pair[0], tl.float64) + tl.full((), pair[1], tl.float64)


@triton.jit
def skipped(inf_ptr):
    """Whether a GradScaler's found_inf leaves the step out."""
    skip = False
    if inf_ptr is not None:
        skip = tl.load(inf_ptr) != 0
    return skip


@triton.jit
def adamw_part(
    pointers,
    at,
    live,
    k,
    MODE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    FROM_SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
    U8: tl.constexpr,
):
    """BLOCK elements; the penalty's terms."""
    theta_ptr, grad_ptr, m_ptr, v_ptr, most_ptr, anchor_ptr, lo_ptr, fisher_ptr, scales_ptr = (
        pointers
    )
    descent, decay, rate1, beta2, rate2, step, root_factor, eps, first, second, moment = k
    theta = load(theta_ptr, at, live)
    grad = load(grad_ptr, at, live) * descent
    m = load(m_ptr, at, live)
    v = load(v_ptr, at, live)
    term = theta - theta
    if MODE != PLAIN:
        anchor = load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT)
        if not FROM_SECOND:
            fisher = load_fisher(fisher_ptr, scales_ptr, at, live, U8)
    if MODE == GRAD:
        if FROM_SECOND:
            fisher = v * moment
        pull = fisher * (theta - anchor)
        term = pull * (theta - anchor)
        grad = grad + pull * first * second
    m = m + (grad - m) * rate1
    v = v * beta2 + rate2 * grad * grad
    most = v
    if AMSGRAD:
        most = tl.maximum(load(most_ptr, at, live), v)
        store(most_ptr, at, most, live)
    metric = tl.sqrt(most) * root_factor + eps
    moved = theta * decay - step * m / metric
    if MODE == PROX:
        if FROM_SECOND:
            fisher = v * moment
        term = fisher * (theta - anchor) * (theta - anchor)
        moved = prox(moved, anchor, metric, fisher * first * second)
    store(theta_ptr, at, moved, live)
    store(m_ptr, at, m, live)
    store(v_ptr, at, v, live)
    return term


@triton.jit(do_not_specialize=["rows"])
def adamw_kernel(
    table_ptr,
    parts_ptr,
    lr_ptr,
    scale_ptr,
    inf_ptr,
    rows,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    strength_first,
    strength_second,
    second_moment,
    sign,
    MODE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    FROM_SECOND: tl.constexpr,
    THETA: tl.constexpr,
    GRADS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STEPS: tl.constexpr,
    ANCHOR: tl.constexpr,
    FISHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """csrc/math/adamw_element.h.

    A row: theta, gradient, both moments, the second one's maximum, the step's count, anchor,
    fisher, scales. lr, beta1 and beta2 are pairs (`wide`): a float32 would lose 1 - beta2. lr_ptr,
    scale_ptr and inf_ptr may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    if skipped(inf_ptr):
        tl.store(parts_ptr + program, 0.0)
    else:
        row, begin = row_of(table_ptr, rows, program, WIDTH)
        count = elements(row, begin, WIDTH)
        step_ptr = tl.load(row + STEP_COLUMN).to(tl.pointer_type(STEPS))
        t = tl.load(step_ptr).to(tl.float64) + 1.0
        rate = wide(lr)
        if lr_ptr is not None:
            rate = tl.load(lr_ptr).to(tl.float64)
        descent = sign
        if scale_ptr is not None:
            descent = sign / tl.load(scale_ptr).to(tl.float32)
        b1 = wide(beta1)
        b2 = wide(beta2)
        unbias2 = one_less_power(b2, t)
        first = strength_first
        second = strength_second
        moment = 0.0
        if MODE == PROX:
            first, second = timed(strength_first, strength_second, rate)
            moment = (second_moment / unbias2).to(tl.float32)
        if MODE == GRAD:
            before = one_less_power(b2, t - 1.0)
            moment = tl.where(t > 1.0, second_moment / before, 0.0).to(tl.float32)
        k = (
            descent,
            (1.0 - rate * weight_decay).to(tl.float32),
            (1.0 - b1).to(tl.float32),
            b2.to(tl.float32),
            (1.0 - b2).to(tl.float32),
            (rate / one_less_power(b1, t)).to(tl.float32),
            (1.0 / tl.sqrt(unbias2)).to(tl.float32),
            eps,
            first,
            second,
            moment,
        )
        SPLIT: tl.constexpr = ANCHOR == tl.uint8
        U8: tl.constexpr = FISHER == tl.uint8
        anchor_ptr, lo_ptr = anchor_pointers(row, 6, begin, ANCHOR, ALIGNED)
        pointers = (
            operand(row, 0, begin, THETA, ALIGNED),
            operand(row, 1, begin, GRADS, ALIGNED),
            operand(row, 2, begin, FIRST, ALIGNED),
            operand(row, 3, begin, SECOND, ALIGNED),
            operand(row, 4, begin, SECOND, ALIGNED),
            anchor_ptr,
            lo_ptr,
            operand(row, 7, begin, FISHER, ALIGNED),
            operand(row, 8, begin // 128, tl.float32, False),
        )
        terms = tl.zeros([BLOCK], tl.float32)
        whole = count // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            terms += adamw_part(pointers, at, None, k, MODE, AMSGRAD, FROM_SECOND, SPLIT, U8)
        if whole < count:
            at = whole + tl.arange(0, BLOCK)
            live = at < count
            rest = adamw_part(pointers, at, live, k, MODE, AMSGRAD, FROM_SECOND, SPLIT, U8)
            terms += tl.where(live, rest, 0.0)
        tl.store(parts_ptr + program, tl.sum(terms.to(tl.float64), 0))


@triton.jit(do_not_specialize=["rows", "count"])
def end_kernel(
    table_ptr,
    parts_ptr,
    inf_ptr,
    out_ptr,
    rows,
    count,
    first,
    second,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Counts the steps of a table's tensors; with out_ptr also makes the value. One program."""
    if not skipped(inf_ptr):
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            address = tl.load(table_ptr + row * WIDTH + STEP_COLUMN, mask=row < rows, other=0)
            step_ptr = address.to(tl.pointer_type(STEPS))
            step = tl.load(step_ptr, mask=row < rows, other=0.0)
            tl.store(step_ptr, step + 1.0, mask=row < rows)
    if out_ptr is not None:
        sum_of_parts(parts_ptr, out_ptr, count, first, second, PARTS)


def pair(value: float) -> tuple[float, float]:
    """A float64 as `wide` takes it."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


@float64_by_reference
def ewc_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    prox_mode: bool,
    strength: float,
    second_moment: float,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """reference.ewc_adamw_."""
    pull = (PROX if prox_mode else GRAD).value

    def anchor_of(i: int) -> Tensor | None:
        return anchors[i] if anchors[i].numel() else None

    def fisher_of(i: int) -> Tensor | None:
        return fishers[i] if anchors[i].numel() and fishers[i].numel() else None

    def kind(i: int) -> tuple[Any, ...]:
        anchor, fisher = anchor_of(i), fisher_of(i)
        own = (params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], steps[i])
        read = (t if t is not None else params[i] for t in (anchor, fisher))
        mode = PLAIN.value if anchor is None else pull
        return mode, anchor is not None and fisher is None, *map(dtype_of, (*own, *read))

    def operands(i: int) -> tuple[Tensor | None, ...]:
        most = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        own = (params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], most, steps[i])
        return *own, anchor_of(i), fisher_of(i), scales[i] if scales else None

    groups = grouped(len(params), kind, operands, unaligned=(STEP_COLUMN.value, 8))
    parts = params[0].new_empty(sum(g.programs for g in groups), dtype=torch.float64)
    out = params[0].new_empty((), dtype=torch.float32)
    on_host = lr.device.type == "cpu" and params[0].device.type != "cpu"
    lr_ptr = None if on_host else lr
    first, second = factors(strength)
    done = 0
    with on_device(params[0]):
        for g in groups:
            mode, from_second, theta, grad, m, v, step, anchor, fisher = g.kind
            table = g.table(params[0])
            if g.programs:
                adamw_kernel[(g.programs,)](
                    table,
                    parts[done:],
                    lr_ptr,
                    grad_scale,
                    found_inf,
                    len(g.rows),
                    pair(float(lr) if on_host else 0.0),
                    pair(beta1),
                    pair(beta2),
                    eps,
                    weight_decay,
                    first,
                    second,
                    second_moment,
                    -1.0 if maximize else 1.0,
                    MODE=mode,
                    AMSGRAD=bool(max_exp_avg_sqs),
                    FROM_SECOND=from_second,
                    THETA=theta,
                    GRADS=grad,
                    FIRST=m,
                    SECOND=v,
                    STEPS=step,
                    ANCHOR=anchor,
                    FISHER=fisher,
                    ALIGNED=g.aligned,
                    BLOCK=BLOCK,
                )
            done += g.programs
            half = factors(strength / 2)
            last = g is groups[-1]
            end_kernel[(1,)](
                table,
                parts,
                found_inf,
                out if last else None,
                len(g.rows),
                done,
                *half,
                STEPS=step,
                ROWS=ROWS,
                PARTS=PARTS,
            )
    return out
