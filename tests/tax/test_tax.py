"""fasttax.tax: the law's fit and intervals, the report's arithmetic, files, page, KL to the base.

The fit is held against brute force, the intervals to their coverage.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttax
from fasttax import cli
from fasttax.tax import TaxReport, fit_power_law
from fasttax.tax.fits import t_quantile

# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "confidence", "value"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (5, 0.95, 2.5706),
        (30, 0.95, 2.0423),
        (5, 0.99, 4.0321),
    ],
)
def test_student_t(
    freedom: int, confidence: float, value: float
) -> None:  # R's qt((1 + confidence) / 2, freedom)
    assert t_quantile(freedom, confidence) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b"), [(0.02, 0.5), (3.0, 2.0), (-0.4, 1.0), (0.1, 0.0), (7.0, 0.123)]
)
def test_a_law_is_found_again(a: float, b: float) -> None:
    x = [0.0, 0.5, 1.0, 7.0, 40.0]
    law = fit_power_law(x, [a * v**b if v else 0.0 for v in x])
    assert len(law.points) == 4
    assert (law.a, law.b) == pytest.approx((a, b), rel=1e-5, abs=1e-6)
    assert law.predict(10.0) == pytest.approx((a * 10**b,) * 3, rel=2e-3)
    assert law.a_interval[0] <= law.a <= law.a_interval[1]
    assert law.b_interval[0] <= law.b <= law.b_interval[1] <= law.b_interval[0] + 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_least_squares_and_its_profile_against_brute_force(seed: int) -> None:
    """No (a, b) on a fine grid is better, and what is nearly as good lies in the intervals."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.1, 5, 6)
    y = rng.normal(0, 1) * x ** rng.uniform(0, 3) + rng.normal(0, 0.2, 6)
    law = fit_power_law(list(x), list(y))
    a, b = np.meshgrid(np.linspace(-4, 4, 401), np.linspace(0, 6, 241))
    sse = ((y - a[..., None] * x ** b[..., None]) ** 2).sum(-1)
    least = law.residual**2 * 4
    assert least <= sse.min() * (1 + 1e-9)
    allowed = sse <= least * (1 + t_quantile(4, 0.95) ** 2 / 4) * 0.999
    for at in (0.3, 2.0):
        y_at, low, high = law.predict(at)
        assert low <= y_at <= high
        predicted = (a * at**b)[allowed]
        assert not predicted.size or (low <= predicted.min() and predicted.max() <= high)
    assert (
        not allowed.any()
        or law.b_interval[0] - 0.01
        <= b[allowed].min()
        <= b[allowed].max()
        <= law.b_interval[1] + 0.01
    )


def test_intervals_cover() -> None:
    """95 % intervals of 7 points hold the truth in 95 of 100 sets.

    The share is within four standard errors of 400 sets.
    """
    rng = np.random.default_rng(0)
    x = np.array([0.2, 0.5, 1, 2, 3, 5, 8])
    held = np.zeros(3)
    for _ in range(400):
        law = fit_power_law(list(x), list(0.3 * x**0.7 + rng.normal(0, 0.08, 7)))
        _, low, high = law.predict(4.0)
        held += [
            law.a_interval[0] <= 0.3 <= law.a_interval[1],
            law.b_interval[0] <= 0.7 <= law.b_interval[1],
            low <= 0.3 * 4**0.7 <= high,
        ]
    error = math.sqrt(0.95 * 0.05 / 400)
    assert (abs(held / 400 - 0.95) <= 4 * error).all(), held / 400


