"""TaxReport: what each checkpoint of an alignment run gained, what it cost, and how the cost grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttax._base import checks, files
from fasttax.tax import page
from fasttax.tax.fits import KL_LAW, PowerLaw, fit_power_law

Score = float | Mapping[str, float]
FORMAT = "fasttax.TaxReport"


@dataclass(frozen=True)
class Checkpoint:
    """A model that was measured.

    `capability` and `alignment` by benchmark; `kl` in nats a token from the base; `distance`
    Fisher-weighted.
    """

    name: str
    run: str
    stage: str
    step: int | None
    capability: Mapping[str, float]
    alignment: Mapping[str, float]
    kl: float | None
    distance: float | None

    @property
    def label(self) -> str:
        """Run, stage and name, as far as there are any."""
        return " ".join(filter(None, (self.run, self.stage, self.name)))


@dataclass(frozen=True)
class Stage:
    """A stage's last checkpoint: its own tax, the share of capability that it kept, and that all
    stages so far have kept.
    """

    name: str
    checkpoint: str
    tax: float
    kept: float
    kept_so_far: float


def _scores(
    op: str, argument: str, value: Score, like: Mapping[str, float] | None
) -> dict[str, float]:
    given = value if isinstance(value, Mapping) else {argument: value}
    scores = {
        str(k): checks.number(
            op, f"{argument}[{str(k)!r}]" if isinstance(value, Mapping) else argument, v
        )
        for k, v in given.items()
    }
    if not scores:
        raise checks.fail(op, argument, "a number, or numbers by benchmark", value)
    if like is not None and scores.keys() != like.keys():
        raise checks.fail(
            op,
            argument,
            f"the base's benchmarks ({', '.join(like)})",
            ", ".join(scores),
            "measure the same ones for every checkpoint",
        )
    return scores


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


class TaxReport:
    """Capability, alignment, KL to the base and EWC distance of checkpoints, against the base model
    that they come from.

    Args:
        capability: the base's, a number or numbers by benchmark (their mean counts); higher is
            better, or lower where `lower_is_better`.
        alignment: the same of what alignment is for (a win rate, a reward, minus a loss).
        lower_is_better: which of "capability" and "alignment" are losses or perplexities.
        title: of the page.

    The tax of a checkpoint is the capability that it lost, in capability's unit, positive for a
    loss; its gain the alignment that it won (Askell et al. 2021, arXiv:2112.00861; Ouyang et al.
    2022, arXiv:2203.02155).

    >>> report = TaxReport(capability={"mmlu": 0.62, "gsm8k": 0.38}, alignment=0.31)
    >>> report.add("dpo-500", {"mmlu": 0.61, "gsm8k": 0.33}, 0.52, kl=0.8, run="dpo", step=500)
    >>> print(report)
    >>> report.html("tax.html")
    """

    def __init__(
        self,
        capability: Score,
        alignment: Score,
        *,
        lower_is_better: Iterable[str] = (),
        title: str = "Alignment tax",
    ) -> None:
        op = "TaxReport"
        sides = [lower_is_better] if isinstance(lower_is_better, str) else list(lower_is_better)
        self.lower_is_better = tuple(
            checks.choice(op, "lower_is_better", side, ("capability", "alignment"))
            for side in sides
        )
        self.title = str(title)
        self.base = Checkpoint(
            "base",
            "",
            "",
            0,
            _scores(op, "capability", capability, None),
            _scores(op, "alignment", alignment, None),
            0.0,
            0.0,
        )
        self.checkpoints: list[Checkpoint] = []

    def add(
        self,
        name: str,
        capability: Score,
        alignment: Score,
        *,
        kl: float | None = None,
        distance: float | None = None,
        run: str = "",
        stage: str = "",
        step: int | None = None,
    ) -> Checkpoint:
        """A checkpoint of `run`, in the order of training.

        `kl` as `kl_to_base` gives it, `distance` as `EWC.distance().total` does.

        Raises ValueError for a name that the run has already, other benchmarks than the base's, or
        numbers that are not finite.
        """
        op = "TaxReport.add"
        if any((c.name, c.run) == (name, run) for c in self.checkpoints):
            raise checks.fail(op, "name", f"one that run {run!r} does not have yet", name)
        made = Checkpoint(
            str(name),
            str(run),
            str(stage),
            None if step is None else int(checks.number(op, "step", step, low=0)),
            _scores(op, "capability", capability, self.base.capability),
            _scores(op, "alignment", alignment, self.base.alignment),
            None if kl is None else checks.number(op, "kl", kl, low=0),
            None if distance is None else checks.number(op, "distance", distance, low=0),
        )
        self.checkpoints.append(made)
        return made

    # --- what it says ---------------------------------------------------------------------------------------------

    def tax(self, checkpoint: Checkpoint) -> float:
        """Capability lost since the base, positive for a loss."""
        lost = _mean(self.base.capability) - _mean(checkpoint.capability)
        return -lost if "capability" in self.lower_is_better else lost

    def gain(self, checkpoint: Checkpoint) -> float:
        """Alignment won since the base."""
        won = _mean(checkpoint.alignment) - _mean(self.base.alignment)
        return -won if "alignment" in self.lower_is_better else won

    def runs(self) -> list[str]:
        return list(dict.fromkeys(c.run for c in self.checkpoints))

    def of(self, run: str | None) -> list[Checkpoint]:
        """A run's checkpoints, or with None all of them."""
        found = [c for c in self.checkpoints if run is None or c.run == run]
        if not found and run is not None:
            raise checks.fail(
                "TaxReport", "run", f"one of {', '.join(map(repr, self.runs())) or 'none yet'}", run
            )
        return found

    def pareto(self) -> list[Checkpoint]:
        """The base and the checkpoints that no other one beats in both gain and tax (as good in
        one, better in the other), by gain.
        """
        at = {id(c): (self.gain(c), -self.tax(c)) for c in (self.base, *self.checkpoints)}
        best = [
            c
            for c in (self.base, *self.checkpoints)
            if not any(
                o != at[id(c)] and o[0] >= at[id(c)][0] and o[1] >= at[id(c)][1]
                for o in at.values()
            )
        ]
        return sorted(best, key=self.gain)

    def tax_vs_kl(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a KL^b over the checkpoints whose KL was measured.

        b = 1/2 is proportional to the square root that over-optimisation of rewards is written in
        (Gao et al. 2022, arXiv:2210.10760). Raises ValueError with fewer than three.
        """
        some = [c for c in self.of(run) if c.kl is not None]
        return fit_power_law(
            [c.kl or 0.0 for c in some],
            [self.tax(c) for c in some],
            x_name="KL",
            y_name="tax",
            confidence=confidence,
        )

    def forgetting(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a step^b over a run's checkpoints, the power law of forgetting (Kalajdzievski 2024,
        arXiv:2401.05605). Raises ValueError with fewer than three that have a step.
        """
        some = [c for c in self.of(run) if c.step is not None]
        return fit_power_law(
            [float(c.step or 0) for c in some],
            [self.tax(c) for c in some],
            x_name="step",
            y_name="tax",
            confidence=confidence,
        )

    def compounding(self, run: str | None = None) -> list[Stage]:
        """A run's stages, each at its last checkpoint.

        `kept` is the ratio of capability after it and before it (before and after, of a loss): if
        each stage takes a like share of what is left, the shares multiply. Raises ValueError for
        capabilities that are not positive.
        """
        last: dict[str, Checkpoint] = {}
        for c in self.of(run):
            last[c.stage] = c
        stages, before, so_far = [], self.base, 1.0
        for name, c in last.items():
            old, new = _mean(before.capability), _mean(c.capability)
            if min(old, new) <= 0:
                raise checks.fail(
                    "TaxReport.compounding",
                    "capability",
                    "positive numbers, of which shares are kept",
                    f"{min(old, new):g}",
                )
            kept = old / new if "capability" in self.lower_is_better else new / old
            so_far *= kept
            stages.append(Stage(name, c.name, self.tax(c) - self.tax(before), kept, so_far))
            before = c
        return stages

    def fits(self) -> dict[str, PowerLaw | str]:
        """Every law that can be fitted, for all checkpoints and run by run, or why it can't."""
        found: dict[str, PowerLaw | str] = {}
        runs = [None, *self.runs()] if len(self.runs()) > 1 else [None]
        for run in runs:
            for law_of, law in ((KL_LAW, self.tax_vs_kl), ("forgetting", self.forgetting)):
                if law == self.forgetting and run is None and len(runs) > 1:
                    continue  # steps of different runs are not one axis
                name = law_of if run is None else f"{law_of}, {run}"
                try:
                    found[name] = law(run)
                except ValueError as error:
                    found[name] = str(error)
        return found

    def stage_lines(self) -> list[str]:
        """`compounding` in words, for the runs that have stages."""
        lines = []
        for run in self.runs():
            if not any(c.stage for c in self.of(run)):
                continue
            try:
                stages = self.compounding(run)
            except ValueError as error:
                lines.append(str(error))
                continue
            name = f"{run}: " if run else ""
            lines += [
                f"{name}{s.name or s.checkpoint} took {s.tax:+.4g} and kept {s.kept:.1%}; so far "
                f"{s.kept_so_far:.1%} of the base is kept"
                for s in stages
            ]
        return lines

    # --- what comes out -------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """JSON's: the measurements, which `load` reads, and what they say."""

        def one(c: Checkpoint) -> dict[str, Any]:
            own = {
                "name": c.name,
                "run": c.run,
                "stage": c.stage,
                "step": c.step,
                "capability": dict(c.capability),
                "alignment": dict(c.alignment),
            }
            return {
                **own,
                "kl": c.kl,
                "distance": c.distance,
                "tax": self.tax(c),
                "gain": self.gain(c),
            }

        frontier = [{"name": c.name, "run": c.run} for c in self.pareto()]
        laws = {
            name: law if isinstance(law, str) else law.as_dict()
            for name, law in self.fits().items()
        }
        base = {"capability": dict(self.base.capability), "alignment": dict(self.base.alignment)}
        return {
            "format": FORMAT,
            "version": 1,
            "title": self.title,
            "lower_is_better": list(self.lower_is_better),
            "base": base,
            "checkpoints": [one(c) for c in self.checkpoints],
            "pareto": frontier,
            "fits": laws,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """JSON, written whole or not at all."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaxReport:
        """From JSON that `save` wrote, or written by hand: {"base": {"capability": ...,
        "alignment": ...}, "checkpoints": [{"name": ..., "capability": ..., "alignment": ..., "kl":
            ..., ...}, ...]}. Raises ValueError that names the file and what is missing.
        """
        op = "TaxReport.load"
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise checks.fail(op, "path", "JSON", f"{path} ({error})") from None
        if (
            not isinstance(given, dict)
            or not isinstance(given.get("base"), dict)
            or not isinstance(given.get("checkpoints"), list)
        ):
            raise checks.fail(
                op,
                "path",
                'an object with "base" and "checkpoints"',
                str(path),
                "see help(TaxReport.load)",
            )
        base = given["base"]
        missing = [f"base.{key}" for key in ("capability", "alignment") if key not in base]
        rows = given["checkpoints"]
        missing += [
            f"checkpoints[{i}].{key}"
            for i, row in enumerate(rows)
            for key in ("name", "capability", "alignment")
            if not isinstance(row, dict) or key not in row
        ]
        if missing:
            raise checks.fail(
                op,
                "path",
                "base and checkpoints with what add() takes",
                f"{path} without {', '.join(missing)}",
            )
        optional = ("kl", "distance", "run", "stage", "step")
        try:
            report = cls(
                base["capability"],
                base["alignment"],
                lower_is_better=given.get("lower_is_better", ()),
                title=given.get("title", "Alignment tax"),
            )
            for row in rows:
                report.add(
                    row["name"],
                    row["capability"],
                    row["alignment"],
                    **{k: row[k] for k in optional if row.get(k) is not None},
                )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {path}: {error}") from None
        return report

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): the base, then every checkpoint; * marks those on the Pareto frontier."""
        best = {id(c) for c in self.pareto()}
        rows = []
        for c in (self.base, *self.checkpoints):
            tax, start = self.tax(c), abs(_mean(self.base.capability))
            numbers = [
                f"{_mean(c.capability):.4g}",
                f"{_mean(c.alignment):.4g}",
                f"{self.gain(c):+.4g}",
                f"{tax:+.4g}",
                f"{tax / start:+.1%}" if start else "",
                "" if c.kl is None else f"{c.kl:.4g}",
                "" if c.distance is None else f"{c.distance:.4g}",
            ]
            rows.append(
                [
                    c.label + (" *" if id(c) in best else ""),
                    "" if c.step is None else str(c.step),
                    *numbers,
                ]
            )
        return [
            "checkpoint",
            "step",
            "capability",
            "alignment",
            "gain",
            "tax",
            "tax %",
            "KL to base",
            "EWC distance",
        ], rows

    def __str__(self) -> str:
        headings, rows = self.table()
        widths = [max(len(row[k]) for row in [headings, *rows]) for k in range(len(headings))]
        aligned = [
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
            for row in (headings, *rows)
        ]
        lines = [self.title, "", *("  ".join(row).rstrip() for row in aligned)]
        lines += ["", "* no other one is better in both gain and tax", ""]
        lines += [f"{name}: {law}" for name, law in self.fits().items()]
        lines += self.stage_lines()
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """A PNG: gain against tax with the Pareto frontier, and tax against KL with its law.

        Needs matplotlib (`pip install 'fasttax[report]'`).
        """
        return files.whole(
            "TaxReport", path, lambda name: page.draw(self, self.fits()[KL_LAW], name)
        )

    def html(self, path: str | os.PathLike[str]) -> Path:
        """One page that needs no other file.

        The table, the laws, the stages and, where matplotlib is installed, the figure.
        """
        text = page.html(self)
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))
