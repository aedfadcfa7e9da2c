"""Triton kernels of the Fisher: sums of squared per-example gradients, the head's variances.

A program owns a tile of F and runs over examples: the example's gradient tile is gathered by tl.dot
in registers, squared, and added to a second register tile; F is read and written once. No
per-example gradient reaches memory, and every sum has one order: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.tables import (
    BLOCK,
    dtype_of,
    elements,
    grouped,
    load,
    operand,
    row_of,
    store,
)


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
# of biases and norms
COLUMNS, TOKENS = 128, 16
# of an embedding's rows: a word seldom stands more than four times in an example
WORD_COLUMNS, WORD_TOKENS = 512, 4
ROW_BLOCK = 4096  # logits of a row at a time
WIDTH = tl.constexpr(4)  # of a row of accumulate_sqgrad_: two addresses, elements, first program


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


@triton.jit
def elementwise_kernel(
    out_ptr,
    x_ptr,
    d_ptr,
    cu_ptr,
    weight_ptr,
    examples,
    width,
    x_stride,
    d_stride,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[j] += sum_n w_n (sum_t d[t, j] x[t, j])^2, without x_ptr of d alone."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = at < width
    # one by one in float32, 1e6 examples would be 1e-2 off
    squares = tl.zeros([COLUMNS], tl.float64)
    begin = tl.load(cu_ptr)
    for n in range(examples):
        end = tl.load(cu_ptr + n + 1)
        gathered = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(begin, end, TOKENS):
            t = start + tl.arange(0, TOKENS)
            d = block_of(d_ptr, d_stride, t, t < end, at, live, True)
            if x_ptr is not None:
                d *= block_of(x_ptr, x_stride, t, t < end, at, live, True)
            gathered += d
        gradient = tl.sum(gathered, 0)
        weighted = gradient
        if weight_ptr is not None:
            weighted = gradient * tl.load(weight_ptr + n)
        squares += (weighted * gradient).to(tl.float64)
        begin = end
    squares += tl.load(out_ptr + at, mask=live, other=0.0).to(tl.float64)
    tl.store(out_ptr + at, squares.to(tl.float32), mask=live)


@triton.jit
def words_kernel(
    out_ptr,
    d_ptr,
    order_ptr,
    word_ptr,
    end_ptr,
    last_ptr,
    example_ptr,
    weight_ptr,
    width,
    d_stride,
    skip,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[v] += sum_n w_n (sum_{t in n: ids[t] = v} d[t])^2.

    By the program that stands at the first of v's tokens, in the order of (word, example). Of place
    p in that order: order[p] its row of d, word[p], example[p], end[p] where its example's tokens
    of the word end, last[p] where the word's do.
    """
    begin = tl.program_id(0)
    word = tl.load(word_ptr + begin)
    before = tl.load(word_ptr + begin - 1, mask=begin > 0, other=-1)
    if (word != before) & (word != skip):
        at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        live = at < width
        squares = tl.zeros([COLUMNS], tl.float64)  # as in elementwise_kernel
        last = tl.load(last_ptr + begin).to(tl.int32)
        while begin < last:
            end = tl.load(end_ptr + begin).to(tl.int32)
            gathered = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for start in range(begin, end, TOKENS):
                p = start + tl.arange(0, TOKENS)
                gathered += block_of(
                    d_ptr,
                    d_stride,
                    tl.load(order_ptr + p, mask=p < end, other=0),
                    p < end,
                    at,
                    live,
                    True,
                )
            gradient = tl.sum(gathered, 0)
            weighted = gradient
            if weight_ptr is not None:
                weighted = gradient * tl.load(weight_ptr + tl.load(example_ptr + begin))
            squares += (weighted * gradient).to(tl.float64)
            begin = end
        to = out_ptr + word.to(tl.int64) * width + at
        squares += tl.load(to, mask=live, other=0.0).to(tl.float64)
        tl.store(to, squares.to(tl.float32), mask=live)


@triton.jit
def variance_kernel(x_ptr, V, stride, BLOCK: tl.constexpr):
    """A row's logits -> p (1 - p), in place.

    e ((Z - 1) + (1 - e)) / Z^2 of e = exp(x - max), with Z - 1 summed without the maximum, so that
    it does not cancel where the row has collapsed onto one label.
    """
    row = x_ptr + tl.program_id(0).to(tl.int64) * stride
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(row + at, mask=at < V, other=float("-inf")))
    top = tl.max(most, 0)
    rest = tl.zeros([BLOCK], tl.float32)
    ties = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=float("-inf"))
        rest += tl.where(x == top, 0.0, tl.exp(x - top))
        ties += tl.where(x == top, 1.0, 0.0)
    others = tl.sum(rest, 0) + (tl.sum(ties, 0) - 1.0)
    total = others + 1.0
    factor = 1.0 / (total * total)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        e = tl.exp(tl.load(row + at, mask=at < V, other=float("-inf")) - top)
        tl.store(row + at, e * ((1.0 - e) + others) * factor, mask=at < V)


