"""Tuples of numbers or of lanes, as the sweeps hold their sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def added(sums, more):
    """Two tuples, number by number."""
    both = ()
    for i in tl.static_range(len(sums)):
        both = both + (sums[i] + more[i],)
    return both


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Of as many numbers a lane."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS], tl.float32),)
    return sums


@triton.jit
def with_first(numbers, first):
    """A tuple with another first number."""
    out = (first,)
    for i in tl.static_range(1, len(numbers)):
        out = out + (numbers[i],)
    return out


@triton.jit
def with_ends(numbers, end):
    """A tuple with another first and last number."""
    out = (end,)
    for i in tl.static_range(1, len(numbers) - 1):
        out = out + (numbers[i],)
    return out + (end,)


@triton.jit
def last_apart(numbers):
    """The last number of a tuple, and the others."""
    others = ()
    for i in tl.static_range(len(numbers) - 1):
        others = others + (numbers[i],)
    return numbers[len(numbers) - 1], others
