"""Power laws y = a x^b by least squares, with intervals that hold for few points.

Beside the plain law stands y = c + a x^b; where that fits better than chance lets it, the plain one
is flagged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fasttax._base import checks
from fasttax.tax.noise import Noise
from fasttax.tax.profiles import Fit, Law, confidence_of, profile, scipy_stats
from fasttax.tax.profiles import t_quantile as t_quantile

Floats = NDArray[np.float64]
HIGHEST = 6.0  # exponents from 0 (y does not depend on x) to a sixth power
GRID = np.linspace(0.0, HIGHEST, 4801)
COARSE = np.linspace(0.0, HIGHEST, 1201)  # where many covariances are gone through
COARSEST = np.linspace(0.0, HIGHEST, 241)  # and points are many, too, as a log's
MANY = 200
LEAST_SHIFTED = 0.05  # the least b of c + a x^b: at 0 both columns are one
LARGEST = 1e20  # of x and y, or 1 / that: sixth powers, products with them and squares are floats
SURPRISING = 0.05  # a law is flagged whose misfit has a lower probability


@dataclass(frozen=True)
class ShiftedLaw:
    """The law y = c + a x^b, b from 0.05 to 6, an interval that meets the 6 being open above.

    `p` is the probability of a sum of squared errors that is lower by as much or more, had the
    plain law held: of F with 1 and n - 3 degrees.

    Example:
        >>> kl, tax = [0.1, 0.4, 0.9, 1.6, 2.5], [0.31, 0.42, 0.49, 0.6, 0.71]
        >>> law = fasttax.tax.fit_power_law(kl, tax)
        >>> law.shifted.c > 0.1  # the tax at KL 0, which the plain law has at 0
        True
    """

    a: float
    b: float
    b_interval: tuple[float, float]
    c: float
    c_interval: tuple[float, float]
    r2: float
    p: float

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no inf: an open end of b's interval is None."""
        return {
            "a": self.a,
            "b": self.b,
            "b_interval": _ends(self.b_interval),
            "c": self.c,
            "c_interval": list(self.c_interval),
            "r2": self.r2,
            "p": self.p,
        }


