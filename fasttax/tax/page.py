"""The figure and the page of measurements."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fasttax._base import page as pages
from fasttax.tax.fits import PowerLaw
from fasttax.tax.measurements import KL_LAW, Checkpoint, Measurements

COLORS = ("#2e6f9e", "#d1495b", "#3c8d5a", "#7b4fa3", "#c98a1b", "#4d4d4d")
GRAY = COLORS[-1]


def draw(measured: Measurements, law: PowerLaw | str, to: Any) -> None:
    """A PNG into a file's name or a binary stream.

    On the left is tax against gain with the frontier, on the right tax against KL with its law.

    Args:
        measured: the checkpoints.
        law: of tax against KL, or why there is none.
        to: what matplotlib's savefig takes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
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
    named: list[tuple[Any, str]] = []
    for k, run in enumerate(measured.runs()):
        mine, color = measured.of(run), COLORS[k % len(COLORS)]
        line = _plot(left, measured, mine, "o-", color=color, linewidth=0.8, zorder=3)
        named.append((line, run or "checkpoints"))
        known = [c for c in mine if c.kl is not None]
        right.plot(
            [c.kl for c in known], [measured.tax(c) for c in known], "o", color=color, zorder=3
        )
    named.append((left.plot(0, 0, "*", color=GRAY, markersize=13, zorder=4)[0], "base"))
    best = measured.pareto()
    if len(best) > 1:
        style: dict[str, Any] = {"color": "#999999", "linewidth": 1, "zorder": 2}
        named.append((_plot(left, measured, best, "--", **style), "Pareto frontier"))
    left.invert_yaxis()
    left.set(
        xlabel="alignment gained (right is better)",
        ylabel="capability lost (reversed: up is better)",
    )
    _legend(left, named)
    if isinstance(law, PowerLaw):
        _plot_law(right, law)
    right.invert_yaxis()
    right.set(xlabel="KL to base, nats a token", ylabel="capability lost (reversed)")
    figure.savefig(to, format="png")


def _legend(axes: Any, named: Sequence[tuple[Any, str]]) -> None:
    """The lines with their names as they are.

    matplotlib reads a label that it is given: it leaves out one that begins with "_", and takes
    dollar signs for mathematics.
    """
    legend = axes.legend([line for line, _ in named], ["-"] * len(named), frameon=False, fontsize=9)
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _plot(
    axes: Any, measured: Measurements, some: Sequence[Checkpoint], form: str, **style: Any
) -> Any:
    """Tax against gain, as a line of matplotlib's."""
    gains, taxes = [measured.gain(c) for c in some], [measured.tax(c) for c in some]
    return axes.plot(gains, taxes, form, **style)[0]


def _plot_law(axes: Any, law: PowerLaw) -> None:
    """The law from 0 to its last point, with its band."""
    x = np.linspace(0, max(p for p, _ in law.points), 100)[1:]
    y, low, high = np.array([law.predict(float(v)) for v in x]).T
    axes.plot(x, y, color=GRAY, linewidth=1, zorder=2)
    axes.fill_between(x, low, high, color=GRAY, alpha=0.12, linewidth=0, zorder=1)
    title = f"tax = {law.a:.3g} KL^{law.b:.2g}, {law.confidence:.0%} band"
    axes.set_title(title, loc="left", fontsize=10)


def html(measured: Measurements, title: str) -> str:
    """The page: figure, table of checkpoints, table by benchmark, laws, stages."""
    fits = measured.fits()
    count = len(measured.checkpoints)
    parts = [
        f"<h1>{pages.escape(title)}</h1><p class=sub>{count} checkpoints against their base</p>",
        _figure(measured, fits[KL_LAW]),
        "<h2>Checkpoints</h2>",
        _checkpoints(measured),
    ]
    if any(len(c.capability) > 1 or len(c.alignment) > 1 for c in measured.with_base()):
        parts.append("<h2>By benchmark</h2>" + _benchmarks(measured))
    laws = "".join(
        f"<dt>{pages.escape(name)}</dt><dd>{pages.escape(law)}</dd>" for name, law in fits.items()
    )
    parts.append(f"<h2>How the tax grows</h2><dl>{laws}</dl>")
    stages = "".join(f"<li>{pages.escape(line)}</li>" for line in measured.stage_lines())
    if stages:
        parts.append(f"<h2>Stages</h2><ul>{stages}</ul>")
    return pages.page(title, "".join(parts))


def _figure(measured: Measurements, law: PowerLaw | str) -> str:
    """The picture, inside the page, or how to get one."""
    if importlib.util.find_spec("matplotlib") is None:
        return (
            "<p class=note>No figure: matplotlib is not installed (pip install "
            "'fasttax[report]').</p>"
        )
    stream = io.BytesIO()
    draw(measured, law, stream)
    return pages.picture(
        stream.getvalue(), "Capability lost against alignment gained, and against KL to the base"
    )


def _checkpoints(measured: Measurements) -> str:
    headings, rows = measured.table()
    frontier = {id(c) for c in measured.pareto()}
    best = {k for k, c in enumerate(measured.with_base()) if id(c) in frontier}
    return (
        pages.table(headings, [[pages.escape(cell) for cell in row] for row in rows], best)
        + "<p class=note>* and bold: no other one is better in both gain and tax. KL in nats a "
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
