"""The Triton kernels of EWC: a launch for each tensor of a list, csrc/math/ewc.h element by
element.

Bytes per element as csrc/cuda/ewc.cuh and adamw.cuh have them: every operand once. A launch costs 3
to 5 us; where CUDA C++ is built its tables of pointers take a whole list in a handful of launches
instead. The penalty's parts, one for each program, are added in float64 in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device

# elements a program: with 4 warps 16 a thread, so four 16-byte loads of each float32 operand are
# under way
BLOCK = 2048
VALUE, ADD, WRITE, PROX = (tl.constexpr(mode) for mode in range(4))
PLAIN, GRAD = tl.constexpr(0), tl.constexpr(1)  # of AdamW; PROX is the third mode there too
SPLIT_STEP = tl.constexpr(2.0**-7 / 254)


@triton.jit
def prox(theta, anchor, metric, pull):
    delta = theta - anchor
    share = 1.0 / (metric + pull)
    return tl.where(
        pull < metric, theta - delta * (pull * share), anchor + delta * (metric * share)
    )


@triton.jit
def load(ptr, at, live):
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT: tl.constexpr):
    """lo_ptr: a split anchor's bytes as int8, anchor_ptr the same as bfloat16."""
    if SPLIT:
        block = at // 256
        place = at % 256
        hi = load(anchor_ptr, block * 384 + place, live)
        lo = load(lo_ptr, block * 768 + 512 + place, live)
        power = (hi.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return hi + lo * (power * SPLIT_STEP)
    return load(anchor_ptr, at, live)


@triton.jit
def load_fisher(fisher_ptr, scales_ptr, at, live, U8: tl.constexpr):
    if U8:
        code = load(fisher_ptr, at, live)
        lo = load(scales_ptr, at // 256 * 2, live)
        step = load(scales_ptr, at // 256 * 2 + 1, live)
        return tl.where(code == 0.0, 0.0, tl.exp2(lo + step * (code - 1.0)))
    return load(fisher_ptr, at, live)


@triton.jit
def ewc_kernel(
    theta_ptr,
    anchor_ptr,
    lo_ptr,
    fisher_ptr,
    scales_ptr,
    out_ptr,
    parts_ptr,
    upstream_ptr,
    n,
    first,
    second,
    MODE: tl.constexpr,
    SPLIT: tl.constexpr,
    U8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_ptr: the gradient (ADD, WRITE) or theta itself (PROX)."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    theta = load(theta_ptr, at, live)
    anchor = load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT)
    fisher = load_fisher(fisher_ptr, scales_ptr, at, live, U8)
    pull = fisher * (theta - anchor)
    if (MODE == VALUE) | (MODE == ADD):
        tl.store(
            parts_ptr + program,
            tl.sum(tl.where(live, pull * (theta - anchor), 0.0), 0).to(tl.float64),
        )
    if MODE == ADD:
        grad = load(out_ptr, at, live)
        tl.store(
            out_ptr + at, (grad + pull * first * second).to(out_ptr.dtype.element_ty), mask=live
        )
    if MODE == WRITE:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        tl.store(
            out_ptr + at, (pull * first * second * upstream).to(out_ptr.dtype.element_ty), mask=live
        )
    if MODE == PROX:
        tl.store(
            out_ptr + at,
            prox(theta, anchor, 1.0, fisher * first * second).to(out_ptr.dtype.element_ty),
            mask=live,
        )


@triton.jit
def adamw_kernel(
    theta_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    most_ptr,
    step_ptr,
    anchor_ptr,
    lo_ptr,
    fisher_ptr,
    scales_ptr,
    parts_ptr,
    lr_ptr,
    scale_ptr,
    inf_ptr,
    n,
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
    SPLIT: tl.constexpr,
    U8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """csrc/math/adamw_element.h.

    beta1 and beta2 point to float64: a float32 argument would lose 1 - beta2.
    """
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    skip = False
    if inf_ptr is not None:
        skip = tl.load(inf_ptr) != 0
    if skip:
        tl.store(parts_ptr + program, 0.0)
    else:
        t = tl.load(step_ptr).to(tl.float64) + 1.0
        lr = tl.load(lr_ptr).to(tl.float64)
        b1 = tl.load(beta1)
        b2 = tl.load(beta2)
        unbias1 = 1.0 - tl.exp2(tl.log2(b1) * t)
        unbias2 = 1.0 - tl.exp2(tl.log2(b2) * t)
        before2 = 1.0 - tl.exp2(tl.log2(b2) * (t - 1.0))
        factor = sign
        if scale_ptr is not None:
            factor = sign / tl.load(scale_ptr).to(tl.float32)
        theta = load(theta_ptr, at, live)
        grad = load(grad_ptr, at, live) * factor
        m = load(m_ptr, at, live)
        v = load(v_ptr, at, live)
        anchor = theta
        fisher = theta
        term = theta - theta
        if MODE != PLAIN:
            anchor = load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT)
            if FROM_SECOND:
                if MODE == GRAD:
                    fisher = v * tl.where(t > 1.0, second_moment / before2, 0.0).to(tl.float32)
            else:
                fisher = load_fisher(fisher_ptr, scales_ptr, at, live, U8)
        if MODE == GRAD:
            pull = fisher * (theta - anchor)
            term = pull * (theta - anchor)
            grad = grad + pull * strength_first * strength_second
        m = m + (grad - m) * (1.0 - b1).to(tl.float32)
        v = v * b2.to(tl.float32) + (1.0 - b2).to(tl.float32) * grad * grad
        most = v
        if AMSGRAD:
            most = tl.maximum(load(most_ptr, at, live), v)
            tl.store(most_ptr + at, most.to(most_ptr.dtype.element_ty), mask=live)
        metric = tl.sqrt(most) * (1.0 / tl.sqrt(unbias2)).to(tl.float32) + eps
        moved = (
            theta * (1.0 - lr * weight_decay).to(tl.float32)
            - (lr / unbias1).to(tl.float32) * m / metric
        )
        if MODE == PROX:
            if FROM_SECOND:
                fisher = v * (second_moment / unbias2).to(tl.float32)
            term = fisher * (theta - anchor) * (theta - anchor)
            moved = prox(
                moved,
                anchor,
                metric,
                fisher * (lr.to(tl.float32) * strength_first) * strength_second,
            )
        tl.store(theta_ptr + at, moved.to(theta_ptr.dtype.element_ty), mask=live)
        tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=live)
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=live)
        tl.store(parts_ptr + program, tl.sum(tl.where(live, term, 0.0), 0).to(tl.float64))


@triton.jit
def lora_tile(
    a_ptr, b_ptr, fisher_ptr, scales_ptr, o, i, r, out, width, U8: tl.constexpr, R: tl.constexpr
):
    """The rows `o` and columns `i` of F * (B A), with what it is made of."""
    k = tl.arange(0, R)
    b = tl.load(
        b_ptr + o[:, None].to(tl.int64) * r + k[None, :],
        mask=(o[:, None] < out) & (k[None, :] < r),
        other=0.0,
    ).to(tl.float32)
    a = tl.load(
        a_ptr + k[:, None].to(tl.int64) * width + i[None, :],
        mask=(k[:, None] < r) & (i[None, :] < width),
        other=0.0,
    ).to(tl.float32)
    delta = tl.dot(b, a, input_precision="ieee")
    live = (o[:, None] < out) & (i[None, :] < width)
    fisher = load_fisher(
        fisher_ptr, scales_ptr, o[:, None].to(tl.int64) * width + i[None, :], live, U8
    )
    return a, b, delta, fisher * delta


@triton.jit
def lora_rows_kernel(
    a_ptr,
    b_ptr,
    fisher_ptr,
    scales_ptr,
    d_b_ptr,
    parts_ptr,
    factor,
    r,
    out,
    width,
    GRADIENT: tl.constexpr,
    U8: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS rows of F: their part of the value, and d_B of them."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # summed at the end: a product inside a reduction would be fused on one side of each shuffle
    # alone
    total = tl.zeros([ROWS, COLS], tl.float32)
    d_b = tl.zeros([ROWS, R], tl.float32)
    for start in range(0, width, COLS):
        a, _, delta, weighed = lora_tile(
            a_ptr,
            b_ptr,
            fisher_ptr,
            scales_ptr,
            o,
            start + tl.arange(0, COLS),
            r,
            out,
            width,
            U8,
            R,
        )
        total += weighed * delta
        if GRADIENT:
            d_b += tl.dot(weighed, tl.trans(a), input_precision="ieee")
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.sum(total.to(tl.float64), 1), 0))
    if GRADIENT:
        k = tl.arange(0, R)
        tl.store(
            d_b_ptr + o[:, None].to(tl.int64) * r + k[None, :],
            d_b * factor,
            mask=(o[:, None] < out) & (k[None, :] < r),
        )


