"""The Triton kernels of linear_sqgrad: squares of examples' weight gradients, tile by tile.

A program owns a tile of F and runs over examples: the example's gradient tile is gathered by tl.dot
in registers, squared, and added to a second register tile, which joins F every FOLD examples. No
per-example gradient reaches memory, and every sum has one order: deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device


class Tile(NamedTuple):
    """Outputs and inputs of F, tokens at a time, and the warps that do it."""

    outputs: int
    inputs: int
    tokens: int
    warps: int

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """How many tiles F has, inputs first."""
        return triton.cdiv(inputs, self.inputs), triton.cdiv(outputs, self.outputs)


# LARGE loads 32 KB of bfloat16 for 2.1 MFLOP, so that tensor cores wait for nothing; its two
# float32 tiles are 128 registers a thread. SMALL loads twice as much a flop (180 TFLOP/s at most on
# an H100), and makes four times as many programs of a small layer. MIDDLE is LARGE for what spills
# there (sm_120), BRIEF is SMALL for FMAs on sm_80; SINGLE is of single_kernel.
LARGE, LARGE_TF32, MIDDLE = Tile(128, 128, 64, 8), Tile(128, 128, 32, 8), Tile(128, 64, 64, 8)
SMALL, BRIEF, SINGLE = Tile(64, 64, 32, 4), Tile(64, 64, 16, 4), Tile(64, 64, 16, 8)
FOLD = 512  # examples whose squares meet before they join the others'


@triton.jit
def block_of(ptr, stride, t, live_t, at, live, WIDE: tl.constexpr):
    """[token, feature] of an operand, 0 outside; as float32 where WIDE."""
    x = tl.load(
        ptr + t[:, None].to(tl.int64) * stride + at[None, :],
        mask=live_t[:, None] & live[None, :],
        other=0.0,
    )
    return x.to(tl.float32) if WIDE else x


@triton.jit
def turned_block_of(ptr, stride, t, live_t, at, live, WIDE: tl.constexpr):
    """[feature, token]: loaded so, and not turned later, it goes to shared memory by cp.async."""
    x = tl.load(
        ptr + t[None, :].to(tl.int64) * stride + at[:, None],
        mask=live_t[None, :] & live[:, None],
        other=0.0,
    )
    return x.to(tl.float32) if WIDE else x


@triton.jit
def add_tile(out_ptr, part, at_o, at_i, outputs, inputs):
    """Adds a tile to F; its addresses, kept over a loop, would be 128 registers."""
    to = out_ptr + at_o[:, None].to(tl.int64) * inputs + at_i[None, :]
    live = (at_o < outputs)[:, None] & (at_i < inputs)[None, :]
    tl.store(to, tl.load(to, mask=live, other=0.0) + part, mask=live)


@triton.jit
def linear_kernel(
    out_ptr,
    a_ptr,
    d_ptr,
    cu_ptr,
    weight_ptr,
    ragged_ptr,
    examples,
    inputs,
    outputs,
    a_stride,
    d_stride,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_T: tl.constexpr,
    FOLD: tl.constexpr,
):
    """out[o, i] += sum_n w_n (sum_t d[t, o] a[t, i])^2.

    ragged_ptr: 0 leaves it all to `single_kernel`; None does not.

    Products of bfloat16 or float16 operands are exact, on tensor cores, and their sums float32;
    those of float32 operands (WIDE: of operands of two dtypes) are float32's for PRECISION "ieee",
    by FMAs, and TF32's, on tensor cores, for "tf32".
    """
    mine = True
    if ragged_ptr is not None:
        mine = tl.load(ragged_ptr) != 0
    if mine:
        at_o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
        at_i = tl.program_id(0) * TILE_I + tl.arange(0, TILE_I)
        live_o, live_i = at_o < outputs, at_i < inputs
        begin = tl.load(cu_ptr).to(tl.int32)
        for first in range(0, examples, FOLD):
            part = tl.zeros([TILE_O, TILE_I], tl.float32)
            for n in range(first, tl.minimum(first + FOLD, examples)):
                end = tl.load(cu_ptr + n + 1).to(tl.int32)
                gradient = tl.zeros([TILE_O, TILE_I], tl.float32)
                for start in range(begin, end, TILE_T):
                    t = start + tl.arange(0, TILE_T)
                    live_t = t < end
                    if PRECISION == "ieee" and (WIDE or d_ptr.dtype.element_ty == tl.float32):
                        d = tl.trans(block_of(d_ptr, d_stride, t, live_t, at_o, live_o, WIDE))
                    else:
                        d = turned_block_of(d_ptr, d_stride, t, live_t, at_o, live_o, WIDE)
                    a = block_of(a_ptr, a_stride, t, live_t, at_i, live_i, WIDE)
                    gradient = tl.dot(d, a, gradient, input_precision=PRECISION)
                weighted = gradient
                if weight_ptr is not None:
                    weighted = gradient * tl.load(weight_ptr + n)
                part += weighted * gradient
                begin = end
            # a third tile of sums would be 64 registers more
            add_tile(out_ptr, part, at_o, at_i, outputs, inputs)


@triton.jit
def single_kernel(
    out_ptr,
    a_ptr,
    d_ptr,
    weight_ptr,
    ragged_ptr,
    examples,
    inputs,
    outputs,
    a_stride,
    d_stride,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_T: tl.constexpr,
    FOLD: tl.constexpr,
):
    """`linear_kernel` where ragged_ptr is 0: every example is a token.

    One product of squares, in float32 whatever the operands: the square of a half has twice its
    digits.
    """
    if tl.load(ragged_ptr) == 0:
        at_o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
        at_i = tl.program_id(0) * TILE_I + tl.arange(0, TILE_I)
        live_o, live_i = at_o < outputs, at_i < inputs
        for first in range(0, examples, FOLD):
            beyond = tl.minimum(first + FOLD, examples)
            part = tl.zeros([TILE_O, TILE_I], tl.float32)
            for start in range(first, beyond, TILE_T):
                t = start + tl.arange(0, TILE_T)
                live_t = t < beyond
                d = block_of(d_ptr, d_stride, t, live_t, at_o, live_o, True)
                a = block_of(a_ptr, a_stride, t, live_t, at_i, live_i, True)
                d = d * d
                if weight_ptr is not None:
                    d *= tl.load(weight_ptr + t, mask=live_t, other=0.0)[:, None]
                part = tl.dot(tl.trans(d), a * a, part, input_precision="ieee")
            add_tile(out_ptr, part, at_o, at_i, outputs, inputs)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def linear_sqgrad_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
) -> None:
    """As the specification; float64 sums are left to it."""
    if out.dtype == torch.float64:
        torch.ops.fasttax._reference_linear_sqgrad_(
            out, inputs, grad_outputs, cu_seqlens, example_weight
        )
        return
    outputs, width, examples = out.shape[0], out.shape[1], cu_seqlens.numel() - 1
    if not (outputs and width and examples and inputs.shape[0]):
        return
    # the interpreter's bfloat16 dot is wrong
    wide = _interpreted() or inputs.dtype != grad_outputs.dtype
    narrow = not wide and inputs.dtype != torch.float32
    tile = tile_of(outputs, width, narrow, precision(), *_gpu(out.device))
    ragged = None
    sizes = (examples, width, outputs, inputs.stride(0), grad_outputs.stride(0))
    with on_device(out):
        if examples == inputs.shape[0]:  # one token each, unless some have none: the kernels look
            ragged = (cu_seqlens.diff() != 1).any().to(torch.int32)
            single_kernel[SINGLE.grid(outputs, width)](
                out,
                inputs,
                grad_outputs,
                example_weight,
                ragged,
                *sizes,
                TILE_O=SINGLE.outputs,
                TILE_I=SINGLE.inputs,
                TILE_T=SINGLE.tokens,
                FOLD=FOLD,
                num_warps=SINGLE.warps,
            )
        linear_kernel[tile.grid(outputs, width)](
            out,
            inputs,
            grad_outputs,
            cu_seqlens,
            example_weight,
            ragged,
            *sizes,
            WIDE=wide,
            PRECISION=precision(),
            TILE_O=tile.outputs,
            TILE_I=tile.inputs,
            TILE_T=tile.tokens,
            FOLD=FOLD,
            num_warps=tile.warps,
        )


def tile_of(
    outputs: int, inputs: int, narrow: bool, precision: str, processors: int, major: int
) -> Tile:
    """The tile of an F on a GPU of so many multiprocessors.

    Small ones for FMAs, which no load holds up, and for fewer large tiles than multiprocessors.

    Args:
        outputs: of F.
        inputs: of F.
        narrow: both operands are of the same two-byte dtype.
        precision: of other products.
        processors: that a GPU has.
        major: of its compute capability.
    """
    if not narrow and precision == "ieee":
        return BRIEF if major < 9 else SMALL
    large = LARGE if narrow else LARGE_TF32
    if major == 12:
        large = MIDDLE if narrow else SMALL
    across, down = large.grid(outputs, inputs)
    return large if across * down >= processors else SMALL


def _gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, major compute capability); of the interpreter's some that are few."""
    if device.type != "cuda":
        return 4, 9
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count), int(found.major)


def precision() -> str:
    """Of float32 products: TF32 where torch's own matmuls are allowed it (NVIDIA), else float32."""
    allowed = torch.get_float32_matmul_precision() != "highest" and not torch.version.hip
    return "tf32" if allowed else "ieee"
