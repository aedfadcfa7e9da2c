"""TaxReport: measurements of an alignment run, as JSON, table, figure and page."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttax._base import checks, files
from fasttax.tax import figure, lm_eval, page, words
from fasttax.tax.checkpoints import SIDES, Checkpoint, Score
from fasttax.tax.measurements import Measurements

FORMAT, CHECKSUM = "fasttax.TaxReport", "checksum"
# of a checkpoint, where there is one
MEASURED = ("kl", "distance", "run", "stage", "step", "se", "seed", "n", "task_kl", "quadratic")


class TaxReport(Measurements):
    """Capability, alignment, KL to the base and EWC distance of checkpoints against their base.

    Args:
        capability: the base's, a number or numbers by benchmark (their mean counts); higher is
            better, or lower where `lower_is_better`.
        alignment: the same of what alignment is for (a win rate, a reward, minus a loss).
        lower_is_better: which of "capability" and "alignment" are losses or perplexities.
        title: of the page.
        se: standard errors of the base's scores, as `add` takes them. They are in every tax alike.
        n: items of the base's benchmarks, as `add` takes them.

    The tax of a checkpoint is the capability that it lost, in capability's unit, positive for a
    loss; its gain is the alignment that it won (Askell et al. 2021, arXiv:2112.00861; Ouyang et al.
    2022, arXiv:2203.02155).

    Example:
        >>> report = fasttax.tax.TaxReport({"mmlu": 0.62, "gsm8k": 0.38}, 0.31, n=1319)
        >>> scores = {"mmlu": 0.61, "gsm8k": 0.33}
        >>> point = report.add("dpo-500", scores, 0.52, run="dpo", step=500, n=1319)
        >>> page = report.html("tax.html")
    """

    def __init__(
        self,
        capability: Score,
        alignment: Score,
        *,
        lower_is_better: Iterable[str] = (),
        title: str = "Alignment tax",
        se: Score | None = None,
        n: int | Mapping[str, int] | None = None,
    ) -> None:
        super().__init__("TaxReport", capability, alignment, lower_is_better, se, n)
        self.title = str(title)

    def __str__(self) -> str:
        tables = [words.checkpoints(self), words.benchmarks(self), words.methods(self)]
        lines = [self.title]
        for table in tables:
            if table is not None:
                lines += ["", *words.aligned(table)]
        laws: dict[str, list[str]] = {}  # several can lack for the same reason
        for name, law in self.fits().items():
            laws.setdefault(str(law), []).append(name)
        lines += ["", *(f"{'; '.join(names)}: {law}" for law, names in laws.items())]
        lines += words.stages(self)
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
            "base": {side: dict(getattr(self.base, side)) for side in SIDES}
            | {name: dict(getattr(self.base, name)) for name in ("se", "n")},
            "checkpoints": [self._as_dict(c) for c in self.checkpoints],
            "pareto": [{"name": c.name, "run": c.run, "seed": c.seed} for c in self.pareto()],
            "tax_at": self._equal_gains(),
            "fits": laws,
        }

    def _equal_gains(self) -> dict[str, Any]:
        """`words.methods` in JSON: rows by method."""
        table = words.methods(self)
        if table is None:
            return {}
        return {
            name: dict(zip(table.headings[1:], cells, strict=True)) for name, *cells in table.rows
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
            "seed": c.seed,
            "se": dict(c.se),
            "n": dict(c.n),
            "task_kl": dict(c.task_kl),
            "quadratic": c.quadratic,
            "tax": self.tax(c),
            "tax_se": self.tax_error(c),
            "tax_by_benchmark": self.taxes(c),
            "gain": self.gain(c),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """JSON, written whole or not at all, with a checksum of what it says."""
        content = self.as_dict()
        content[CHECKSUM] = _checksum(content)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaxReport:
        """From JSON that `save` wrote, or that was written by hand.

        {"base": {"capability": ..., "alignment": ...},
         "checkpoints": [{"name": ..., "capability": ..., "alignment": ..., "kl": ...}, ...]}

        with what else `add` takes, where it was measured.

        Raises:
            ValueError: no JSON, or no such object; the text names the file and what is missing. Or
                other numbers than those of its checksum, where it has one.
        """
        op = "TaxReport.load"
        given = _read(op, path)
        base = given["base"]
        options: dict[str, Any] = {
            name: given[name] for name in ("lower_is_better", "title") if name in given
        }
        options |= {name: base[name] for name in ("se", "n") if base.get(name) is not None}
        try:
            report = cls(base["capability"], base["alignment"], **options)
            for row in given["checkpoints"]:
                measured = {k: row[k] for k in MEASURED if row.get(k) is not None}
                report.add(row["name"], row["capability"], row["alignment"], **measured)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {path}: {error}") from None
        return report

    @classmethod
    def from_lm_eval(
        cls,
        paths: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
        *,
        alignment: Iterable[str] = (),
        metrics: Mapping[str, str] | None = None,
        tasks: Iterable[str] | None = None,
    ) -> TaxReport:
        """From result files of lm-evaluation-harness (0.4: `lm_eval --output_path`).

        Args:
            paths: the base's first, then the checkpoints'. Each a results_*.json, or a folder that
                has some, of which the last by name (their names are dates) counts. A mapping names
                the checkpoints; of a list the names are the models'.
            alignment: the tasks that measure alignment (such as "ifeval"); the others measure
                capability. Without any, alignment is 0 everywhere: taxes stand, gains do not.
            metrics: {task: metric} where another is wanted than the first that the harness lists.
            tasks: those to read; by default all that the base's file has. A group's own score
                stands for its tasks where the harness gives one.

        Standard errors and numbers of items are taken over.

        Raises:
            ValueError: a file that is none of the harness's, a task that one of them lacks, or
                that was run with another version, another number of shots or another prompt's hash;
                scores that are better when lower, which have no common mean with the others.
        """
        return lm_eval.report(cls, paths, alignment, metrics or {}, tasks)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """A PNG: gain against tax with each run's frontier, and tax against KL with the laws.

        Runs that another beats beyond noise are grey. Needs matplotlib (`pip install
        'fasttax[report]'`).
        """
        return files.whole("TaxReport", path, lambda name: figure.draw(self, name))

    def html(self, path: str | os.PathLike[str]) -> Path:
        """One page that needs no other file.

        It has the table, the laws, the stages and, where matplotlib is installed, the figure.
        """
        text = page.html(self, self.title)
        return files.whole("TaxReport", path, lambda name: name.write_text(text, encoding="utf-8"))


def _checksum(content: Mapping[str, Any]) -> str:
    """Of a report's object without its checksum, whatever the order and layout of its text."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _read(op: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's object, with a base and checkpoints that have what `add` must be given."""
    way_out = 'write it anew with .save(), or by hand with "base" and "checkpoints" as load says'
    given = files.read_json(op, path, way_out)
    if CHECKSUM in given and given.pop(CHECKSUM) != _checksum(given):
        raise checks.fail(
            op,
            "path",
            "what was saved",
            f"{path}, whose checksum is of other numbers",
            "write it anew with .save(); after a change by hand delete its line 'checksum'",
        )
    if not isinstance(given.get("base"), dict) or not isinstance(given.get("checkpoints"), list):
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
