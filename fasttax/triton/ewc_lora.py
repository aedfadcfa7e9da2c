"""The Triton kernels of EWC on LoRA: tiles of B A weighed by F, no dense B A in memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.ewc import by_reference, float64_by_reference, load_fisher


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


@float64_by_reference
def lora_ewc_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    fisher: Tensor,
    scales: Tensor,
    scale: float,
    strength: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.lora_ewc_penalty."""
    if not fisher.numel():
        reference = by_reference("lora_ewc_penalty")
        return reference(lora_A, lora_B, fisher, scales, scale, strength, gradient)
    r, width = lora_A.shape
    out = lora_B.shape[0]
    meta: dict[str, Any] = {
        "U8": fisher.dtype == torch.uint8,
        "R": max(16, triton.next_power_of_2(r)),
        "ROWS": 32,
        "COLS": 64,
    }
    shapes = (lora_A.shape, lora_B.shape) if gradient else ((0, 0), (0, 0))
    d_a, d_b = (lora_A.new_empty(shape, dtype=torch.float32) for shape in shapes)
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
