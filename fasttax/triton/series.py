"""Series of the divergences' terms for small arguments, as csrc/math/kl.h has them."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_GAP = tl.constexpr(1.0)
# up to which an entry is summed by its series: a term less than up to 1, one instruction of 26
NEAR_GAP = tl.constexpr(0.75)


@triton.jit
def bregman(d):
    """e^-d - 1 + d for |d| <= 1/4."""
    p = tl.fma(d, -1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, d, -1.0 / 120)
    p = tl.fma(p, d, 1.0 / 24)
    p = tl.fma(p, d, -1.0 / 6)
    p = tl.fma(p, d, 0.5)
    return d * d * p


@triton.jit
def bregman_slope(d):
    """The quotient (e^-d - 1 + d) / d^2 for |d| <= 3/4, within 3e-7 of it."""
    p = tl.fma(d, -1.991833415e-4, 1.409866964e-3)
    p = tl.fma(p, d, -8.333937265e-3)
    p = tl.fma(p, d, 4.166226462e-2)
    p = tl.fma(p, d, -1.666665226e-1)
    return tl.fma(p, d, 5.000001192e-1)


@triton.jit
def bregman_slope_unit(d):
    """As `bregman_slope`, for |d| <= 1 and within 2e-7 of it."""
    p = tl.fma(d, 2.496081175e-5, -2.032548412e-4)
    p = tl.fma(p, d, 1.389133537e-3)
    p = tl.fma(p, d, -8.330930478e-3)
    p = tl.fma(p, d, 4.166651558e-2)
    p = tl.fma(p, d, -1.666669619e-1)
    return tl.fma(p, d, 5.000000099e-1)


@triton.jit
def bregman_slope_wide(d):
    """As `bregman_slope`, for |d| <= 2 and within 3e-7 of it."""
    p = tl.fma(d, 2.949949476e-7, -2.990085250e-6)
    p = tl.fma(p, d, 2.474271787e-5)
    p = tl.fma(p, d, -1.977011561e-4)
    p = tl.fma(p, d, 1.388954581e-3)
    p = tl.fma(p, d, -8.334128186e-3)
    p = tl.fma(p, d, 4.166664556e-2)
    p = tl.fma(p, d, -1.666664332e-1)
    return tl.fma(p, d, 0.5)


@triton.jit
def bregman_unit(d):
    """e^-d - 1 + d for |d| <= 1."""
    return d * d * bregman_slope_unit(d)