@dataclass(frozen=True)
class PowerLaw:
    """The law y = a x^b fitted to `points`, with intervals of `confidence`.

    b runs from 0 to 6: an interval that meets the 6 is open above (inf). The interval of a quantity
    holds the values that some (a, b) gives it whose sum of squared errors is at most
    SSE (1 + t^2 / (n - 2)): a profile of the likelihood (Bates & Watts 1988, section 6.1), exact in
    `a` and better than a linearised standard error in `b` when points are few. Where errors may
    hang together it is the union over what is plausible of that (`fasttax.tax.noise`).

    Example:
        >>> law = fasttax.tax.fit_power_law([0.1, 0.4, 0.9, 1.6], [0.03, 0.062, 0.091, 0.119])
        >>> tax, low, high = law.predict(1.0)
        >>> low < tax < high
        True
    """

    x_name: str
    y_name: str
    points: tuple[tuple[float, float], ...]
    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]
    # 1 - SSE / sum (y - mean y)^2; negative where the mean fits better: the law has no free
    # intercept
    r2: float
    residual: float  # standard deviation around the law, sqrt(SSE / (n - 2))
    confidence: float
    shifted: ShiftedLaw | None  # of the same points; None for fewer than 4
    fit: Fit = field(repr=False, compare=False)

    @property
    def lack_of_fit(self) -> bool:
        """Whether the shifted law fits better than chance would let it (p < 0.05)."""
        return self.shifted is not None and self.shifted.p < SURPRISING

    @property
    def bounded(self) -> bool:
        """Whether the points bound b: no law is printed where they do not."""
        return math.isfinite(self.b_interval[1])

    def predict(self, x: float) -> tuple[float, float, float]:
        """(y, low, high) of the law at x > 0: of the mean there, not of a further measurement."""
        op = "PowerLaw.predict"
        x = checks.number(op, "x", x, low=0, open_low=True)
        middle = middle_of(np.array([p for p, _ in self.points]))
        low, high = self.fit.interval(lambda b: _powers(np.array([x / middle]), b))
        return self.a * x**self.b, low, high

    def __str__(self) -> str:
        a, b, (al, ah), (bl, bh) = self.a, self.b, self.a_interval, self.b_interval
        text = (
            f"{self.y_name} = {a:.3g} {self.x_name}^{b:.3g}, a in [{al:.3g}, {ah:.3g}], b in "
            f"[{bl:.3g}, {bh:.3g}] "
            f"({self.confidence:.0%}), R2 {self.r2:.2f}, {len(self.points)} points"
        )
        if self.shifted is None or not self.lack_of_fit:
            return text
        s = self.shifted
        return (
            f"{text}; LACK OF FIT (p = {s.p:.2g}): {self.y_name} = {s.c:.3g} + {s.a:.3g} "
            f"{self.x_name}^{s.b:.3g} fits better, c in [{s.c_interval[0]:.3g}, "
            f"{s.c_interval[1]:.3g}]"
        )

    def why_not(self) -> str:
        """Why no law is printed, where b is not bounded."""
        return (
            f"no law: {len(self.points)} points do not bound the exponent (b in "
            f"[{self.b_interval[0]:.3g}, inf), {self.confidence:.0%}); measure more checkpoints, "
            f"farther apart in {self.x_name} or with smaller errors"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no inf: an open end of b's interval is None."""
        shifted = None if self.shifted is None else self.shifted.as_dict()
        return {
            "law": f"{self.y_name} = a * {self.x_name}^b",
            "a": self.a,
            "b": self.b,
            "a_interval": list(self.a_interval),
            "b_interval": _ends(self.b_interval),
            "r2": self.r2,
            "residual": self.residual,
            "confidence": self.confidence,
            "lack_of_fit": self.lack_of_fit,
            "shifted": shifted,
            "points": [list(p) for p in self.points],
        }


def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    x_name: str = "x",
    y_name: str = "y",
    confidence: float = 0.95,
    runs: Sequence[str] | None = None,
    shared: float | Sequence[float] = 0.0,
) -> PowerLaw:
    """Fits y = a x^b, which goes through the origin, by least squares in y itself.

    y may be negative: a model can gain where it is expected to lose. Points with x = 0 are left
    out, for the law is 0 there whatever a and b are.

    Args:
        x: numbers >= 0.
        y: as many.
        x_name: x in the law's text and in errors.
        y_name: the same of y.
        confidence: of the intervals, from 0.5 to 0.9999.
        runs: the run of each point. Errors of a run's neighbours in x may then be correlated, and
            runs may differ in level and size; without it errors are taken to be independent, and
            intervals are too narrow where they are not.
        shared: the variance of the error that all points have in common, as taxes share their
            base's, in units of the variance of a point's own; where that is not known, values that
            it may have.

    Raises:
        ValueError: fewer than 3 points with x > 0, fewer than 2 different x, values that are
            negative (x) or not finite, or y that is 0 at all points.
        ModuleNotFoundError: scipy is not installed.

    Example:
        >>> kl, tax = [0.1, 0.4, 0.9, 1.6], [0.03, 0.062, 0.091, 0.119]
        >>> law = fasttax.tax.fit_power_law(kl, tax, x_name="KL", y_name="tax")
        >>> print(round(law.b, 1))  # the tax grows with the root of the KL
        0.5
    """
    op = "fit_power_law"
    confidence = confidence_of(op, confidence)
    points, noise = points_of(op, x, y, x_name, y_name, runs, shared)
    if not any(q for _, q in points):
        expected, got = "another value than 0", f"{len(points)} times 0, which any exponent fits"
        raise checks.fail(op, y_name, expected, got, "measure it on more items")
    return _fitted(points, noise, confidence, x_name, y_name)


@functools.lru_cache(maxsize=32)  # a report's table, figure and page ask for the same laws
def _fitted(
    points: tuple[tuple[float, float], ...],
    noise: Noise,
    confidence: float,
    x_name: str,
    y_name: str,
) -> PowerLaw:
    xs, ys = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    middle = middle_of(xs)
    unit = xs / middle
    plain = Law(
        grid=_grid(noise, len(ys)),
        columns=lambda b: _powers(unit, b)[None],
        slope=lambda b: unit**b * np.log(unit),
    )
    size = np.ones_like(ys) if noise.runs is None else _typical(plain, ys)
    covariances = noise.covariances(size)
    fit = Fit(plain, ys, covariances, confidence)
    errors = ys - float(fit.coefficients[0]) * unit**fit.b
    return PowerLaw(
        x_name=x_name,
        y_name=y_name,
        points=points,
        a=float(fit.coefficients[0]) * middle**-fit.b,
        a_interval=fit.interval(lambda b: _powers(np.array([1 / middle]), b)),
        b=fit.b,
        b_interval=_open_above(fit.b_interval()),
        r2=r2_of(ys, errors),
        residual=residual_of(errors),
        confidence=confidence,
        shifted=_shifted(fit, covariances, unit, middle),
        fit=fit,
    )


