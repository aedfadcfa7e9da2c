"""Jensen-Shannon's two functions of a small u = log(p / q), as polynomials made on the host.

Of beta alone, with w = 1 - beta, as csrc/math/kl_jsd.h has them:
    L(u) = log(w + beta e^-u)        J(u) = beta g(e^-u - 1) - g(beta (e^-u - 1))
where g(t) = (1 + t) log(1 + t) - t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

TERMS = 5
REACH = 0.35  # of |u|: both functions' poles are pi away


@lru_cache(maxsize=64)
def curves(beta: float) -> tuple[float, ...]:
    """Of polynomials in u on |u| <= REACH: L / u, then J / u^2, in units of log 2.

    Interpolated at Chebyshev's nodes, within 1e-6 of either.
    """
    w = 1 - beta

    def log_mix(u: float) -> float:
        return -beta if u == 0 else math.log1p(beta * math.expm1(-u)) / u

    def part(u: float) -> float:
        if u == 0:
            return beta * w / 2
        rest = math.expm1(-u)
        return (beta * _bregman(rest) - _bregman(beta * rest)) / (u * u)

    return tuple(c / math.log(2) for f in (log_mix, part) for c in _fitted(f))


def _bregman(t: float) -> float:
    """(1 + t) log(1 + t) - t."""
    return (1 + t) * math.log1p(t) - t


def _fitted(f: Callable[[float], float]) -> list[float]:
    """Powers of u, the lowest first, by Newton's divided differences."""
    nodes = [REACH * math.cos((i + 0.5) * math.pi / TERMS) for i in range(TERMS)]
    nodes[TERMS // 2] = 0.0
    divided = [f(u) for u in nodes]
    for order in range(1, TERMS):
        for i in range(TERMS - 1, order - 1, -1):
            divided[i] = (divided[i] - divided[i - 1]) / (nodes[i] - nodes[i - order])
    powers = [0.0] * TERMS
    for i in range(TERMS - 1, -1, -1):
        for n in range(TERMS - 1, 0, -1):
            powers[n] = powers[n - 1] - nodes[i] * powers[n]
        powers[0] = divided[i] - nodes[i] * powers[0]
    return powers
