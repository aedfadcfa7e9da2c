"""Frames of a row pair that move, its sums with them; and what the sums say. csrc/math/kl_row.h.

A frame is (mx, my, shift), as rows.framed takes it, and sums are the tuple of sums.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttax.triton.rows import (
    ALONE,
    APART,
    INF,
    LOG2E,
    POLICY_REF,
    REF_POLICY,
    STATS,
    log1p,
)
from fasttax.triton.series import UNIT_GAP, bregman_unit

# A divergence is led by the row that it is a mean under; token_stats and the kinds of two sweeps by
# both, where the policy has precedence. How far an entry of that row stands above the frame where
# this is moved, which leaves the divergence all but a 64th of its size. The other row has as far as
# float32 reaches: a frame that moves rounds the gap of the peaks before it.
RAISED = tl.constexpr(4.16)
RAISED_OTHER = tl.constexpr(75.0)
SLACK = tl.constexpr(4.0)  # how far the other row's frame may stand above its entries of that step
HIDDEN = tl.constexpr(15.0 / 16)  # the part of B that a frame's offset may make up
FARTHEST = tl.constexpr(20.0)  # the largest gap that a frame is moved by


@triton.jit
def raised(frame, top_x, top_y, k, OP: tl.constexpr):
    """The frame of a row whose entries in a step reach up to the given ones.

    Where the leading row stands far above its frame, both maxima of the step, so that the gap of a
    peak of both is 0.
    """
    mx, my, shift = frame
    above_x = (top_x - mx) * k.row_scale
    above_y = (top_y - my) * k.ref_row_scale + shift
    x_up = above_x > (RAISED_OTHER if OP == REF_POLICY else RAISED)
    y_up = above_y > (RAISED_OTHER if OP == POLICY_REF else RAISED)
    if OP == REF_POLICY:
        keep = (mx - top_x) * k.row_scale > SLACK
        to_mx = tl.where((y_up & (keep == 0)) | (x_up & (y_up == 0)), top_x, mx)
        to_my = tl.where(y_up, top_y, my)
        to_shift = tl.where(y_up, tl.where(keep, APART, 0.0), shift)
    else:
        keep = (my - top_y) * k.ref_row_scale - shift > SLACK
        anew = (x_up & (keep == 0)) | (y_up & (x_up == 0))
        to_mx = tl.where(x_up, top_x, mx)
        to_my = tl.where(anew, top_y, my)
        to_shift = tl.where(anew, 0.0, tl.where(x_up, APART, shift))
    return to_mx, to_my, to_shift


@triton.jit
def fall(up):
    """The power e^-up of a float64, within 2^-21; 0 below 2^-126."""
    t = up * -LOG2E
    whole = tl.floor(t)
    low = tl.exp2((t - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))
    return low.to(tl.float64)


@triton.jit
def move_of(up_x, up_y):
    """The numbers of KlMove in csrc/math/kl_row.h: sx, sy, rise, toward, away, delta.

    By single precision's exponentials: an error in sx moves entries of both rows alike, and so does
    no harm to a divergence.
    """
    delta = up_x - up_y
    sx = fall(up_x)
    sy = fall(up_y)
    short = delta.to(tl.float32)
    near = tl.abs(delta) <= UNIT_GAP
    ahead = bregman_unit(-short).to(tl.float64)
    rise = tl.where(near, sx * (ahead + delta), sy - sx)
    sy = tl.where(near, sx + rise, sy)
    toward = tl.where(near, sx * ahead, rise - sx * delta)
    away = tl.where(near, sy * bregman_unit(short).to(tl.float64), sy * delta - rise)
    return sx, sy, rise, toward, away, delta


@triton.jit
def rises(frame, to, k):
    """How far a frame's two sides rise to another, in float64.

    A side of which there is nothing yet was in no frame.
    """
    mx, my, shift = frame
    to_mx, to_my, to_shift = to
    up_x = (to_mx.to(tl.float64) - mx.to(tl.float64)) * k.row_scale
    up_y = (to_my.to(tl.float64) - my.to(tl.float64)) * k.ref_row_scale
    up_y += shift.to(tl.float64) - to_shift.to(tl.float64)
    no_x = mx == -INF
    no_y = my == -INF
    up_x = tl.where(no_x, tl.where(no_y, 0.0, up_y), up_x)
    return up_x, tl.where(no_y, up_x, up_y)


@triton.jit
def moved(sums, frame, to, k, OP: tl.constexpr):
    """Sums of a row in another frame, in float64: KlSums::carry of csrc/math/kl_row.h."""
    up_x, up_y = rises(frame, to, k)
    s = sums[0]
    if OP == ALONE:
        sx = fall(up_x)
        return sx * s, moved_moment(sums[1], s, sx, up_x)
    else:
        sx, sy, rise, toward, away, delta = move_of(up_x, up_y)
        y = sums[1]
        g = sums[2]
        if OP == REF_POLICY:
            g = sums[3] - sums[2]
        if (OP == POLICY_REF) | (OP == STATS):
            g = sums[2] - sums[3]
        # Where the masses are apart G was rounded beside the larger one's, while each of the two
        # has its own digits.
        alike = tl.abs(g) <= 0.5 * s
        g = tl.where(alike, g, y - s)
        if OP == POLICY_REF:
            b, a = moved_pair(sums[2], sums[3], alike, g, s, sx, rise, toward, delta)
            return sx * s, sy * y, b, a
        elif OP == REF_POLICY:
            c, back = moved_pair(sums[2], sums[3], alike, -g, y, sy, -rise, away, -delta)
            return sx * s, sy * y, c, back
        elif OP == STATS:
            b, a = moved_pair(sums[2], sums[3], alike, g, s, sx, rise, toward, delta)
            c, back = moved_pair(sums[4], sums[5], alike, -g, y, sy, -rise, away, -delta)
            return sx * s, sy * y, b, a, c, back, moved_moment(sums[6], s, sx, up_x)
        else:
            return sx * s, sy * y, sy * g + rise * s


@triton.jit
def moved_pair(b, a, alike, g, mass, scale, rise, toward, delta):
    """A divergence's two sums, B and A; or C and its own, by -G, -rise and -delta.

    Infinite terms of a mass that is nothing in the new frame are nothing.
    """
    b = tl.where(alike, b, a + g)
    b = tl.where(scale == 0, 0.0, b)
    a = tl.where(scale == 0, 0.0, a)
    return scale * b + rise * g + toward * mass, scale * (a - delta * mass)


@triton.jit
def moved_moment(moment, mass, sx, up):
    """In units of log 2."""
    return tl.where(sx == 0, 0.0, sx * (moment - up * LOG2E * mass))


@triton.jit
def offset(part, OP: tl.constexpr):
    """The mean gap of a step's sums where most of B or C is the offset of its frame, else 0."""
    s = tl.sum(part[0], 0)
    gap = 0.0
    if OP != ALONE:
        y = tl.sum(part[1], 0)
        if OP == REF_POLICY:
            gap = one_offset(tl.sum(part[2], 0), tl.sum(part[3], 0), y, -1.0)
        if (OP == POLICY_REF) | (OP == STATS):
            gap = one_offset(tl.sum(part[2], 0), tl.sum(part[3], 0), s, 1.0)
        if OP == STATS:
            other = one_offset(tl.sum(part[4], 0), tl.sum(part[5], 0), y, -1.0)
            gap = tl.where(gap == 0, other, gap)
    return gap


