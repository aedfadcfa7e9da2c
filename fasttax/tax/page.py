"""A TaxReport's figure and page."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttax._base import page as pages
from fasttax.tax.fits import KL_LAW, PowerLaw

if TYPE_CHECKING:
    from fasttax.tax.report import Checkpoint, TaxReport

COLORS = ("#2e6f9e", "#d1495b", "#3c8d5a", "#7b4fa3", "#c98a1b", "#4d4d4d")


def draw(report: TaxReport, law: PowerLaw | str, to: Any) -> None:
    """A PNG into a file's name or a binary stream. law: of tax against KL, if there is one."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "TaxReport.plot: matplotlib is not installed; run `pip install 'fasttax[report]'`",
            name="matplotlib",
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: the caller's figures and backend stay as they are
    figure = Figure(figsize=(11, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", zorder=0)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for k, run in enumerate(report.runs()):
        mine = report.of(run)
        color, label = COLORS[k % len(COLORS)], run or "checkpoints"
        left.plot(
            [report.gain(c) for c in mine],
            [report.tax(c) for c in mine],
            "o-",
            color=color,
            linewidth=0.8,
            label=label,
            zorder=3,
        )
        some = [c for c in mine if c.kl is not None]
        right.plot([c.kl for c in some], [report.tax(c) for c in some], "o", color=color, zorder=3)
    left.plot(0, 0, "*", color="#4d4d4d", markersize=13, label="base", zorder=4)
    best = report.pareto()
    if len(best) > 1:
        left.plot(
            [report.gain(c) for c in best],
            [report.tax(c) for c in best],
            "--",
            color="#999999",
            linewidth=1,
            label="Pareto frontier",
            zorder=2,
        )
    left.invert_yaxis()
    left.set(
        xlabel="alignment gained (right is better)",
        ylabel="capability lost (reversed: up is better)",
    )
    left.legend(frameon=False, fontsize=9)
    if isinstance(law, PowerLaw):
        x = np.linspace(0, max(p for p, _ in law.points), 100)[1:]
        y, low, high = np.array([law.predict(float(v)) for v in x]).T
        right.plot(x, y, color="#4d4d4d", linewidth=1, zorder=2)
        right.fill_between(x, low, high, color="#4d4d4d", alpha=0.12, linewidth=0, zorder=1)
        right.set_title(
            f"tax = {law.a:.3g} KL^{law.b:.2g}, {law.confidence:.0%} band", loc="left", fontsize=10
        )
    right.invert_yaxis()
    right.set(xlabel="KL to base, nats a token", ylabel="capability lost (reversed)")
    figure.savefig(to, format="png")


def html(report: TaxReport) -> str:
    headings, rows = report.table()
    frontier = {id(c) for c in report.pareto()}
    best = {k for k, c in enumerate((report.base, *report.checkpoints)) if id(c) in frontier}
    fits = report.fits()
    parts = [
        f"<h1>{pages.escape(report.title)}</h1><p class=sub>{len(report.checkpoints)} checkpoints "
        "against their base</p>"
    ]
    if importlib.util.find_spec("matplotlib") is None:
        parts.append(
            "<p class=note>No figure: matplotlib is not installed (pip install "
            "'fasttax[report]').</p>"
        )
    else:
        stream = io.BytesIO()
        draw(report, fits[KL_LAW], stream)
        parts.append(
            pages.picture(
                stream.getvalue(),
                "Capability lost against alignment gained, and against KL to the base",
            )
        )
    parts.append(
        "<h2>Checkpoints</h2>"
        + pages.table(headings, [[pages.escape(cell) for cell in row] for row in rows], best)
    )
    parts.append(
        "<p class=note>* and bold: no other one is better in both gain and tax. KL in nats a "
        "token; EWC distance: sum of Fisher times squared change.</p>"
    )
    if any(
        len(c.capability) > 1 or len(c.alignment) > 1 for c in (report.base, *report.checkpoints)
    ):
        parts.append("<h2>By benchmark</h2>" + _benchmarks(report))
    laws = "".join(
        f"<dt>{pages.escape(name)}</dt><dd>{pages.escape(law)}</dd>" for name, law in fits.items()
    )
    parts.append(f"<h2>How the tax grows</h2><dl>{laws}</dl>")
    stages = report.stage_lines()
    if stages:
        parts.append(
            "<h2>Stages</h2><ul>"
            + "".join(f"<li>{pages.escape(line)}</li>" for line in stages)
            + "</ul>"
        )
    return pages.page(report.title, "".join(parts))


def _benchmarks(report: TaxReport) -> str:
    def cells(c: Checkpoint) -> list[str]:
        return [
            pages.escape(c.label),
            *(
                f"{v:.4g}"
                for v in (*c.capability.values(), *(c.alignment[k] for k in report.base.alignment))
            ),
        ]

    headings = ["checkpoint", *report.base.capability, *report.base.alignment]
    return pages.table(headings, [cells(c) for c in (report.base, *report.checkpoints)])
