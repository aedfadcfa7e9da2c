"""Power laws y = a x^b by least squares, with intervals that hold for few points.

The intervals are profiles of the likelihood, in closed form over a grid of b.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasttax._base import checks

Floats = NDArray[np.float64]
HIGHEST = 6.0  # exponents from 0 (y does not depend on x) to a sixth power
GRID = np.linspace(0.0, HIGHEST, 4801)
ANGLES = 200_001


@functools.cache
def t_quantile(freedom: int, confidence: float) -> float:
    """The t within whose +-t Student's t of `freedom` degrees lies at probability `confidence`.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), which is summed by
    trapezoids.
    """
    angle = np.linspace(0.0, math.pi / 2, ANGLES)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, share / share[-1], angle)))


@dataclass(frozen=True)
class PowerLaw:
    """The law y = a x^b fitted to `points`, with intervals of `confidence`.

    b runs from 0 to 6: an interval that meets the 6 is open above (inf). The interval of a quantity
    holds the values that some (a, b) gives it whose sum of squared errors is at most
    SSE (1 + t^2 / (n - 2)): a profile of the likelihood (Bates & Watts 1988, section 6.1), exact in
    `a` and better than a linearised standard error in `b` when points are few.
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

    def predict(self, x: float) -> tuple[float, float, float]:
        """(y, low, high) of the law at x > 0: of the mean there, not of a further measurement."""
        op = "PowerLaw.predict"
        x = checks.number(op, "x", x, low=0, open_low=True)
        xs, ys = (np.array(v) for v in zip(*self.points, strict=True))
        low, high = _interval_at(
            x, xs, ys, self.b, _limit(self.residual**2 * (len(xs) - 2), ys, self.confidence)
        )
        return self.a * x**self.b, low, high

    def __str__(self) -> str:
        a, b, (al, ah), (bl, bh) = self.a, self.b, self.a_interval, self.b_interval
        return (
            f"{self.y_name} = {a:.3g} {self.x_name}^{b:.3g}, a in [{al:.3g}, {ah:.3g}], b in "
            f"[{bl:.3g}, {bh:.3g}] "
            f"({self.confidence:.0%}), R2 {self.r2:.2f}, {len(self.points)} points"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no inf: an open end of b's interval is None."""
        low, high = self.b_interval
        return {
            "law": f"{self.y_name} = a * {self.x_name}^b",
            "a": self.a,
            "b": self.b,
            "a_interval": list(self.a_interval),
            "b_interval": [low, high if math.isfinite(high) else None],
            "r2": self.r2,
            "residual": self.residual,
            "confidence": self.confidence,
            "points": [list(p) for p in self.points],
        }


def _profile(at: float, x: Floats, y: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """(w . y, w . w, the least SSE over y_at) of y = y_at w with w = (x / at)^b, for each b."""
    w = np.exp(np.outer(b, np.log(x / at)))
    wy, ww = w @ y, (w * w).sum(1)
    return wy, ww, np.maximum(y @ y - wy * wy / ww, 0.0)


def _least(x: Floats, y: Floats) -> tuple[float, float]:
    """(b, SSE) of the best law: the grid's best, then two finer grids around it."""
    middle = math.exp(float(np.log(x).mean()))
    b, step = GRID, float(GRID[1])
    for _ in range(3):
        sse = _profile(middle, x, y, b)[2]
        best = int(sse.argmin())
        found, least = float(b[best]), float(sse[best])
        b, step = np.clip(np.linspace(found - step, found + step, 401), 0.0, HIGHEST), step / 200
    return found, least


def _limit(sse: float, y: Floats, confidence: float) -> float:
    """The SSE that is allowed, where `sse` is the least."""
    freedom = len(y) - 2
    rounding = 1e-14 * float(y @ y)  # of SSE, where the points lie on a law
    return (sse + rounding) * (1 + t_quantile(freedom, confidence) ** 2 / freedom)


def _interval_at(at: float, x: Floats, y: Floats, b: float, limit: float) -> tuple[float, float]:
    """The interval of y_at, the law's value at `at`.

    SSE(y_at, b) is quadratic in y_at, so that for each b that is allowed the ends are its roots.
    `b` is the best one, which is allowed whatever the grid.
    """
    wy, ww, sse = _profile(at, x, y, np.append(GRID, b))
    reach = np.sqrt(np.maximum(limit - sse, 0.0) / ww)
    allowed = sse <= limit
    return float((wy / ww - reach)[allowed].min()), float((wy / ww + reach)[allowed].max())


def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    x_name: str = "x",
    y_name: str = "y",
    confidence: float = 0.95,
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

    Raises:
        ValueError: fewer than 3 points with x > 0, fewer than 2 different x, or values that are
            negative (x) or not finite.
    """
    op = "fit_power_law"
    confidence = checks.number(op, "confidence", confidence, low=0.5, high=0.9999)
    if len(x) != len(y):
        raise checks.fail(op, "y", f"{len(x)} values, as x has", f"{len(y)}")
    pairs = [
        (checks.number(op, x_name, p, low=0), checks.number(op, y_name, q))
        for p, q in zip(x, y, strict=True)
    ]
    points = tuple(sorted(p for p in pairs if p[0] > 0))
    if len(points) < 3 or len({p for p, _ in points}) < 2:
        raise checks.fail(
            op,
            "points",
            f"at least 3 with {x_name} > 0, at 2 places or more",
            f"{len(points)} at {len({p for p, _ in points})}",
            "measure more checkpoints",
        )
    xs, ys = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    b, sse = _least(xs, ys)
    w = xs**b
    a = float(w @ ys / (w @ w))
    spread = float(((ys - ys.mean()) ** 2).sum())
    limit = _limit(sse, ys, confidence)
    middle = math.exp(float(np.log(xs).mean()))
    allowed = GRID[_profile(middle, xs, ys, GRID)[2] <= limit]
    low, high = float(min([b, *allowed[:1]])), float(max([b, *allowed[-1:]]))
    return PowerLaw(
        x_name=x_name,
        y_name=y_name,
        points=points,
        a=a,
        a_interval=_interval_at(1.0, xs, ys, b, limit),
        b=b,
        b_interval=(low, math.inf if high >= HIGHEST else high),
        r2=1 - sse / spread if spread > 0 else 0.0,
        residual=math.sqrt(sse / (len(points) - 2)),
        confidence=confidence,
    )
