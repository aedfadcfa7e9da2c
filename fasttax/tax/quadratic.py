"""The quadratic law y = a x + b x^2 by least squares."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fasttax._base import checks
from fasttax.tax.fits import points_of, r2_of, residual_of
from fasttax.tax.noise import Noise
from fasttax.tax.profiles import Fit, Law, confidence_of


@dataclass(frozen=True)
class QuadraticLaw:
    """The law y = a x + b x^2 fitted to `points`, with intervals of `confidence`.

    Linear least squares with Student's t, or where errors may hang together the union over what is
    plausible of that (`fasttax.tax.noise`).

    Example:
        >>> law = fasttax.tax.fit_quadratic([1, 2, 3, 4], [1.1, 4.2, 8.9, 16.1])
        >>> tax, low, high = law.predict(2.5)
    """

    x_name: str
    y_name: str
    points: tuple[tuple[float, float], ...]
    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]
    r2: float  # 1 - SSE / sum (y - mean y)^2
    residual: float  # standard deviation around the law, sqrt(SSE / (n - 2))
    confidence: float
    fit: Fit = field(repr=False, compare=False)

    def predict(self, x: float) -> tuple[float, float, float]:
        """(y, low, high) of the law at x >= 0: of the mean there, not of a further measurement."""
        x = checks.number("QuadraticLaw.predict", "x", x, low=0)
        low, high = self.fit.interval(lambda b: np.array([[x], [x * x]]))
        return self.a * x + self.b * x * x, low, high

    def __str__(self) -> str:
        (al, ah), (bl, bh) = self.a_interval, self.b_interval
        return (
            f"{self.y_name} = {self.a:.3g} {self.x_name} + {self.b:.3g} {self.x_name}^2, a in "
            f"[{al:.3g}, {ah:.3g}], b in [{bl:.3g}, {bh:.3g}] ({self.confidence:.0%}), "
            f"R2 {self.r2:.2f}, {len(self.points)} points"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "law": f"{self.y_name} = a * {self.x_name} + b * {self.x_name}^2",
            "a": self.a,
            "b": self.b,
            "a_interval": list(self.a_interval),
            "b_interval": list(self.b_interval),
            "r2": self.r2,
            "residual": self.residual,
            "confidence": self.confidence,
            "points": [list(p) for p in self.points],
        }


def fit_quadratic(
    x: Sequence[float],
    y: Sequence[float],
    *,
    x_name: str = "x",
    y_name: str = "y",
    confidence: float = 0.95,
    runs: Sequence[str] | None = None,
    shared: float | Sequence[float] = 0.0,
) -> QuadraticLaw:
    """Fits y = a x + b x^2, which goes through the origin.

    Args:
        x: as of `fit_power_law`.
        y: as of `fit_power_law`.
        x_name: as of `fit_power_law`.
        y_name: as of `fit_power_law`.
        confidence: as of `fit_power_law`.
        runs: as of `fit_power_law`.
        shared: as of `fit_power_law`.

    Raises:
        ValueError: fewer than 3 points with x > 0, fewer than 2 different x, or values that are
            negative (x) or not finite.
        ModuleNotFoundError: scipy is not installed.

    Example:
        >>> law = fasttax.tax.fit_quadratic([1, 2, 3, 4], [1.1, 4.2, 8.9, 16.1])
        >>> law.b_interval[0] > 0  # curved
        True
    """
    op = "fit_quadratic"
    confidence = confidence_of(op, confidence)
    points, noise = points_of(op, x, y, x_name, y_name, runs, shared)
    return _fitted(points, noise, confidence, x_name, y_name)


@functools.lru_cache(maxsize=32)  # a report's table, figure and page ask for the same laws
def _fitted(
    points: tuple[tuple[float, float], ...],
    noise: Noise,
    confidence: float,
    x_name: str,
    y_name: str,
) -> QuadraticLaw:
    xs, ys = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    columns = np.stack([xs, xs * xs])[:, :, None]
    law = Law(grid=np.ones(1), columns=lambda b: columns, slope=None)
    size = xs / math.sqrt(float((xs * xs).mean()))
    fit = Fit(law, ys, noise.covariances(size), confidence)
    a, b = (float(v) for v in fit.coefficients)
    errors = ys - a * xs - b * xs * xs
    return QuadraticLaw(
        x_name=x_name,
        y_name=y_name,
        points=points,
        a=a,
        a_interval=fit.interval(lambda b: np.array([[1.0], [0.0]])),
        b=b,
        b_interval=fit.interval(lambda b: np.array([[0.0], [1.0]])),
        r2=r2_of(ys, errors),
        residual=residual_of(errors),
        confidence=confidence,
        fit=fit,
    )
