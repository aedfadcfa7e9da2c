"""Laws that are linear but for an exponent b: least squares, and profiles of the likelihood.

For a covariance V of the errors and each b of a grid the coefficients have a closed form. The
interval of a quantity holds the values that some parameters give it whose sum of squared, whitened
errors is at most SSE (1 + t^2 / (n - k)), with k parameters (Bates & Watts 1988, section 6.1);
of several covariances those count that the restricted likelihood does not rule out, and the
interval is their union.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttax._base import checks

Floats = NDArray[np.float64]
Columns = Callable[[Floats], Floats]  # b (B,) -> design (p, n, B), of one or two columns p

# A covariance counts whose restricted log-likelihood is within half of chi-squared's 90 % of the
# best one's. `python -m bench.bench_coverage` shows what it covers; with the best alone, runs of 12
# with AR(1) errors came to 87 %.
PLAUSIBLE = 1.35
SMALLEST = 1e-14  # of the sum of squares: rounding, where points lie on a law


def scipy_stats() -> Any:
    """The module of distributions, scipy.stats.

    Raises:
        ModuleNotFoundError: scipy is not installed; says what brings it.
    """
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fasttax.tax: scipy is not installed, which intervals need; run `pip install "
            "'fasttax[report]'`",
            name="scipy",
        ) from error
    return stats


@functools.cache
def t_quantile(freedom: float, confidence: float) -> float:
    """The t within whose +-t Student's t of `freedom` degrees lies at probability `confidence`.

    Of the normal distribution for inf.
    """
    return float(scipy_stats().t.ppf((1 + confidence) / 2, freedom))


@dataclass(frozen=True)
class Law:
    """A family of laws: its grid of b, its columns, and the name of what is fitted for errors.

    `columns` makes the design for exponents b; `slope(b)` (n,) is the direction in which the
    law moves with b, None for a law without one.
    """

    grid: Floats
    columns: Columns
    slope: Callable[[float], Floats] | None

    def parameters(self) -> int:
        """Of the law, b among them."""
        return len(self.columns(self.grid[:1])) + (self.slope is not None)


@dataclass(frozen=True)
class Profile:
    """A law's least squares over its grid, under one covariance.

    whiten (n, n) makes errors white; `sse` (B,), `coefficients` (p, B) and `spread` (p, p, B),
    the inverse of the whitened design's square; `likelihood` is the restricted one's logarithm.
    """

    whiten: Floats
    grid: Floats
    sse: Floats
    coefficients: Floats
    spread: Floats
    rounding: float
    likelihood: float

    @property
    def best(self) -> int:
        """Where on the grid the law fits best."""
        return int(self.sse.argmin())


def profile(law: Law, grid: Floats, y: Floats, whiten: Floats) -> Profile:
    """`law` on `grid` under the covariance whose inverse root is `whiten`."""
    target = whiten @ y
    design = whiten @ law.columns(grid)  # (p, n, B)
    spread = _inverse(design)
    projected = np.einsum("pnb,n->pb", design, target)
    coefficients = np.einsum("pqb,qb->pb", spread, projected)
    error = target[:, None] - (design * coefficients[:, None]).sum(0)
    sse = (error * error).sum(0)
    rounding = SMALLEST * float(target @ target)
    i = int(sse.argmin())
    directions = design[:, :, i].T
    if law.slope is not None:
        directions = np.column_stack([directions, whiten @ law.slope(float(grid[i]))])
    freedom = len(y) - directions.shape[1]
    likelihood = (
        float(np.linalg.slogdet(whiten)[1])
        - 0.5 * freedom * float(np.log(sse[i] + rounding + np.finfo(float).tiny))
        - 0.5 * float(np.linalg.slogdet(directions.T @ directions)[1])
    )
    return Profile(whiten, grid, sse, coefficients, spread, rounding, likelihood)


def _inverse(design: Floats) -> Floats:
    """(p, p, B): of the design's square, for one or two columns."""
    square = np.einsum("pnb,qnb->pqb", design, design)
    if len(design) == 1:
        return 1 / square
    (a, b), (_, d) = square
    return np.array([[d, -b], [-b, a]]) / (a * d - b * b)


