"""The page of measurements: figure, tables, laws, stages."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection

from fasttax._base import page as pages
from fasttax.tax import figure, words
from fasttax.tax.measurements import Measurements
from fasttax.tax.words import Table


def html(measured: Measurements, title: str) -> str:
    """The page: figure, table of checkpoints, table by benchmark, laws, stages."""
    count = len(measured.checkpoints)
    parts = [
        f"<h1>{pages.escape(title)}</h1><p class=sub>{count} checkpoints against their base</p>",
        _figure(measured),
    ]
    methods, benchmarks = words.methods(measured), words.benchmarks(measured)
    if methods is not None:
        parts += ["<h2>Tax at equal gain</h2>", _table(methods)]
    parts += ["<h2>Checkpoints</h2>", _checkpoints(measured)]
    if benchmarks is not None:
        parts += ["<h2>Tax by benchmark</h2>", _table(benchmarks)]
    if any(len(c.capability) > 1 or len(c.alignment) > 1 for c in measured.with_base()):
        parts += ["<h2>Scores by benchmark</h2>", _benchmarks(measured)]
    laws = "".join(
        f"<dt>{pages.escape(name)}</dt><dd>{pages.escape(law)}</dd>"
        for name, law in measured.fits().items()
    )
    parts.append(f"<h2>How the tax grows</h2><dl>{laws}</dl>")
    stages = "".join(f"<li>{pages.escape(line)}</li>" for line in words.stages(measured))
    if stages:
        parts.append(f"<h2>Stages</h2><ul>{stages}</ul>")
    return pages.page(title, "".join(parts))


def _figure(measured: Measurements) -> str:
    """The picture, inside the page, or how to get one."""
    if importlib.util.find_spec("matplotlib") is None:
        return (
            "<p class=note>No figure: matplotlib is not installed (pip install "
            "'fasttax[report]').</p>"
        )
    stream = io.BytesIO()
    figure.draw(measured, stream)
    return pages.picture(
        stream.getvalue(), "Capability lost against alignment gained, and against KL to the base"
    )


def _table(table: Table, chosen: Collection[int] = ()) -> str:
    """Rows of text, with the note below."""
    rows = [[pages.escape(cell) for cell in row] for row in table.rows]
    note = f"<p class=note>{pages.escape(table.note)}</p>" if table.note else ""
    return pages.table(table.headings, rows, chosen) + note


def _checkpoints(measured: Measurements) -> str:
    frontier = {id(c) for c in measured.pareto()}
    best = {k for k, c in enumerate(measured.with_base()) if id(c) in frontier}
    return (
        _table(words.checkpoints(measured), best)
        + "<p class=note>±: one standard error, with the base's where it is known. KL in nats a "
        "token; EWC distance: sum of Fisher times squared change.</p>"
    )


def _benchmarks(measured: Measurements) -> str:
    """A row a checkpoint, a column a benchmark, in the base's order."""
    base = measured.base
    rows = []
    for c in measured.with_base():
        scores = [c.capability[k] for k in base.capability] + [
            c.alignment[k] for k in base.alignment
        ]
        rows.append([pages.escape(c.label), *(f"{v:.4g}" for v in scores)])
    return pages.table(["checkpoint", *base.capability, *base.alignment], rows)
