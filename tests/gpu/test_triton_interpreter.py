"""What tests/tools/interpreter.py makes of Triton's interpreter gives what that gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
import triton
import triton.language as tl

from tests.tools.interpreter import quicken
from tests.tools.triton_tools import check_in_the_interpreter

ROWS, COLUMNS = 4, 16


@triton.jit
def larger_or_nan(a: Any, b: Any) -> Any:
    """Of our own, so that the interpreter knows no function of NumPy's for it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger_of_two(a: Any, at_a: Any, b: Any, at_b: Any) -> Any:
    """The larger, and where it is."""
    first = a >= b
    return tl.where(first, a, b), tl.where(first, at_a, at_b)


@triton.jit
def reductions(x_ptr: Any, out_ptr: Any, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """By a function of one number and of two, over either axis and all, kept or not."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    by_row = tl.reduce(x, 1, larger_or_nan, keep_dims=True)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None], by_row)
    by_column, row = tl.reduce((x, at // COLUMNS), 0, larger_of_two)
    columns = tl.arange(0, COLUMNS)
    tl.store(out_ptr + ROWS + columns, by_column)
    tl.store(out_ptr + ROWS + COLUMNS + columns, row.to(tl.float32))
    tl.store(out_ptr + ROWS + 2 * COLUMNS, tl.reduce(x, None, larger_or_nan))
    tl.store(out_ptr + ROWS + 2 * COLUMNS + 1, tl.sum(tl.reduce(x, 0, larger_or_nan)))


def reduced(x: Tensor) -> Tensor:
    """What `reductions` leaves."""
    out = torch.empty(ROWS + 2 * COLUMNS + 2)
    reductions[(1,)](x, out, ROWS, COLUMNS)
    return out


def check() -> None:
    """In a process with TRITON_INTERPRET=1."""
    x = torch.randint(-50, 50, (ROWS, COLUMNS)).float()
    x[1:3, 2] = 50.0  # two that are the largest: the first of them counts
    own = reduced(x)
    assert torch.equal(own[:ROWS], x.amax(1))
    assert quicken(), "no part of Triton's interpreter that is replaced may be missing here"
    assert torch.equal(reduced(x), own)
    x[1, 3] = torch.nan
    assert reduced(x)[1].isnan()
    assert reduced(x)[ROWS + 2 * COLUMNS].isnan()


def test_quickened_is_the_same() -> None:
    check_in_the_interpreter(__file__, "t.check()", prepare="import torch")
