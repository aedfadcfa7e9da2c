"""The figure: every method's frontier of tax against gain, and the taxes at one share of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fasttax.demo.compare import Comparison, Estimate
from fasttax.demo.methods import METHODS, PLAIN, TARGET, title

COLORS = (
    "#8d99ae",
    "#4d4d4d",
    "#c98a1b",
    "#3c8d5a",
    "#1b5e3a",
    "#2e6f9e",
    "#17becf",
    "#d1495b",
    "#e377c2",
    "#7b4fa3",
)
STEPS = 40  # places at which a frontier is drawn


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the runs that were measured."""
    comparison = Comparison(results["points"])
    # no pyplot: the caller's figures and backend stay as they are
    figure = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", zorder=0)
    colors = dict(zip(METHODS, COLORS, strict=True))
    for method in comparison.rows:
        _frontier(left, comparison, method, colors[method])
    for row in results["points"]:
        if row["method"] == PLAIN and row["share"] is not None:
            left.plot(row["share"], row["tax"], "*", color="#222222", markersize=11, zorder=4)
    left.plot(0, 0, "o", color="#222222", zorder=4)
    left.set(
        xlabel="share of plain fine-tuning's gain on held-out answers (right is better)",
        ylabel="tax: nats a token lost on general text (reversed)",
    )
    left.invert_yaxis()
    left.set_title("Frontiers: ● the base, ★ plain fine-tuning", loc="left", fontsize=10)
    found = {m: at for m in comparison.rows if (at := comparison.at(m, TARGET)) is not None}
    _bars(right, found, colors)
    figure.suptitle(
        f"{results['model']['name']}: bands and bars are 95 % intervals over {comparison.over}",
        fontsize=10,
        color="#555555",
    )
    figure.savefig(path, format="png")


def _frontier(axes: Axes, comparison: Comparison, method: str, color: str) -> None:
    """The points, and the mean over seeds with its interval."""
    rows = [row for of_seed in comparison.rows[method].values() for row in of_seed]
    axes.plot([r["share"] for r in rows], [r["tax"] for r in rows], ".", color=color, zorder=3)
    found = [(x, comparison.at(method, float(x))) for x in np.linspace(0.05, 1, STEPS)]
    known = [(x, at) for x, at in found if at is not None]
    if not known:
        return
    x = [x for x, _ in known]
    axes.plot(x, [at.mean for _, at in known], color=color, linewidth=1.3, zorder=3)
    if all(math.isfinite(at.high) for _, at in known):
        low, high = [at.low for _, at in known], [at.high for _, at in known]
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0, zorder=1)


def _bars(axes: Axes, found: dict[str, Estimate], colors: dict[str, str]) -> None:
    """The taxes at TARGET, the lowest on top."""
    order = sorted(found, key=lambda method: -found[method].mean)
    for y, method in enumerate(order):
        at = found[method]
        axes.barh(y, at.mean, color=colors[method], height=0.6, zorder=2)
        if math.isfinite(at.high):
            reach = at.high - at.mean
            axes.errorbar(at.mean, y, xerr=reach, color="#222222", capsize=2, linewidth=1, zorder=3)
    axes.set_yticks(range(len(order)), [title(method) for method in order], fontsize=8)
    axes.set_xlabel("tax, nats a token (left is better)")
    axes.set_title(f"At {TARGET:.0%} of plain fine-tuning's gain", loc="left", fontsize=10)
