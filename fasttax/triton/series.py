"""Series of the divergences' terms for small arguments, as csrc/math/kl.h has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bregman_pair(d):
    """e^-d - 1 + d and e^d - 1 - d for |d| <= 1/4, by their even and odd parts."""
    z = d * d
    even = (z * (1.0 / 720) + 1.0 / 24) * z + 0.5
    odd = ((z * (1.0 / 5040) + 1.0 / 120) * z + 1.0 / 6) * d
    return z * (even - odd), z * (even + odd)


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
def jensen_gap(t):
    """g(t) = (1 + t) log1p(t) - t for |t| <= 1/4."""
    p = t * (-1.0 / 132) + 1.0 / 110
    p = p * -t + 1.0 / 90
    p = p * -t + 1.0 / 72
    p = p * -t + 1.0 / 56
    p = p * -t + 1.0 / 42
    p = p * -t + 1.0 / 30
    p = p * -t + 1.0 / 20
    p = p * -t + 1.0 / 12
    p = p * -t + 1.0 / 6
    p = p * -t + 0.5
    return t * t * p
