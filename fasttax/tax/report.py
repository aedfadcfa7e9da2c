"""TaxReport: measurements of an alignment run, as JSON, table, figure and page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fasttax._base import checks, files
from fasttax.tax import page
from fasttax.tax.measurements import KL_LAW, SIDES, Checkpoint, Measurements, Score

FORMAT = "fasttax.TaxReport"
MEASURED = ("kl", "distance", "run", "stage", "step")  # of a checkpoint, where there is one


class TaxReport(Measurements):
    """Capability, alignment, KL to the base and EWC distance of checkpoints against their base.

    Args:
        capability: the base's, a number or numbers by benchmark (their mean counts); higher is
            better, or lower where `lower_is_better`.
        alignment: the same of what alignment is for (a win rate, a reward, minus a loss).
        lower_is_better: which of "capability" and "alignment" are losses or perplexities.
        title: of the page.

    The tax of a checkpoint is the capability that it lost, in capability's unit, positive for a
    loss; its gain is the alignment that it won (Askell et al. 2021, arXiv:2112.00861; Ouyang et al.
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
        super().__init__("TaxReport", capability, alignment, lower_is_better)
        self.title = str(title)

    def __str__(self) -> str:
        headings, rows = self.table()
        lines = [self.title, "", *aligned([headings, *rows])]
        lines += ["", "* no other one is better in both gain and tax", ""]
        lines += [f"{name}: {law}" for name, law in self.fits().items()]
        lines += self.stage_lines()
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """JSON's: the measurements, which `load` reads, and what they say."""
        laws = {
            name: law if isinstance(law, str) else law.as_dict()
            for name, law in self.fits().items()
        }
        return {
            "format": FORMAT,
            "version": 1,
            "title": self.title,
            "lower_is_better": list(self.lower_is_better),
            "base": {side: dict(getattr(self.base, side)) for side in SIDES},
            "checkpoints": [self._as_dict(c) for c in self.checkpoints],
            "pareto": [{"name": c.name, "run": c.run} for c in self.pareto()],
            "fits": laws,
        }

    def _as_dict(self, c: Checkpoint) -> dict[str, Any]:
        return {
            "name": c.name,
            "run": c.run,
            "stage": c.stage,
            "step": c.step,
            "capability": dict(c.capability),
            "alignment": dict(c.alignment),
            "kl": c.kl,
            "distance": c.distance,
            "tax": self.tax(c),
            "gain": self.gain(c),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """JSON, written whole or not at all."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaxReport:
        """From JSON that `save` wrote, or that was written by hand.

        {"base": {"capability": ..., "alignment": ...},
         "checkpoints": [{"name": ..., "capability": ..., "alignment": ..., "kl": ...}, ...]}

        with what else `add` takes, where it was measured.

        Raises:
            ValueError: no JSON, or no such object; the text names the file and what is missing.
        """
        op = "TaxReport.load"
        given = _read(op, path)
        base = given["base"]
        options = {name: given[name] for name in ("lower_is_better", "title") if name in given}
        try:
            report = cls(base["capability"], base["alignment"], **options)
            for row in given["checkpoints"]:
                measured = {k: row[k] for k in MEASURED if row.get(k) is not None}
                report.add(row["name"], row["capability"], row["alignment"], **measured)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {path}: {error}") from None
        return report

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """A PNG: gain against tax with the Pareto frontier, and tax against KL with its law.

        Needs matplotlib (`pip install 'fasttax[report]'`).
        """
        law = self.fits()[KL_LAW]
        return files.whole("TaxReport", path, lambda name: page.draw(self, law, name))

    def html(self, path: str | os.PathLike[str]) -> Path:
        """One page that needs no other file.

        It has the table, the laws, the stages and, where matplotlib is installed, the figure.
        """
        text = page.html(self, self.title)
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _read(op: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's object, with a base and checkpoints that have what `add` must be given."""
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
    missing = [f"base.{key}" for key in SIDES if key not in given["base"]]
    missing += [
        f"checkpoints[{i}].{key}"
        for i, row in enumerate(given["checkpoints"])
        for key in ("name", *SIDES)
        if not isinstance(row, dict) or key not in row
    ]
    if missing:
        raise checks.fail(
            op,
            "path",
            "base and checkpoints with what add() takes",
            f"{path} without {', '.join(missing)}",
        )
    return given
