"""Methods compared at equal alignment: each one's own frontier, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fasttax.tax.profiles import t_quantile


class TaxAt(NamedTuple):
    """A method's tax at a gain: the mean over seeds, its interval, how many seeds reach the gain.

    Ends are infinite where nothing is known of the error: one seed, and no standard errors.

    Example:
        >>> at = report.tax_at(0.1)["dpo"]
        >>> at.low <= at.tax <= at.high, at.seeds
        (True, 1)
    """

    tax: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Point:
    """Gain and tax of a checkpoint; `error` is its capability's own standard error, if known.

    The base is the point (0, 0), which has none.
    """

    gain: float
    tax: float
    error: float | None


BASE = Point(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """A tax with its standard error, without the base's.

    `freedom` is that of the error's own estimate; `moved` is by how much the tax moves with the
    base's error, 1 beyond the first checkpoint.
    """

    tax: float
    error: float | None
    freedom: float
    moved: float
    seeds: int

    def interval(self, base_error: float, confidence: float) -> TaxAt:
        """With the base's error; half-widths add up as squares do (Zou & Donner 2008)."""
        if self.error is None:
            return TaxAt(self.tax, -math.inf, math.inf, self.seeds)
        own = t_quantile(self.freedom, confidence) * self.error
        reach = math.hypot(own, t_quantile(math.inf, confidence) * self.moved * base_error)
        return TaxAt(self.tax, self.tax - reach, self.tax + reach, self.seeds)


class Curve:
    """One training's frontier from the base on: of what it reached, the points nothing beats."""

    def __init__(self, points: Sequence[Point]) -> None:
        every = sorted([BASE, *points], key=lambda p: (-p.gain, p.tax))
        kept: list[Point] = []
        for point in every:  # from the largest gain down, the tax must fall
            if not kept or point.tax < kept[-1].tax:
                kept.append(point)
        self.points = kept[::-1]
        self.gains = [p.gain for p in self.points]

    @property
    def reach(self) -> float:
        """The largest gain."""
        return self.gains[-1]

    def between(self, gain: float) -> list[tuple[float, Point]]:
        """The two points that a gain lies between, with their shares of it.

        Left of the first point it is that one's: who gains more for less need not gain less.
        """
        right = int(np.searchsorted(self.gains, gain))
        if right == 0 or self.gains[right] == gain:
            return [(1.0, self.points[right])]
        one, other = self.points[right - 1], self.points[right]
        share = (gain - one.gain) / (other.gain - one.gain)
        return [(1 - share, one), (share, other)]

    def at(self, gain: float) -> tuple[float, float | None, float]:
        """(tax, its standard error, share of checkpoints in it), linear between neighbours."""
        parts = self.between(gain)
        tax = sum(weight * p.tax for weight, p in parts)
        moved = sum(weight for weight, p in parts if p is not BASE)
        if any(weight and p.error is None for weight, p in parts):
            return tax, None, moved
        return tax, math.hypot(*(weight * (p.error or 0.0) for weight, p in parts)), moved


def estimate(curves: Sequence[Curve], gain: float) -> Estimate | None:
    """The mean over the seeds that reach the gain; None where none does."""
    found = [curve.at(gain) for curve in curves if curve.reach >= gain]
    if not found:
        return None
    taxes = np.array([tax for tax, _, _ in found])
    moved = float(np.mean([share for _, _, share in found]))
    if len(found) == 1:
        return Estimate(float(taxes[0]), found[0][1], math.inf, moved, 1)
    error = float(taxes.std(ddof=1)) / math.sqrt(len(found))
    return Estimate(float(taxes.mean()), error, len(found) - 1, moved, len(found))


def beyond_noise(one: Estimate, other: Estimate, confidence: float) -> bool:
    """Whether `one` is lower than `other` by more than their errors explain (Welch 1947).

    The base's error is in both, and cancels.
    """
    if one.error is None or other.error is None:
        return False
    error = math.hypot(one.error, other.error)
    if error == 0:
        return one.tax < other.tax
    shares = [e.error**4 / e.freedom for e in (one, other) if e.error]
    freedom = error**4 / sum(shares) if sum(shares) else math.inf
    return other.tax - one.tax > t_quantile(freedom, confidence) * error


def dominated(methods: Mapping[str, Sequence[Curve]], confidence: float) -> dict[str, list[str]]:
    """The methods that others beat beyond noise, with the names of those others.

    One beats another at a half, three quarters and all of the gain that every seed of that other
    reaches, itself with every seed.
    """
    found: dict[str, list[str]] = {}
    for name, curves in methods.items():
        reach = min(curve.reach for curve in curves)
        if reach <= 0:
            continue
        better = [
            other
            for other, theirs in methods.items()
            if other != name
            and min(curve.reach for curve in theirs) >= reach
            and all(_beats(theirs, curves, reach * share, confidence) for share in (0.5, 0.75, 1.0))
        ]
        if better:
            found[name] = better
    return found


def _beats(one: Sequence[Curve], other: Sequence[Curve], gain: float, confidence: float) -> bool:
    mine, theirs = estimate(one, gain), estimate(other, gain)
    return mine is not None and theirs is not None and beyond_noise(mine, theirs, confidence)
