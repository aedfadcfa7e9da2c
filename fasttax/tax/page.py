"""The page of measurements: figure, tables, laws, stages."""

from __future__ import annotations

import importlib.util
import io

from fasttax._base import page as pages
from fasttax.tax import figure, words
from fasttax.tax.measurements import Measurements


def html(measured: Measurements, title: str) -> str:
    """The page: figure, table of checkpoints, table by benchmark, laws, stages."""
    frontier = {id(c) for c in measured.pareto()}
    return pages.render(
        "tax/page.html",
        title=title,
        count=len(measured.checkpoints),
        picture=_figure(measured),
        methods=words.methods(measured),
        checkpoints=words.checkpoints(measured),
        best=[k for k, c in enumerate(measured.with_base()) if id(c) in frontier],
        taxes=words.benchmarks(measured),
        scores=_scores(measured),
        laws=measured.fits(),
        stages=list(words.stages(measured)),
    )


def _figure(measured: Measurements) -> str:
    """The picture, "" where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    stream = io.BytesIO()
    figure.draw(measured, stream)
    return pages.picture(stream.getvalue())


def _scores(measured: Measurements) -> list[list[str]]:
    """Headings, then a row a checkpoint, a column a benchmark, in the base's order; or nothing."""
    base = measured.base
    if all(len(c.capability) < 2 and len(c.alignment) < 2 for c in measured.with_base()):
        return []
    rows = [["checkpoint", *base.capability, *base.alignment]]
    for c in measured.with_base():
        scores = [c.capability[k] for k in base.capability]
        scores += [c.alignment[k] for k in base.alignment]
        rows.append([c.label, *(f"{v:.4g}" for v in scores)])
    return rows