def points_of(
    op: str,
    x: Sequence[float],
    y: Sequence[float],
    x_name: str,
    y_name: str,
    runs: Sequence[str] | None,
    shared: float | Sequence[float],
) -> tuple[tuple[tuple[float, float], ...], Noise]:
    """The points with x > 0 by x, at least 3, and what their errors share.

    Raises:
        ValueError: too few, all at one x, out of a float's range, or no such points.
    """
    for name, values in (("y", y), ("runs", runs)):
        if values is not None and len(values) != len(x):
            raise checks.fail(op, name, f"{len(x)} values, as x has", f"{len(values)}")
    pairs = [
        (checks.number(op, x_name, p, low=0), checks.number(op, y_name, q))
        for p, q in zip(x, y, strict=True)
    ]
    names = [""] * len(pairs) if runs is None else [str(run) for run in runs]
    kept = sorted((p, name) for p, name in zip(pairs, names, strict=True) if p[0] > 0)
    points = tuple(p for p, _ in kept)
    different = len({p for p, _ in points})
    if len(points) < 3 or different < 2:
        raise checks.fail(
            op,
            "points",
            f"at least 3 with {x_name} > 0, at 2 places or more",
            f"{len(points)} at {different}",
            "measure more checkpoints" if points else f"give checkpoints their {x_name}",
        )
    for name, most in (
        (x_name, points[-1][0]),
        (y_name, max(abs(value) for _, value in points)),
    ):
        if most and not 1 / LARGEST <= most <= LARGEST:
            raise checks.fail(
                op,
                name,
                f"values of which the largest is from {1 / LARGEST:g} to {LARGEST:g}",
                f"{most:g}, whose powers are no floats",
                "give it in another unit",
            )
    several = [shared] if isinstance(shared, (int, float)) else shared
    variances = tuple(checks.number(op, "shared", value, low=0) for value in several)
    names_kept = None if runs is None else tuple(name for _, name in kept)
    return points, Noise(names_kept, variances)


def r2_of(y: Floats, errors: Floats) -> float:
    """The share of y's spread around its mean that errors do not have; 0 where it has none."""
    spread = float(((y - y.mean()) ** 2).sum())
    return 1 - float(errors @ errors) / spread if spread > 0 else 0.0


def residual_of(errors: Floats) -> float:
    """The standard deviation around a law of two coefficients."""
    return math.sqrt(float(errors @ errors) / (len(errors) - 2))


def middle_of(x: Floats) -> float:
    """The geometric mean, in units of which powers neither over- nor underflow."""
    return math.exp(float(np.log(x).mean()))


def _grid(noise: Noise, n: int) -> Floats:
    """Exponents to look through: fewer where each costs more. The best is found between them."""
    if noise.runs is None:
        return GRID
    return COARSE if n <= MANY else COARSEST


def _powers(x: Floats, b: Floats) -> Floats:
    """(n, B): x^b for each b."""
    return np.exp(np.outer(np.log(x), b))


def _typical(law: Law, y: Floats) -> Floats:
    """The law's values (n,) where errors are independent, scaled to a mean square of 1."""
    found = profile(law, law.grid, y, np.eye(len(y)))
    values = law.columns(law.grid[[found.best]])[0, :, 0]
    return values / math.sqrt(float((values * values).mean()))


def _shifted(
    plain: Fit, covariances: Sequence[Floats], unit: Floats, middle: float
) -> ShiftedLaw | None:
    """The shifted law of the same points, held against the plain one under its own covariance."""
    y = plain.y
    if len(y) < 4 or len({*unit.tolist()}) < 3:
        return None
    grid = COARSE if len(y) <= MANY else COARSEST
    grid = grid[grid >= LEAST_SHIFTED]
    law = Law(
        grid=grid,
        columns=lambda b: np.stack([np.ones((len(unit), len(b))), _powers(unit, b)]),
        slope=plain.law.slope,
    )
    fit = Fit(law, y, covariances, plain.confidence)
    same = profile(plain.law, plain.law.grid, y, fit.best.whiten)
    # rounding stands for errors where the points lie on a law
    least = fit.sse + same.rounding
    ratio = max(float(same.sse.min()) + same.rounding - least, 0.0) / (least / fit.freedom)
    c, a = (float(v) for v in fit.coefficients)
    errors = y - c - a * unit**fit.b
    return ShiftedLaw(
        a=a * middle**-fit.b,
        b=fit.b,
        b_interval=_open_above(fit.b_interval()),
        c=c,
        c_interval=fit.interval(lambda b: np.outer([1.0, 0.0], np.ones_like(b))),
        r2=r2_of(y, errors),
        p=float(scipy_stats().f.sf(ratio, 1, fit.freedom)),
    )


def _open_above(interval: tuple[float, float]) -> tuple[float, float]:
    """An interval of b whose end is the highest that was looked at has none."""
    low, high = interval
    return low, math.inf if high >= HIGHEST else high


def _ends(interval: tuple[float, float]) -> list[float | None]:
    """For JSON, which has no inf."""
    return [end if math.isfinite(end) else None for end in interval]