@triton.jit
def lora_columns_kernel(
    a_ptr,
    b_ptr,
    fisher_ptr,
    scales_ptr,
    d_a_ptr,
    factor,
    r,
    out,
    width,
    U8: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d_A of COLS columns: F is read a second time, so that no two programs add into one place."""
    i = tl.program_id(0) * COLS + tl.arange(0, COLS)
    d_a = tl.zeros([R, COLS], tl.float32)
    for start in range(0, out, ROWS):
        _, b, _, weighed = lora_tile(
            a_ptr,
            b_ptr,
            fisher_ptr,
            scales_ptr,
            start + tl.arange(0, ROWS),
            i,
            r,
            out,
            width,
            U8,
            R,
        )
        d_a += tl.dot(tl.trans(b), weighed, input_precision="ieee")
    k = tl.arange(0, R)
    tl.store(
        d_a_ptr + k[:, None].to(tl.int64) * width + i[None, :],
        d_a * factor,
        mask=(k[:, None] < r) & (i[None, :] < width),
    )


# --- the ops -----------------------------------------------------------------------------------------------------------


def _op(name: str) -> Any:
    return getattr(torch.ops.fasttax, "_reference_" + name)


def _factors(value: float) -> tuple[float, float]:
    """`value` as a product of two float32, beyond 3e38 too (ewc_step in csrc/math/ewc.h)."""
    second = 1.0
    while abs(value) > 2.0**127 and second < 2.0**126:
        value, second = value / 2, second * 2
    most = torch.finfo(torch.float32).max
    return max(-most, min(most, value)), second


def _pieces(
    t: Tensor, anchor: Tensor, fisher: Tensor, scales: Sequence[Tensor], i: int
) -> tuple[dict[str, Any], dict[str, bool]]:
    """The pointers of anchor and Fisher, and what they are."""
    split, u8 = anchor.dtype == torch.uint8, fisher.dtype == torch.uint8
    pointers = {
        "anchor_ptr": anchor.view(torch.bfloat16) if split else anchor,
        "lo_ptr": anchor.view(torch.int8) if split else anchor,
        "fisher_ptr": fisher,
        "scales_ptr": scales[i] if u8 else t,
    }
    return pointers, {"SPLIT": split, "U8": u8}


def _run(
    mode: int,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    scale: float,
    upstream: Tensor | None,
) -> Tensor:
    """The sum of fisher (theta - anchor)^2, where the mode has one."""
    counts = [triton.cdiv(p.numel(), BLOCK) for p in params]
    parts = params[0].new_zeros(sum(counts), dtype=torch.float64)
    first, second = _factors(scale)
    done = 0
    with on_device(params[0]):
        for i, (theta, out, count) in enumerate(zip(params, outs, counts, strict=True)):
            if count:
                pointers, kinds = _pieces(theta, anchors[i], fishers[i], scales, i)
                ewc_kernel[(count,)](
                    theta,
                    out_ptr=out,
                    parts_ptr=parts[done:],
                    upstream_ptr=theta if upstream is None else upstream,
                    n=theta.numel(),
                    first=first,
                    second=second,
                    MODE=mode,
                    BLOCK=BLOCK,
                    **pointers,
                    **kinds,
                )
            done += count
    return parts.sum()


def _wide(params: Sequence[Tensor]) -> bool:
    return not params or params[0].dtype == torch.float64


def ewc_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> Tensor:
    if _wide(params):
        return _op("ewc_penalty")(params, anchors, fishers, scales, strength)
    return (
        strength / 2 * _run(VALUE.value, params, anchors, fishers, scales, params, 0.0, None)
    ).float()


def ewc_penalty_backward(
    grad: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> list[Tensor]:
    if _wide(params):
        return _op("ewc_penalty_backward")(grad, params, anchors, fishers, scales, strength)
    out = [torch.empty_like(p) for p in params]
    _run(WRITE.value, params, anchors, fishers, scales, out, strength, grad)
    return out


def ewc_add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
    scale: float,
) -> Tensor:
    if _wide(params):
        return _op("ewc_add_grad_")(params, grads, anchors, fishers, scales, strength, scale)
    return (
        strength
        / 2
        * _run(ADD.value, params, anchors, fishers, scales, grads, strength * scale, None)
    ).float()


def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength_times_lr: float,
) -> None:
    if _wide(params):
        _op("ewc_prox_")(params, anchors, fishers, scales, strength_times_lr)
    else:
        _run(PROX.value, params, anchors, fishers, scales, params, strength_times_lr, None)


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
    if _wide(params):
        return _op("ewc_adamw_")(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            anchors,
            fishers,
            scales,
            prox_mode,
            strength,
            second_moment,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            maximize,
            grad_scale,
            found_inf,
        )
    counts = [triton.cdiv(p.numel(), BLOCK) for p in params]
    parts = params[0].new_zeros(sum(counts), dtype=torch.float64)
    betas = torch.tensor([beta1, beta2], dtype=torch.float64).to(
        params[0].device, non_blocking=True
    )
    rate = lr.to(params[0].device, torch.float64, non_blocking=True)
    first, second = _factors(strength)
    done = 0
    with on_device(params[0]):
        for i, (theta, count) in enumerate(zip(params, counts, strict=True)):
            held = anchors[i].numel() > 0
            mode = PLAIN.value if not held else PROX.value if prox_mode else GRAD.value
            if count:
                own = fishers[i].numel() > 0
                pointers, kinds = _pieces(
                    theta, anchors[i] if held else theta, fishers[i] if own else theta, scales, i
                )
                adamw_kernel[(count,)](
                    theta,
                    grads[i],
                    exp_avgs[i],
                    exp_avg_sqs[i],
                    max_exp_avg_sqs[i] if max_exp_avg_sqs else theta,
                    steps[i],
                    parts_ptr=parts[done:],
                    lr_ptr=rate,
                    scale_ptr=grad_scale,
                    inf_ptr=found_inf,
                    n=theta.numel(),
                    beta1=betas,
                    beta2=betas[1:],
                    eps=eps,
                    weight_decay=weight_decay,
                    strength_first=first,
                    strength_second=second,
                    second_moment=second_moment,
                    sign=-1.0 if maximize else 1.0,
                    MODE=mode,
                    AMSGRAD=bool(max_exp_avg_sqs),
                    FROM_SECOND=held and not own,
                    BLOCK=BLOCK,
                    **pointers,
                    **kinds,
                )
            done += count
    count_steps = list(steps)
    torch._foreach_add_(count_steps, 1.0)
    if found_inf is not None:
        torch._foreach_sub_(
            count_steps, [(found_inf != 0).reshape(()).to(s.dtype) for s in count_steps]
        )
    return (strength / 2 * parts.sum()).float()


def lora_ewc_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    fisher: Tensor,
    scales: Tensor,
    scale: float,
    strength: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if lora_A.dtype == torch.float64 or not fisher.numel():
        return _op("lora_ewc_penalty")(lora_A, lora_B, fisher, scales, scale, strength, gradient)
    r, width = lora_A.shape
    out = lora_B.shape[0]
    meta: dict[str, Any] = {
        "U8": fisher.dtype == torch.uint8,
        "R": max(16, triton.next_power_of_2(r)),
        "ROWS": 32,
        "COLS": 64,
    }
    d_a, d_b = (
        x.new_empty(x.shape if gradient else (0, 0), dtype=torch.float32) for x in (lora_A, lora_B)
    )
    parts = lora_A.new_zeros(triton.cdiv(out, meta["ROWS"]), dtype=torch.float64)
    factor = strength * scale * scale
    with on_device(lora_A):
        lora_rows_kernel[(len(parts),)](
            lora_A,
            lora_B,
            fisher,
            scales,
            d_b,
            parts,
            factor,
            r,
            out,
            width,
            GRADIENT=gradient,
            **meta,
        )
        if gradient:
            lora_columns_kernel[(triton.cdiv(width, meta["COLS"]),)](
                lora_A, lora_B, fisher, scales, d_a, factor, r, out, width, **meta
            )
    return (factor / 2 * parts.sum()).float(), d_a, d_b
