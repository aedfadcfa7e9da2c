"""Triton kernels of the Fisher: sums of squared per-example gradients, the head's variances.

A linear layer's are in fisher_linear.py. A program owns columns of F and runs over examples; every
sum has one order: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttax.triton import on_device
from fasttax.triton.fisher_linear import block_of
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

# of biases and norms
COLUMNS, TOKENS = 128, 16
# of an embedding's rows: a word seldom stands more than four times in an example
WORD_COLUMNS, WORD_TOKENS = 512, 4
ROW_BLOCK = 4096  # logits of a row at a time
WIDTH = tl.constexpr(4)  # of a row of accumulate_sqgrad_: two addresses, elements, first program


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