@triton.jit
def one_offset(b, a, mass, sign):
    """Of one divergence; h(tau) = tau - log(1 + tau) is what the offset adds to B / mass."""
    tau = (b - a) / mass
    h = tl.where(tl.abs(tau) < 0.25, tau * tau * (0.5 - tau * (1.0 / 3)), tau - log1p(tau))
    gap = a / mass
    small = 4 * (gap + log1p(tau)) < tl.abs(gap)
    hides = (h * mass > b * HIDDEN) & small & (tl.abs(gap) < FARTHEST)
    return tl.where(hides, gap * sign, 0.0)


@triton.jit
def defect(t):
    """The difference t - log(1 + t), in float64."""
    series = (
        t
        * t
        * (0.5 - t * (1.0 / 3 - t * (0.25 - t * (0.2 - t * (1.0 / 6 - t * (1.0 / 7 - t * 0.125))))))
    )
    return tl.where(tl.abs(t) < 1e-2, series, t - tl.log(1.0 + t))


@triton.jit
def log_ratio_of(s, y, g):
    """log(s / y) of sums whose difference is g."""
    tau = g / s
    return tl.where(tl.abs(tau) <= 0.5, -tl.log(1.0 + tau), tl.log(s / y))


@triton.jit
def divergence(s, y, b, a, FORWARDS: tl.constexpr):
    """A KL by csrc/math/kl_row.h: its value, the mean gap, and log(s / y).

    Of (b, a) for KL(p||q), of (c, back) for KL(q||p).
    """
    g = b - a if FORWARDS else a - b
    log_ratio = log_ratio_of(s, y, g)
    centred = tl.abs(g / s) <= 0.5
    if FORWARDS:
        gap = a / s
        value = tl.where(centred, b / s - defect(g / s), gap - log_ratio)
    else:
        gap = -a / y
        value = tl.where(centred, b / y - defect(-g / y), log_ratio - gap)
    return value, gap, log_ratio