@triton.jit
def add_square(sum_ptr, grad_ptr, weight, at, live):
    """Adds weight * grad^2 to BLOCK elements of a sum."""
    grad = load(grad_ptr, at, live)
    store(sum_ptr, at, load(sum_ptr, at, live) + grad * weight * grad, live)


@triton.jit(do_not_specialize=["rows"])
def squares_kernel(
    table_ptr, weight, rows, GRAD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a list (tables.py): a row is a sum and a gradient."""
    row, begin = row_of(table_ptr, rows, tl.program_id(0).to(tl.int64), WIDTH)
    count = elements(row, begin, WIDTH)
    sum_ptr = operand(row, 0, begin, tl.float32, ALIGNED)
    grad_ptr = operand(row, 1, begin, GRAD, ALIGNED)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        add_square(sum_ptr, grad_ptr, weight, start + tl.arange(0, BLOCK), None)
    if whole < count:
        at = whole + tl.arange(0, BLOCK)
        add_square(sum_ptr, grad_ptr, weight, at, at < count)


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


def _elementwise(
    out: Tensor, x: Tensor | None, d: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None
) -> None:
    examples, width = cu_seqlens.numel() - 1, d.shape[1]
    if not (examples and width and d.shape[0]):
        return
    x_stride = 0
    if x is not None:
        x_stride = x.stride(0)
    with on_device(out):
        elementwise_kernel[(triton.cdiv(width, COLUMNS),)](
            out,
            x,
            d,
            cu_seqlens,
            example_weight,
            examples,
            width,
            x_stride,
            d.stride(0),
            COLUMNS=COLUMNS,
            TOKENS=TOKENS,
            num_warps=4,
        )


def bias_sqgrad_(
    out: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None
) -> None:
    """As the specification; float64 sums are left to it."""
    reference: Any = torch.ops.fasttax._reference_bias_sqgrad_
    if out.dtype == torch.float64:
        reference(out, grad_outputs, cu_seqlens, example_weight)
    else:
        _elementwise(out, None, grad_outputs, cu_seqlens, example_weight)


def norm_sqgrad_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
) -> None:
    """As the specification; float64 sums are left to it."""
    reference: Any = torch.ops.fasttax._reference_norm_sqgrad_
    if out.dtype == torch.float64:
        reference(out, inputs, grad_outputs, cu_seqlens, example_weight)
    else:
        _elementwise(out, inputs, grad_outputs, cu_seqlens, example_weight)


def embedding_sqgrad_(
    out: Tensor,
    ids: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
    skip: int,
) -> None:
    """As the specification; float64 sums are left to it.

    Tokens are sorted by (word, example) first, so that a program adds up one word.
    """
    if out.dtype == torch.float64:
        torch.ops.fasttax._reference_embedding_sqgrad_(
            out, ids, grad_outputs, cu_seqlens, example_weight, skip
        )
        return
    rows, width = grad_outputs.shape
    if not (rows and width):
        return
    examples = cu_seqlens.numel() - 1
    example = torch.searchsorted(cu_seqlens, torch.arange(rows, device=ids.device), right=True) - 1
    # within a word its examples, within an example its tokens: one order of every sum
    key, order = (ids * examples + example).sort(stable=True)
    word = key // examples
    end, last = torch.searchsorted(key, key, right=True), torch.searchsorted(word, word, right=True)
    grid = (rows, triton.cdiv(width, WORD_COLUMNS))
    with on_device(out):
        words_kernel[grid](
            out,
            grad_outputs,
            order,
            word,
            end,
            last,
            key % examples,
            example_weight,
            width,
            grad_outputs.stride(0),
            skip,
            COLUMNS=WORD_COLUMNS,
            TOKENS=WORD_TOKENS,
            num_warps=4,
        )


def label_variance_(logits: Tensor) -> None:
    """As the specification, a program a row; float64 logits are left to it."""
    if logits.dtype == torch.float64:
        torch.ops.fasttax._reference_label_variance_(logits)
    elif logits.numel():
        with on_device(logits):
            variance_kernel[(logits.shape[0],)](
                logits, logits.shape[1], logits.stride(0), BLOCK=ROW_BLOCK, num_warps=8
            )


def accumulate_sqgrad_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """As the specification, a launch for each dtype of gradients; float64 sums are left to it."""
    exact = [i for i, total in enumerate(sums) if total.dtype == torch.float64]
    if exact:
        of = ([x[i] for i in exact] for x in (sums, grads))
        torch.ops.fasttax._reference_accumulate_sqgrad_(*of, weight)
    pairs = [p for p in zip(sums, grads, strict=True) if p[0].dtype != torch.float64]
    for g in grouped(len(pairs), lambda i: dtype_of(pairs[i][1]), lambda i: pairs[i]):
        if g.programs:
            like = pairs[0][0]
            with on_device(like):
                squares_kernel[(g.programs,)](
                    g.table(like),
                    weight,
                    len(g.rows),
                    GRAD=g.kind,
                    ALIGNED=g.aligned,
                    BLOCK=BLOCK,
                )
