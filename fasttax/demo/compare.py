"""Methods at equal alignment: the tax of each at a share of plain fine-tuning's gain.

A method's frontier, seed by seed, goes through the base, its grid and the plain run, which is the
end of every grid: strength 0, alpha 1, the whole learning rate, the last step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasttax.demo.methods import METHODS, PLAIN, SHARES, title
from fasttax.tax import TaxReport
from fasttax.tax.fits import t_quantile
from fasttax.tax.frontier import Curve, Point

CONFIDENCE = 0.95
Row = Mapping[str, Any]
Units = dict[int, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over units (seeds, or the items of a lone seed) with its standard error and interval.

    The interval is Student's t.
    """

    mean: float
    se: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Of one number a unit; of a lone unit nothing is known beside it."""
        n = len(values)
        mean = sum(values) / n
        if n < 2:
            return Estimate(mean, math.inf, -math.inf, math.inf)
        se = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
        reach = t_quantile(n - 1, CONFIDENCE) * se
        return Estimate(mean, se, mean - reach, mean + reach)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.se:.3f}"


class Comparison:
    """The methods of a demo, finished or not, side by side.

    Args:
        points: results.json's: `method`, `seed`, `label`, `share` of plain's gain, `tax`, and the
            change of each held-out passage's NLL in `changes`.
    """

    def __init__(self, points: Sequence[Row]) -> None:
        plain = {row["seed"]: row for row in points if row["method"] == PLAIN}
        # a seed whose plain run gained nothing has no shares
        self.seeds = [seed for seed, row in plain.items() if row["share"] is not None]
        self.rows: dict[str, dict[int, list[Row]]] = {}
        for method in METHODS:
            mine = {
                seed: [r for r in points if (r["method"], r["seed"]) == (method, seed)]
                for seed in self.seeds
            }
            if any(mine.values()):
                # a seed that was interrupted has no frontier yet
                self.rows[method] = {seed: rows for seed, rows in mine.items() if rows}
        self._plain = plain

    @property
    def over(self) -> str:
        """What intervals are over."""
        if len(self.seeds) > 1:
            return f"{len(self.seeds)} training seeds"
        return "the held-out passages of one training seed"

    def units(self, method: str, share: float) -> Units:
        """A method's tax at a share, by seed, or of one seed by item."""
        found: Units = {}
        for seed, rows in self.rows.get(method, {}).items():
            ends = [*rows, self._plain[seed]]
            by_point = {Point(row["share"], row["tax"], 0.0): row for row in ends}
            curve = Curve(list(by_point))
            if curve.reach < share:
                continue
            parts = [(weight, by_point.get(point)) for weight, point in curve.between(share)]
            if len(self.seeds) > 1:
                found[seed] = sum(weight * row["tax"] for weight, row in parts if row)
                continue
            for item in range(len(rows[0]["changes"])):
                found[item] = sum(weight * row["changes"][item] for weight, row in parts if row)
        return found

    def at(self, method: str, share: float) -> Estimate | None:
        """A method's tax at a share of plain's gain; None where it is not measured."""
        units = self.units(method, share)
        return Estimate.of(list(units.values())) if units else None

    def difference(
        self, one: str, other: str, share: float, factor: float = 1.0
    ) -> Estimate | None:
        """One's tax - factor * the other's, in pairs over the units that both have."""
        a, b = self.units(one, share), self.units(other, share)
        both = [a[unit] - factor * b[unit] for unit in a if unit in b]
        return Estimate.of(both) if both else None

    def best(self, share: float, without: str = "") -> str | None:
        """The method of the lowest mean tax at a share."""
        found = {m: self.at(m, share) for m in self.rows if m != without}
        means = {m: estimate.mean for m, estimate in found.items() if estimate is not None}
        return min(means, key=lambda m: means[m]) if means else None

    def reach(self, method: str) -> tuple[float, float]:
        """The smallest and largest share that a method's own grid has with every seed."""
        of_seed = [[row["share"] for row in rows] for rows in self.rows[method].values()]
        return max(map(min, of_seed)), min(map(max, of_seed))

    def step_time(self, method: str) -> float | None:
        """Seconds of training over those of the seed's plain run, the median; None for none."""
        ratios = [
            row["train_seconds"] / self._plain[seed]["train_seconds"]
            for seed, rows in self.rows[method].items()
            for row in rows
            if row["train_seconds"]
        ]
        return statistics.median(ratios) if ratios else None

    def as_json(self) -> dict[str, Any]:
        """For results.json: method -> share -> tax with error and interval."""
        return {
            "over": self.over,
            "shares": SHARES,
            "methods": {
                method: {
                    "title": title(method),
                    "step_time": self.step_time(method),
                    "tax": {
                        f"{share:g}": None if at is None else vars(at) | {"units": len(units)}
                        for share in SHARES
                        for units in [self.units(method, share)]
                        for at in [self.at(method, share)]
                    },
                }
                for method in self.rows
            },
        }


def tax_report(results: Mapping[str, Any]) -> TaxReport:
    """What `fasttax tax` reads: a run for each method with its plain end, gains as shares."""
    base = results["base"]["metrics"]
    report = TaxReport(
        base["general_nll"]["mean"],
        0.0,
        lower_is_better=("capability",),
        title=f"Tax of {results['model']['name']} against the share of plain fine-tuning's gain",
    )
    comparison = Comparison(results["points"])
    plain = {row["seed"]: row for row in results["points"] if row["method"] == PLAIN}
    for method, by_seed in comparison.rows.items():
        for seed, rows in by_seed.items():
            for row in [*rows, plain[seed]]:
                report.add(
                    row["label"],
                    row["metrics"]["general_nll"]["mean"],
                    row["share"],
                    kl=row["metrics"]["kl_general"]["mean"],
                    run=title(method),
                    seed=seed,
                    se=row["against_base"]["general_nll"]["se"],
                )
    return report
