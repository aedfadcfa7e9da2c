"""What TaxReport's figure shows: errors, names, titles, the staircase, and laws where there are."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
from matplotlib.figure import Figure

from fasttax.tax import TaxReport, figure


def panels(report: TaxReport, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Both axes, as they were saved."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(made: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(made)
        save(made, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw(report, io.BytesIO())
    return drawn[0].axes


def two_runs(**errors: float) -> TaxReport:
    report = TaxReport(0.6, 0.1)
    for run, factor in (("dpo", 0.08), ("sft", 0.04)):
        for k in range(1, 6):
            kl = 0.2 * k
            tax = factor * kl**0.5 + 1e-4 * (k % 2)
            report.add(f"{run}-{k}", 0.6 - tax, 0.1 + 0.1 * k, kl=kl, run=run, step=k, **errors)
    return report


def bars(axes: Any) -> int:
    return sum(len(c.lines[2][0].get_segments()) for c in axes.containers)


def test_both_panels_have_errors_names_and_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    for axes in panels(two_runs(se=0.01), monkeypatch):
        assert bars(axes) == 10
        names = {text.get_text() for text in axes.texts}
        assert names == {f"{run}-{k}" for run in ("dpo", "sft") for k in range(1, 6)}
        assert axes.get_title(loc="left")
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_no_error_is_drawn_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bars(axes) for axes in panels(two_runs(), monkeypatch)] == [0, 0]


def test_the_frontier_is_a_staircase_and_each_run_has_its_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gains, kls = panels(two_runs(), monkeypatch)
    assert [line.get_drawstyle() for line in gains.lines].count("steps-pre") == 1
    curves = [line for line in kls.lines if len(line.get_xdata()) > 10]
    assert len(curves) == 3  # of both runs together, and of each
    assert kls.get_title(loc="left").startswith("tax = ")


def test_no_law_is_drawn_whose_exponent_is_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    report = TaxReport(0.6, 0.1)
    for k, tax in enumerate((0.01, -0.02, 0.015), 1):
        report.add(f"c{k}", 0.6 - tax, 0.1 * k, kl=0.1 * k, run="dpo")
    _, kls = panels(report, monkeypatch)
    assert not [line for line in kls.lines if len(line.get_xdata()) > 10]
    assert kls.get_title(loc="left") == "No law of tax against KL: see the page"
    assert "no law" in str(report)