def test_an_exponent_without_an_end_is_open() -> None:
    assert fit_power_law([1, 1.01, 1.02], [0.0, 0.01, 0.9]).b_interval[1] == math.inf


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 1, 1], [1, 2, 3], "3 at 1"),
        ([0, 1, 2], [0, 1, 2], "at least 3"),
        ([1, 2, -3], [1, 2, 3], ">= 0"),
        ([1, 2, 3], [1, 2, math.nan], "finite"),
        ([1, 2, 3], [1, 2], "3 values"),
        ([0, 1, 2, 3], [9, 0, 0, -0.0], "3 times 0"),
    ],
)
def test_what_has_no_law(x: list[float], y: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_power_law(x, y)


# --- the report -----------------------------------------------------------------------------------


def report() -> TaxReport:
    made = TaxReport(
        capability={"mmlu": 0.62, "gsm8k": 0.38}, alignment={"win rate": 0.3}, title="A <run>"
    )
    for step, lost in ((100, 0.01), (200, 0.016), (400, 0.024)):
        made.add(
            f"dpo-{step}",
            {"mmlu": 0.62 - lost, "gsm8k": 0.38 - lost},
            {"win rate": 0.3 + step / 1000},
            kl=step / 200,
            run="dpo",
            stage="dpo",
            step=step,
        )
    made.add(
        "sft",
        {"mmlu": 0.58, "gsm8k": 0.38},
        {"win rate": 0.35},
        run="rlhf",
        stage="sft",
        step=100,
        kl=0.4,
        distance=2.0,
    )
    made.add(
        "ppo",
        {"mmlu": 0.54, "gsm8k": 0.38},
        {"win rate": 0.6},
        run="rlhf",
        stage="rl",
        step=300,
        kl=1.4,
    )
    return made


def test_tax_and_gain() -> None:
    r = report()
    assert r.tax(r.checkpoints[0]) == pytest.approx(0.01)
    assert r.gain(r.checkpoints[0]) == pytest.approx(0.1)
    losses = TaxReport(2.0, 1.5, lower_is_better=("capability", "alignment"))
    c = losses.add("a", 2.2, 1.1)
    assert (losses.tax(c), losses.gain(c)) == pytest.approx((0.2, 0.4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=8))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    r = TaxReport(0.0, 0.0)
    for k, (capability, alignment) in enumerate(points):
        r.add(str(k), capability, alignment)
    everything = [(0, 0), *points]
    best = {
        p
        for p in everything
        if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in everything)
    }
    frontier = r.pareto()
    assert {(c.capability["capability"], c.alignment["alignment"]) for c in frontier} == best
    assert [r.gain(c) for c in frontier] == sorted(r.gain(c) for c in frontier)
    assert len(frontier) == sum(p in best for p in everything)  # equal ones are all on it


def test_laws_of_a_report() -> None:
    r = report()
    law = r.tax_vs_kl()
    assert law.points == tuple(sorted((c.kl, r.tax(c)) for c in r.checkpoints))
    assert 0 < r.forgetting("dpo").b < 1
    fits = r.fits()
    assert list(fits) == [
        "tax against KL",
        "tax against KL, dpo",
        "forgetting, dpo",
        "tax against KL, rlhf",
        "forgetting, rlhf",
    ]
    assert "at least 3" in str(fits["forgetting, rlhf"])


def test_laws_that_lack_for_one_reason_are_one_line() -> None:
    r = TaxReport(0.5, 0.2)
    for run in ("dpo", "rlhf"):
        r.add("last", 0.4, 0.3, run=run)
    lines = [line for line in str(r).splitlines() if "at least 3" in line]
    assert [line.partition(": ")[0] for line in lines] == [
        "tax against KL; tax against KL, dpo; tax against KL, rlhf",
        "forgetting, dpo; forgetting, rlhf",
    ]


def test_stages_multiply() -> None:
    r = report()
    sft, rl = r.compounding("rlhf")
    assert (sft.kept, rl.kept) == pytest.approx((0.48 / 0.5, 0.46 / 0.48))
    assert rl.kept_so_far == pytest.approx(0.46 / 0.5)
    assert sft.tax + rl.tax == pytest.approx(r.tax(r.checkpoints[-1]))
    losses = TaxReport(2.0, 0.0, lower_is_better="capability")
    losses.add("a", 2.5, 0.1, stage="sft")
    assert losses.compounding()[0].kept == pytest.approx(0.8)
    negative = TaxReport(-1.0, 0.0)
    negative.add("a", -2.0, 0.1, stage="sft", run="r")
    with pytest.raises(ValueError, match="positive"):
        negative.compounding("r")
    assert "positive" in str(negative)


def test_a_stage_that_comes_again_is_another() -> None:
    again = TaxReport(0.6, 0.3)
    for name, stage, able in (("a", "sft", 0.58), ("b", "dpo", 0.57), ("c", "sft", 0.56)):
        again.add(name, able, 0.4, run="r", stage=stage)
    with pytest.raises(ValueError, match="'sft' -> 'dpo' -> 'sft'; name a stage"):
        again.compounding("r")
    assert "name a stage that comes again anew" in str(again)


def test_a_report_without_any_tax_is_written(tmp_path: Path) -> None:
    none = TaxReport(0.6, 0.3)
    for step in (1, 2, 3, 4):
        none.add(f"step {step}", 0.6, 0.3 + 0.1 * step, kl=0.1 * step, step=step)
    assert "4 times 0" in str(none)
    assert TaxReport.load(none.save(tmp_path / "tax.json")).as_dict() == none.as_dict()
    assert "4 times 0" in none.html(tmp_path / "tax.html").read_text()