class Fit:
    """A law fitted to y under covariances, of which the plausible ones are kept.

    Args:
        law: the family.
        y: (n,), more than the law's parameters.
        covariances: (n, n) each, up to a common factor; the first is preferred where all fit alike.
        confidence: of the intervals.
    """

    def __init__(
        self, law: Law, y: Floats, covariances: Sequence[Floats], confidence: float
    ) -> None:
        self.law, self.y, self.confidence = law, y, confidence
        self.freedom = len(y) - law.parameters()
        every = [profile(law, law.grid, y, _whitening(v)) for v in covariances]
        most = max(p.likelihood for p in every)
        kept = [p for p in every if p.likelihood >= most - PLAUSIBLE]
        likeliest = next(k for k, p in enumerate(kept) if p.likelihood == most)
        self.profiles = [self._with_best(p) for p in kept]
        self.best = self.profiles[likeliest]
        at = self.best.best
        self.b = float(self.best.grid[at])
        self.coefficients = self.best.coefficients[:, at]
        self.sse = float(self.best.sse[at])

    def _with_best(self, found: Profile) -> Profile:
        """The profile with the best b between the grid's points put in, by two finer grids."""
        if len(self.law.grid) == 1:
            return found
        low, high = self.law.grid[0], self.law.grid[-1]
        step, middle = float(self.law.grid[1] - low), float(found.grid[found.best])
        for _ in range(2):
            fine = np.clip(np.linspace(middle - step, middle + step, 101), low, high)
            zoomed = profile(self.law, fine, self.y, found.whiten)
            middle, step = float(fine[zoomed.best]), step / 50
        single = profile(self.law, np.array([middle]), self.y, found.whiten)
        at = int(np.searchsorted(found.grid, middle))
        return replace(
            found,
            grid=np.insert(found.grid, at, middle),
            sse=np.insert(found.sse, at, single.sse),
            coefficients=np.insert(found.coefficients, at, single.coefficients[:, 0], axis=1),
            spread=np.insert(found.spread, at, single.spread[:, :, 0], axis=2),
        )

    def limit(self, found: Profile) -> float:
        """The sum of squares that is allowed under a covariance."""
        least = float(found.sse.min()) + found.rounding
        return least * (1 + t_quantile(self.freedom, self.confidence) ** 2 / self.freedom)

    def b_interval(self) -> tuple[float, float]:
        """The exponents that are allowed."""
        allowed = np.concatenate([p.grid[p.sse <= self.limit(p)] for p in self.profiles])
        return float(allowed.min()), float(allowed.max())

    def interval(self, weights: Callable[[Floats], Floats]) -> tuple[float, float]:
        """Of the quantity that is `weights(b)` (p, B) times the coefficients."""
        low, high = np.inf, -np.inf
        for p in self.profiles:
            w, room = weights(p.grid), self.limit(p) - p.sse
            value = (w * p.coefficients).sum(0)
            unit = np.einsum("pb,pqb,qb->b", w, p.spread, w)
            reach = np.sqrt(np.maximum(room, 0.0) * np.maximum(unit, 0.0))
            allowed = room >= 0
            low = min(low, float((value - reach)[allowed].min()))
            high = max(high, float((value + reach)[allowed].max()))
        return low, high


def _whitening(covariance: Floats) -> Floats:
    """The inverse of the covariance's Cholesky factor."""
    return np.linalg.inv(np.linalg.cholesky(covariance))


def confidence_of(op: str, confidence: float) -> float:
    """A level that intervals can have."""
    return checks.number(op, "confidence", confidence, low=0.5, high=0.9999)
