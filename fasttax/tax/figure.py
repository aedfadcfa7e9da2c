"""The figure: what methods cost at equal gain, and tax against KL with its laws."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fasttax.tax.checkpoints import Checkpoint
from fasttax.tax.fits import PowerLaw
from fasttax.tax.measurements import Fitted, Measurements

COLORS = ("#2e6f9e", "#d1495b", "#3c8d5a", "#7b4fa3", "#c98a1b", "#4d4d4d")
MARKERS = ("o", "s", "^", "D", "v", "P")  # tell runs apart that are all grey
GRAY, BEATEN = "#4d4d4d", "#c4c4c4"
MOST_LABELS = 24  # checkpoints beyond which names would cover each other
Placed = Sequence[tuple[float, Checkpoint]]  # checkpoints, each at a place along an axis
STEPS = 60  # places at which a method's mean over seeds is drawn


def draw(measured: Measurements, to: Any) -> None:
    """A PNG into a file's name or a binary stream.

    On the left tax against gain: checkpoints with their standard errors, each run's mean frontier
    with its interval over seeds, grey where another run beats it beyond noise, and the staircase
    of what nothing beats. On the right tax against KL, with the same errors and the runs' laws.

    Args:
        measured: the checkpoints.
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
    figure = Figure(figsize=(12, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee", zorder=0)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, linestyle=":")
    _gains(left, measured)
    _kls(right, measured)
    figure.savefig(to, format="png")


def _gains(axes: Any, measured: Measurements) -> None:
    """Tax against gain."""
    worse = _dominated(measured)
    named: list[tuple[Any, str]] = []
    for k, run in enumerate(measured.runs()):
        color = BEATEN if run in worse else COLORS[k % len(COLORS)]
        at = [(measured.gain(c), c) for c in measured.of(run)]
        line = _points(axes, measured, at, (color, MARKERS[k % len(MARKERS)]))
        _frontier(axes, measured, run, color)
        named.append((line, run or "checkpoints"))
    named.append((axes.plot(0, 0, "*", color=GRAY, markersize=13, zorder=4)[0], "base"))
    best = measured.pareto()
    if len(best) > 1:
        # at most this tax for at least this gain: flat to the left of each point
        gains, taxes = [measured.gain(c) for c in best], [measured.tax(c) for c in best]
        style: dict[str, Any] = {"color": "#999999", "linewidth": 1, "zorder": 2}
        stairs = axes.plot(gains, taxes, "--", drawstyle="steps-pre", **style)[0]
        named.append((stairs, "Pareto frontier"))
    _names(axes, measured, [(measured.gain(c), c) for c in measured.checkpoints])
    axes.invert_yaxis()
    axes.set_title("What alignment costs (grey: beaten beyond noise)", loc="left", fontsize=10)
    axes.set(
        xlabel="alignment gained (right is better)",
        ylabel="capability lost (reversed: up is better)",
    )
    _legend(axes, named)


def _dominated(measured: Measurements) -> set[str]:
    """The runs to be grey; none without scipy, whose quantiles tell noise."""
    if importlib.util.find_spec("scipy") is None:
        return set()
    return set(measured.dominated())


def _points(
    axes: Any,
    measured: Measurements,
    at: Placed,
    style: tuple[str, str],
) -> Any:
    """The taxes of checkpoints at their places, with what standard errors are known."""
    color, marker = style
    x, y = [place for place, _ in at], [measured.tax(c) for _, c in at]
    line = axes.plot(x, y, marker, color=color, markersize=4, zorder=3)[0]
    known = [(place, measured.tax(c), measured.tax_error(c)) for place, c in at]
    bars = [(place, tax, error) for place, tax, error in known if error is not None]
    if bars:
        x, y, reach = (list(values) for values in zip(*bars, strict=True))
        axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=color, elinewidth=0.8, zorder=2)
    return line


def _frontier(axes: Any, measured: Measurements, run: str, color: str) -> None:
    """The mean over seeds as far as all of them reach, and its interval where there is one."""
    reach = min(curve.reach for curve in measured.methods()[run])
    if reach <= 0 or importlib.util.find_spec("scipy") is None:
        return
    gains = np.linspace(0, reach, STEPS)
    found = [measured.tax_at(float(gain))[run] for gain in gains]
    axes.plot(gains, [at.tax for at in found], "-", color=color, linewidth=1.2, zorder=3)
    ends = [(at.low, at.high) for at in found]
    if all(math.isfinite(high) for _, high in ends):
        low, high = (list(end) for end in zip(*ends, strict=True))
        axes.fill_between(gains, low, high, color=color, alpha=0.15, linewidth=0, zorder=1)


def _names(axes: Any, measured: Measurements, at: Placed) -> None:
    """The checkpoints' names beside their points, where they are few."""
    if len(at) > MOST_LABELS:
        return
    for place, c in at:
        text = axes.annotate(
            c.name,
            (place, measured.tax(c)),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color="#666666",
        )
        text.set_parse_math(False)


def _kls(axes: Any, measured: Measurements) -> None:
    """Tax against KL, with the law of all and of each run where it is one."""
    every: list[tuple[float, Checkpoint]] = []
    for k, run in enumerate(measured.runs()):
        at = [(c.kl, c) for c in measured.of(run) if c.kl is not None]
        _points(axes, measured, at, (COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]))
        every += at
    _names(axes, measured, every)
    laws: list[tuple[Fitted | str, str | None]]
    laws = [(law, None) for law in measured.kl_laws([None])]
    runs = measured.runs()
    if len(runs) > 1:
        laws += [(law, COLORS[k % len(COLORS)]) for k, law in enumerate(measured.kl_laws(runs))]
    for law, of_run in laws:
        if isinstance(law, PowerLaw):
            _law(axes, law, of_run)
    whole = laws[0][0]
    title = "No law of tax against KL: see the page"
    if isinstance(whole, PowerLaw):
        flag = ", LACK OF FIT" if whole.lack_of_fit else ""
        title = f"tax = {whole.a:.3g} KL^{whole.b:.2g}, {whole.confidence:.0%} band{flag}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.invert_yaxis()
    axes.set(xlabel="KL to base, nats a token", ylabel="capability lost (reversed)")


def _law(axes: Any, law: PowerLaw, color: str | None) -> None:
    """The law of all, grey with its band, or a run's as a thin line, to its last point."""
    x = np.linspace(0, max(p for p, _ in law.points), 60)[1:]
    if color is not None:
        axes.plot(x, law.a * x**law.b, color=color, linewidth=0.8, zorder=2)
        return
    y, low, high = np.array([law.predict(float(v)) for v in x]).T
    axes.plot(x, y, color=GRAY, linewidth=1, zorder=2)
    axes.fill_between(x, low, high, color=GRAY, alpha=0.12, linewidth=0, zorder=1)


def _legend(axes: Any, named: Sequence[tuple[Any, str]]) -> None:
    """The lines with their names as they are.

    matplotlib reads a label that it is given: it leaves out one that begins with "_", and takes
    dollar signs for mathematics.
    """
    legend = axes.legend([line for line, _ in named], ["-"] * len(named), frameon=False, fontsize=9)
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
