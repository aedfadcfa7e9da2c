"""The Triton kernels of EWC: a launch for each tensor of a list, csrc/math/ewc.h by element.

Bytes per element as csrc/cuda/ewc.cuh has them: every operand once. A launch costs 3 to 5 us; where
CUDA C++ is built its tables of pointers take a whole list in a handful of launches instead. The
penalty's parts, one for each program, are added in float64 in a fixed order.

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

# elements a program: with 4 warps 16 a thread, so four 16-byte loads of each float32 operand are
# under way
BLOCK = 2048
VALUE, ADD, WRITE, PROX = (tl.constexpr(mode) for mode in range(4))
SPLIT_STEP = tl.constexpr(2.0**-7 / 254)


@triton.jit
def prox(theta, anchor, metric, pull):
    """argmin_t metric (t - theta)^2 / 2 + pull (t - anchor)^2 / 2."""
    delta = theta - anchor
    share = 1.0 / (metric + pull)
    return tl.where(
        pull < metric, theta - delta * (pull * share), anchor + delta * (metric * share)
    )


@triton.jit
def load(ptr, at, live):
    """Values as float32, 0 where not live."""
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
    """Floats, or u8log's codes by their block's (lo, step)."""
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


def operands(
    theta: Tensor, anchor: Tensor, fisher: Tensor, scales: Sequence[Tensor], i: int
) -> dict[str, Any]:
    """Anchor and Fisher of the i-th parameter as the kernels' arguments, and what they are."""
    split, u8 = anchor.dtype == torch.uint8, fisher.dtype == torch.uint8
    hi, lo = (anchor.view(torch.bfloat16), anchor.view(torch.int8)) if split else (anchor, anchor)
    return {
        "anchor_ptr": hi,
        "lo_ptr": lo,
        "fisher_ptr": fisher,
        "scales_ptr": scales[i] if u8 else theta,
        "SPLIT": split,
        "U8": u8,
    }


# --- the ops -----------------------------------------------------------------------------------


def _run(
    mode: tl.constexpr,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    scale: float = 0.0,
    upstream: Tensor | None = None,
) -> Tensor:
    """The sum of fisher (theta - anchor)^2, where the mode has one."""
    counts = [triton.cdiv(p.numel(), BLOCK) for p in params]
    parts = params[0].new_zeros(sum(counts), dtype=torch.float64)
    first, second = factors(scale)
    done = 0
    with on_device(params[0]):
        for i, (theta, out, count) in enumerate(zip(params, outs, counts, strict=True)):
            if count:
                ewc_kernel[(count,)](
                    theta,
                    out_ptr=out,
                    parts_ptr=parts[done:],
                    upstream_ptr=theta if upstream is None else upstream,
                    n=theta.numel(),
                    first=first,
                    second=second,
                    MODE=mode.value,
                    BLOCK=BLOCK,
                    **operands(theta, anchors[i], fishers[i], scales, i),
                )
            done += count
    return parts.sum()


@float64_by_reference
def ewc_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> Tensor:
    """reference.ewc_penalty."""
    return (strength / 2 * _run(VALUE, params, anchors, fishers, scales, params)).float()


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
    _run(WRITE, params, anchors, fishers, scales, out, strength, grad)
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
) -> Tensor:
    """reference.ewc_add_grad_."""
    total = _run(ADD, params, anchors, fishers, scales, grads, strength * scale)
    return (strength / 2 * total).float()


@float64_by_reference
def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength_times_lr: float,
) -> None:
    """reference.ewc_prox_."""
    _run(PROX, params, anchors, fishers, scales, params, strength_times_lr)
