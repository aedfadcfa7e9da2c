"""How often nominal 95 % intervals of the tax's laws hold the truth.

Taxes 0.3 KL^0.7 with errors of 0.04 at KL 0.2 to 8, in six kinds of noise; 400 sets each. The
report is told what a user's report is told: runs and their checkpoints, no standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasttax.tax import TaxReport, fit_power_law

Floats = NDArray[np.float64]
A, B, ERROR, AT = 0.3, 0.7, 0.04, 4.0
CASES = {
    "independent": "errors of checkpoints alone",
    "shared base": "the base measured with the same error",
    "poor base": "the base measured with twice that error",
    "autocorrelated": "AR(1) along the run, correlation 0.8",
    "pooled levels": "three runs, each off by twice the error",
    "pooled slopes": "three runs, each law larger or smaller by 20 %",
}


@dataclass(frozen=True)
class Coverage:
    """Shares of sets whose interval holds the truth: of b, of a, of the law at KL 4.

    `open` is the share of sets whose b has no upper end, `width` the median of b's intervals.
    """

    exponent: float
    scale: float
    law: float
    open: float
    width: float


def noise(case: str, x: Floats, rng: np.random.Generator) -> Floats:
    """One run's errors."""
    white = rng.normal(0, ERROR, len(x))
    if case == "shared base":
        return white + rng.normal(0, ERROR)
    if case == "poor base":
        return white + rng.normal(0, 2 * ERROR)
    if case == "pooled levels":
        return white + rng.normal(0, 2 * ERROR)
    if case == "pooled slopes":
        return white + rng.normal(0, 0.2) * A * x**B
    if case == "autocorrelated":
        for k in range(1, len(x)):
            white[k] = 0.8 * white[k - 1] + 0.6 * white[k]  # keeps the variance
    return white


def report(case: str, points: int, rng: np.random.Generator) -> TaxReport:
    """A set of measurements."""
    made = TaxReport(10.0, 0.0)
    x = np.geomspace(0.2, 8, points)
    runs = 3 if case.startswith("pooled") else 1
    for run in range(runs):
        taxes = A * x**B + noise(case, x, rng)
        for k, (kl, tax) in enumerate(zip(x, taxes, strict=True)):
            made.add(str(k), 10.0 - float(tax), 0.0, kl=float(kl), run=f"run {run}")
    return made


def covered(case: str, points: int, sets: int, seed: int, told: bool = True) -> Coverage:
    """The coverage of `sets` sets; without `told` errors are taken to be independent."""
    rng = np.random.default_rng(seed)
    held, open_above, widths = np.zeros(3), 0, []
    for _ in range(sets):
        made = report(case, points, rng)
        law = made.tax_vs_kl()
        if not told:
            x, y = zip(*law.points, strict=True)
            law = fit_power_law(x, y)
        _, low, high = law.predict(AT)
        held += [
            law.b_interval[0] <= B <= law.b_interval[1],
            law.a_interval[0] <= A <= law.a_interval[1],
            low <= A * AT**B <= high,
        ]
        open_above += not law.bounded
        widths.append(law.b_interval[1] - law.b_interval[0])
    exponent, scale, at = (held / sets).tolist()
    return Coverage(exponent, scale, at, open_above / sets, float(np.median(widths)))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of docs/statistics.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_coverage", description=__doc__)
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--points", type=int, nargs="+", default=[7, 12])
    args = parser.parse_args(argv)
    print("| noise | points a run | b | a | law at 4 | b's width | independent fit: b, a, law |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for case in args.cases:
        for points in args.points:
            c = covered(case, points, args.sets, seed=1)
            old = covered(case, points, args.sets, seed=1, told=False)
            print(
                f"| {case} | {points} | {c.exponent:.3f} | {c.scale:.3f} | {c.law:.3f} | "
                f"{c.width:.2f} | {old.exponent:.3f}, {old.scale:.3f}, {old.law:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
