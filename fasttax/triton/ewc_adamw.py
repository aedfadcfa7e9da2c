"""The Triton kernel of AdamWEWC: a launch for each tensor of a list, csrc/math/adamw_element.h.

Bytes per element as csrc/cuda/adamw.cuh has them: every operand once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.ewc import (
    BLOCK,
    PROX,
    factors,
    float64_by_reference,
    load,
    load_anchor,
    load_fisher,
    operands,
    prox,
)

# modes, beside PROX: not held, and held by the gradient
PLAIN, GRAD = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def one_less_power(beta, t):
    """1 - beta^t, in float64."""
    return 1.0 - tl.exp2(tl.log2(beta) * t)


@triton.jit
def to_descent(sign, scale_ptr):
    """What makes the stored gradient the one to descend: without a GradScaler's scale."""
    if scale_ptr is not None:
        return sign / tl.load(scale_ptr).to(tl.float32)
    return sign


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
        unbias1 = one_less_power(b1, t)
        unbias2 = one_less_power(b2, t)
        theta = load(theta_ptr, at, live)
        grad = load(grad_ptr, at, live) * to_descent(sign, scale_ptr)
        m = load(m_ptr, at, live)
        v = load(v_ptr, at, live)
        term = theta - theta
        if MODE != PLAIN:
            anchor = load_anchor(anchor_ptr, lo_ptr, at, live, SPLIT)
            if not FROM_SECOND:
                fisher = load_fisher(fisher_ptr, scales_ptr, at, live, U8)
        if MODE == GRAD:
            if FROM_SECOND:
                before = one_less_power(b2, t - 1.0)
                fisher = v * tl.where(t > 1.0, second_moment / before, 0.0).to(tl.float32)
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
    counts = [triton.cdiv(p.numel(), BLOCK) for p in params]
    parts = params[0].new_zeros(sum(counts), dtype=torch.float64)
    betas = torch.tensor([beta1, beta2], dtype=torch.float64)
    betas = betas.to(params[0].device, non_blocking=True)
    rate = lr.to(params[0].device, torch.float64, non_blocking=True)
    first, second = factors(strength)
    pull = PROX if prox_mode else GRAD
    done = 0
    with on_device(params[0]):
        for i, (theta, count) in enumerate(zip(params, counts, strict=True)):
            held, own = anchors[i].numel() > 0, fishers[i].numel() > 0
            anchor = anchors[i] if held else theta  # a pointer that is not read
            fisher = fishers[i] if own else theta
            if count:
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
                    MODE=(pull if held else PLAIN).value,
                    AMSGRAD=bool(max_exp_avg_sqs),
                    FROM_SECOND=held and not own,
                    BLOCK=BLOCK,
                    **operands(theta, anchor, fisher, scales, i),
                )
            done += count
    taken = 1.0 if found_inf is None else (found_inf == 0).reshape(()).float()
    torch._foreach_add_(list(steps), taken)
    return (strength / 2 * parts.sum()).float()
