"""Measurements as rows of text, for the terminal and the page."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fasttax.tax.checkpoints import Checkpoint, mean
from fasttax.tax.frontier import TaxAt
from fasttax.tax.measurements import Measurements

HEADINGS = (
    "checkpoint",
    "step",
    "capability",
    "alignment",
    "gain",
    "tax",
    "tax %",
    "KL to base",
    "EWC distance",
)
QUADRATIC = "KL to 2nd order"  # a column where a checkpoint has it
SHARES = (0.5, 0.75, 1.0)  # of the gain that every method reaches, at which taxes are compared


@dataclass(frozen=True)
class Table:
    """Headings and rows of text, the first column a name, with a note below."""

    headings: Sequence[str]
    rows: list[list[str]]
    note: str


def checkpoints(measured: Measurements) -> Table:
    """The base, then every checkpoint; * marks those on the frontier."""
    best = {id(c) for c in measured.pareto()}
    rows = [_row(measured, c, " *" if id(c) in best else "") for c in measured.with_base()]
    headings = list(HEADINGS)
    if any(c.quadratic is not None for c in measured.checkpoints):
        headings.append(QUADRATIC)
        for row, c in zip(rows, measured.with_base(), strict=True):
            row.append(_cell(c.quadratic))
    return Table(headings, rows, "* no other one is better in both gain and tax")


def _row(measured: Measurements, c: Checkpoint, mark: str) -> list[str]:
    tax, start = measured.tax(c), abs(mean(measured.base.capability))
    error = measured.tax_error(c)
    around = ""
    if error is not None and c is not measured.base:
        around = f" ±{error:.2g}"
    return [
        c.label + mark,
        _cell(c.step, "d"),
        _cell(mean(c.capability)),
        _cell(mean(c.alignment)),
        _cell(measured.gain(c), "+.4g"),
        _cell(tax, "+.4g") + around,
        _cell(tax / start if start else None, "+.1%"),
        _cell(c.kl),
        _cell(c.distance),
    ]


def benchmarks(measured: Measurements) -> Table | None:
    """The tax of each benchmark beside the mean; None where there is one benchmark."""
    names = list(measured.base.capability)
    if len(names) < 2:
        return None
    rows = []
    for c in measured.checkpoints:
        taxes = measured.taxes(c)
        most = max(taxes, key=lambda name: taxes[name])
        cells = [f"{taxes[name]:+.4g}" for name in names]
        rows.append([c.label, f"{measured.tax(c):+.4g}", *cells, f"{most} {taxes[most]:+.4g}"])
    return Table(["tax by benchmark", "mean", *names, "most"], rows, "")


def methods(measured: Measurements) -> Table | None:
    """Each run's tax at equal gains; None where fewer than two runs gain, and without scipy."""
    if importlib.util.find_spec("scipy") is None:
        return None
    curves = measured.methods()
    reaches = [max(c.reach for c in of_run) for of_run in curves.values()]
    reach = min((r for r in reaches if r > 0), default=0.0)
    if len(curves) < 2 or reach <= 0:
        return None
    gains = [reach * share for share in SHARES]
    found = [measured.tax_at(gain) for gain in gains]
    worse = measured.dominated()
    rows = [
        [name, *(_at(at.get(name), len(curves[name])) for at in found), _beaten(worse, name)]
        for name in curves
        if any(name in at for at in found)
    ]
    headings = ["tax at equal gain", *(f"gain {gain:.3g}" for gain in gains), "beaten by"]
    return Table(
        headings,
        rows,
        "mean over seeds (how many), ± half of its 95 % interval: Student's t over seeds, or a "
        "lone seed's standard errors; beaten: at a half, three quarters and all of its own gain, "
        "beyond noise",
    )


def _beaten(worse: dict[str, list[str]], name: str) -> str:
    return ", ".join(worse.get(name, []))


def _at(at: TaxAt | None, seeds: int) -> str:
    """A tax at a gain in words."""
    if at is None:
        return "not reached"
    around = ""
    if math.isfinite(at.high):
        around = f" ±{(at.high - at.low) / 2:.2g}"
    count = f"{at.seeds}"
    if at.seeds < seeds:
        count = f"{at.seeds} of {seeds} reach it"
    return f"{at.tax:.4g}{around} ({count})"


def stages(measured: Measurements) -> list[str]:
    """`compounding` in words, for the runs that have stages."""
    lines = []
    for run in measured.runs():
        mine = measured.of(run)
        if not any(c.stage for c in mine):
            continue
        for seed in dict.fromkeys(c.seed for c in mine):
            try:
                found = measured.compounding(run, seed)
            except ValueError as error:
                lines.append(str(error))
                continue
            where = " ".join(filter(None, (run, "" if seed is None else f"seed {seed}")))
            name = f"{where}: " if where else ""
            lines += [
                f"{name}{s.name or s.checkpoint} took {s.tax:+.4g} and kept {s.kept:.1%}; so far "
                f"{s.kept_so_far:.1%} of the base is kept"
                for s in found
            ]
    return lines


def aligned(table: Table) -> list[str]:
    """Lines of text: the first column to the left, the others to the right; then the note."""
    rows = [list(table.headings), *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    if table.note:
        lines += ["", table.note]
    return lines


def _cell(value: float | None, form: str = ".4g") -> str:
    """A number of the table; empty where nothing was measured."""
    return "" if value is None else format(value, form)
