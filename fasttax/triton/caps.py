"""Rows of 16-bit logits under one softcap: csrc/cuda/kl_cap.cuh.

With e = e^(2 scale x / cap) and r = 1 / (1 + e) the tanh is 1 - 2 r. Of a pair x, y a sweep holds
    r_x     g = r_y - r_x = (tanh x - tanh y) / 2
which give ax and d in a multiply-add each, and the cap's slope as 4 r (1 - r). Where x and y are
near each other
    e_x - e_y = e_y expm1(t), t = 2 scale (x - y) / cap     g = (e_x - e_y) / ((1 + e_x) (1 + e_y))
by a polynomial, one exponential and one division: a small d keeps its digits. Every step is spelled
out: of one entry each kernel has the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax.triton.rows import LOG2E, POLICY_REF, widened
from fasttax.triton.series import bregman_slope_wide

# |t| up to which expm1 is by its polynomial, and the largest |d| of `bregman_slope_wide`
CAP_REACH = tl.constexpr(0.25)
WIDE_GAP = tl.constexpr(2.0)
# Beyond 2^60 the quotient is nothing to 1, and the product of two is still a float.
CAP_MOST = tl.constexpr(60.0)


@triton.jit
def inverse_of(v, APPROX: tl.constexpr):
    """The reciprocal. APPROX: by NVIDIA's own instruction, within one unit of the last place."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / v


@triton.jit
def raised(x, k, BOUNDED: tl.constexpr):
    """Of a row's entries e^(2 scale x / cap). BOUNDED: no larger than is of use, NaN as it is."""
    power = x * (k.over_cap * (2 * LOG2E))
    if BOUNDED:
        power = tl.minimum(power, CAP_MOST, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(power)


@triton.jit
def capped(x, y, k, NEAR: tl.constexpr, GUARDED: tl.constexpr, APPROX: tl.constexpr):
    """r_x and g. NEAR: every |t| is within CAP_REACH. Not GUARDED: NaN where e is infinite then.

    Of entries that are not near one e may be huge by itself, whose product with the other is no
    float: both are bounded.
    """
    t = (x - y) * (k.over_cap * 2)
    p = tl.fma(t, 0.0083488477882892, 0.04177529479148796)
    p = tl.fma(p, t, 0.1666664242007092)
    p = tl.fma(p, t, 0.4999983022120861)
    p = tl.fma(p, t, 1.0) * t
    e = raised(y, k, GUARDED or not NEAR)
    one_y = 1.0 + e
    change = e * p
    one_x = tl.fma(e, p, one_y)
    if not NEAR:
        e_x = raised(x, k, True)
        near = tl.abs(t) <= CAP_REACH
        change = tl.where(near, change, e_x - e)
        one_x = tl.where(near, one_x, 1.0 + e_x)
    over = inverse_of(one_x * one_y, APPROX)
    return over * one_y, over * change


@triton.jit
def framed_capped(
    x, y, mx, my, shift, k, NEAR: tl.constexpr, GUARDED: tl.constexpr, APPROX: tl.constexpr
):
    """As rows.framed, with the cap's r of the policy and g."""
    r, g = capped(x, y, k, NEAR, GUARDED, APPROX)
    scale = k.row_scale * LOG2E
    ax = tl.fma(r, k.cap * scale * -2, (k.cap - mx) * scale)
    d = tl.fma(g, k.cap * k.row_scale * 2, (my - mx) * k.row_scale - shift)
    return ax, tl.fma(d, -LOG2E, ax), d, r, g


@triton.jit
def through_cap(r, slope):
    """A slope by capped logits times the cap's own, 1 - tanh^2."""
    return slope * r * tl.fma(r, -4.0, 4.0)


@triton.jit
def larger_or_nan(a, b):
    """Of two numbers, either NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def near_lanes(xs, ys, frame, k):
    """Of a step's lanes whether each |t| is within CAP_REACH and each |d| within WIDE_GAP."""
    mx, my, shift = frame
    apart = tl.abs(widened(xs[0]) - widened(ys[0]))
    for j in tl.static_range(1, len(xs)):
        apart = larger_or_nan(apart, tl.abs(widened(xs[j]) - widened(ys[j])))
    # a cap draws logits together: |d| <= |x - y| row_slope + |what the frames differ by|
    of_d = (WIDE_GAP - tl.abs((my - mx) * k.row_scale - shift)) / k.row_slope
    return tl.reduce(apart, 1, larger_or_nan) <= tl.minimum(of_d, CAP_REACH / (k.over_cap * 2))


@triton.jit
def near_terms(ax, d, OP: tl.constexpr):
    """A vector's sums of a KL, of entries that are all near: one exponential an entry."""
    ex = tl.exp2(ax)
    s = tl.sum(ex, 1)
    p = bregman_slope_wide(d)
    square = ex * (d * d)
    if OP == POLICY_REF:
        b = tl.sum(square * p, 1)
        a = tl.sum(ex * d, 1)
        return s, s + (b - a), b, a
    else:
        g = tl.sum(tl.fma(square, p, -(ex * d)), 1)
        c = tl.sum(square * (1 - tl.fma(p, d, p)), 1)
        return s, s + g, c, c + g
