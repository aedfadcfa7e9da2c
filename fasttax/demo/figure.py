"""The Pareto figure: alignment to the right, capability upwards, the base model as a mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

STYLE = {
    "base": ("#4d4d4d", "*"),
    "plain": ("#d1495b", "o"),
    "kl": ("#2e6f9e", "s"),
    "ewc": ("#3c8d5a", "^"),
    "both": ("#7b4fa3", "D"),
}
Point = tuple[float, float, float | None, float | None]


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the runs that were measured."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = (
        {"base": results["base"], **results["runs"]} if "base" in results else dict(results["runs"])
    )
    with plt.rc_context(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
        }
    ):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.8), dpi=140, width_ratios=(1.5, 1), layout="constrained"
        )
        points = {name: _point(row, "answer_nll", "perplexity") for name, row in rows.items()}
        _panel(left, points, rows)
        left.set(
            xlabel="held-out answer NLL, nats a token (reversed: right is better)",
            ylabel="held-out general perplexity (reversed: up is better)",
        )
        left.invert_xaxis()
        left.invert_yaxis()
        _frontier(left, points)
        left.set_title("Capability against alignment", loc="left", fontweight="bold")
        words = {name: _point(row, "preference", "last_word", 100) for name, row in rows.items()}
        _panel(right, words, rows)
        right.set(
            xlabel="preference accuracy, % (right is better)",
            ylabel="last-word accuracy, % (up is better)",
        )
        right.set_title("The same in accuracies", loc="left", fontweight="bold")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        title = (
            f"{results['model']['name']}: {results['settings']['steps']} steps each, bars are one "
            "standard error of the paired change from the base"
        )
        figure.suptitle(title, fontsize=10, color="#555555")
        figure.savefig(path, format="png")
        plt.close(figure)


def _point(row: dict[str, Any], x: str, y: str, scale: float = 1.0) -> Point:
    return (
        scale * row["metrics"][x]["mean"],
        scale * row["metrics"][y]["mean"],
        _bar(row, x, scale),
        _bar(row, y, scale),
    )


def _bar(row: dict[str, Any], metric: str, scale: float) -> float | None:
    """Error of the paired change from the base model.

    What separates runs, where items differ far more than runs do.
    """
    if "against_base" not in row:
        return None
    if metric == "perplexity":
        return float(row["metrics"][metric]["mean"] * row["against_base"]["general_nll"]["se"])
    return float(scale * row["against_base"][metric]["se"])


def _panel(axes: Axes, points: dict[str, Point], rows: dict[str, Any]) -> None:
    for name, (x, y, dx, dy) in points.items():
        color, marker = STYLE[name]
        axes.errorbar(
            x,
            y,
            xerr=dx,
            yerr=dy,
            color=color,
            marker=marker,
            markersize=14 if name == "base" else 9,
            markeredgecolor="white",
            elinewidth=1,
            capsize=2,
            alpha=0.95,
            linestyle="none",
            label=rows[name]["label"],
            zorder=3,
        )
    if "base" in points:
        x, y = points["base"][:2]
        axes.axhline(y, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=1)
        axes.axvline(x, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=1)
    axes.grid(color="#eeeeee", zorder=0)
    axes.margins(0.12)


def _frontier(axes: Axes, points: dict[str, Point]) -> None:
    """A line through the points that no other one beats in both; lower is better on either axis."""
    xy = sorted(p[:2] for p in points.values())
    best = [p for p in xy if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in xy)]
    if len(best) > 1:
        axes.plot(
            [p[0] for p in best],
            [p[1] for p in best],
            color="#999999",
            linewidth=1,
            linestyle="--",
            zorder=2,
            label="not beaten in both",
        )