REFUSED: dict[str, tuple[Any, str]] = {
    "same name": (
        lambda: report().add("sft", {"mmlu": 1, "gsm8k": 1}, {"win rate": 1}, run="rlhf"),
        "does not have yet",
    ),
    "other benchmarks": (lambda: report().add("x", {"mmlu": 1}, {"win rate": 1}), "mmlu, gsm8k"),
    "a number for several": (lambda: report().add("x", 1.0, {"win rate": 1}), "mmlu, gsm8k"),
    "not finite": (lambda: TaxReport({"a": math.nan}, 1.0), r"capability\['a'\]"),
    "nothing": (lambda: TaxReport({}, 1.0), "numbers by benchmark"),
    "side": (lambda: TaxReport(1.0, 1.0, lower_is_better="loss"), "'capability', 'alignment'"),
    "negative KL": (
        lambda: report().add("x", {"mmlu": 1, "gsm8k": 1}, {"win rate": 1}, kl=-0.1),
        "kl",
    ),
    "run": (lambda: report().tax_vs_kl("ppo"), "'dpo', 'rlhf'"),
    "folder": (lambda: report().save("/nowhere/at/all.json"), "create it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    call, says = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=says):
        call()


# --- files ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = report().save(tmp_path / "r.json")
    again = TaxReport.load(path)
    assert again.as_dict() == report().as_dict()
    assert again.checkpoints == report().checkpoints


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSON"),
        ("[]", '"base"'),
        (
            '{"base": {"capability": 1}, "checkpoints": [{"name": "a"}, 3]}',
            r"base.alignment, checkpoints\[0\].capability",
        ),
        (
            '{"base": {"capability": 1, "alignment": 1}, "checkpoints": [{"name": "a", '
            '"capability": "x", "alignment": 1}]}',
            "capability: expected a",
        ),
    ],
)
def test_foreign_files(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises((ValueError, TypeError), match=says):
        TaxReport.load(tmp_path / "r.json")


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report().save(tmp_path / "r.json")
    before = path.read_bytes()

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            report().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_page_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report().html(tmp_path / "r.html").read_text()
    assert "A &lt;run&gt;" in page
    assert all(
        text in page
        for text in (
            "dpo-400",
            "gsm8k",
            "win rate",
            "tax = ",
            "of the base is kept",
            "data:image/png;base64,",
        )
    )
    assert "http" not in page
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bare = report().html(tmp_path / "bare.html").read_text()
    assert "image/png" not in bare
    assert "fasttax[report]" in bare
    with pytest.raises(ModuleNotFoundError, match="report"):
        report().plot(tmp_path / "r.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.html", "r.html"]


def test_the_figure_leaves_pyplot_alone(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    backend, open_figures = plt.get_backend(), plt.get_fignums()
    assert report().plot(tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lone = TaxReport(1.0, 1.0)
    lone.plot(tmp_path / "lone.png")
    assert (plt.get_backend(), plt.get_fignums()) == (backend, open_figures)


@pytest.mark.parametrize(
    "run", ["$", "costs $5", "a$_{", "\\frac$", "$x^$", "_hidden", "_nolegend_", "_", " "]
)
def test_a_run_of_any_name_is_drawn_as_text(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[str] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        legend = figure.axes[0].get_legend()
        assert legend is not None
        drawn.extend(text.get_text() for text in legend.get_texts())

    monkeypatch.setattr(Figure, "savefig", saved)
    named = report()
    named.add("more", {"mmlu": 0.6, "gsm8k": 0.38}, {"win rate": 0.4}, run=run, kl=1.0)
    assert named.plot(tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<img" in named.html(tmp_path / "r.html").read_text()
    assert drawn.count(run) == 2  # of both figures
    assert {"base", "Pareto frontier"} < set(drawn)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": f"c{k}", "capability": 0.6 - 0.01 * k, "alignment": 0.1 * k, "kl": 0.3 * k}
        for k in range(1, 5)
    ]
    (tmp_path / "in.json").write_text(
        json.dumps({"base": {"capability": 0.6, "alignment": 0.0}, "checkpoints": rows})
    )
    outputs = {option: str(tmp_path / f"out.{option}") for option in ("html", "png", "json")}
    assert (
        cli.main(
            [
                "tax",
                str(tmp_path / "in.json"),
                *(word for option, path in outputs.items() for word in (f"--{option}", path)),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert all(path in printed and Path(path).stat().st_size > 0 for path in outputs.values())
    assert "tax = 0.0333 KL^1" in printed
    assert cli.main(["tax", str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
    (tmp_path / "word.json").write_text(
        '{"base": {"capability": "high", "alignment": 1}, "checkpoints": []}'
    )
    assert cli.main(["tax", str(tmp_path / "word.json")]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in ("word.json", "capability", "got 'high'"))


def test_is_where_the_contract_says() -> None:
    assert fasttax.tax.TaxReport is TaxReport
