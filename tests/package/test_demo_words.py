"""The demo's comparison of methods, and the words that it finds for its numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from fasttax.demo import environment, measure, verdicts
from fasttax.demo.compare import Comparison


def vectors(**shift: float) -> measure.Vectors:
    noise = torch.linspace(-1, 1, 40, dtype=torch.float64)
    return {name: noise + shift.get(name, 0.0) + 0.05 * noise.roll(7) for name in measure.METRICS}


def test_difference_counts_beyond_two_errors() -> None:
    wobble = {name: v + 0.1 * v.roll(3) for name, v in vectors().items()}
    assert all(d["verdict"] == "same" for d in measure.difference(wobble, vectors()).values())
    d = measure.difference(vectors(general_nll=0.5, preference=0.5, kl_answers=0.5), vectors())
    assert [d[m]["verdict"] for m in ("general_nll", "preference", "kl_answers", "answer_nll")] == [
        "worse",
        "better",
        "different",
        "same",
    ]


def point(method: str, seed: int, share: float, changes: list[float]) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "label": f"{method} {share}",
        "share": share,
        "tax": sum(changes) / len(changes),
        "changes": changes,
        "train_seconds": 0.0 if method == "merge" else 2.0,
    }


def test_frontiers_end_at_the_plain_run() -> None:
    points = [
        row
        for seed in (0, 1, 2)
        for row in (
            point("plain", seed, 1.0, [0.4, 0.4]),
            point("kl", seed, 0.5, [0.1, 0.1 + 0.02 * seed]),
        )
    ]
    found = Comparison(points)
    # halfway between the point and the plain run; 0.6 of it towards the base
    assert found.units("kl", 0.75) == pytest.approx({0: 0.25, 1: 0.255, 2: 0.26})
    assert found.units("kl", 0.3) == pytest.approx({0: 0.06, 1: 0.066, 2: 0.072})
    at = found.at("kl", 0.75)
    assert at is not None
    assert at.se == pytest.approx(0.005 / math.sqrt(3))
    assert at.high - at.mean == pytest.approx(4.3027 * at.se, rel=1e-4)  # Student's t, 2 degrees
    assert found.reach("kl") == (0.5, 0.5)
    assert found.best(0.75) == "kl"
    assert found.at("ewc", 0.75) is None


def test_one_seed_is_compared_over_items() -> None:
    noise = [0.3 * math.sin(k) for k in range(40)]
    points = [
        point("plain", 0, 1.0, [0.4 + n for n in noise]),
        point("ewc", 0, 0.75, [0.2 + n for n in noise]),
        point("kl", 0, 0.75, [0.1 + n + 0.01 * math.cos(3 * n) for n in noise]),
    ]
    found = Comparison(points)
    one, apart = found.at("kl", 0.75), found.difference("kl", "ewc", 0.75)
    assert one is not None
    assert apart is not None
    assert apart.se < one.se / 20  # items' own spread is in both
    assert apart.high < 0


def test_a_plain_run_without_gain_is_no_measure() -> None:
    rows = [point("plain", 0, 1.0, [0.1]) | {"share": None}, point("kl", 0, 0.5, [0.1])]
    found = Comparison(rows)
    assert found.rows == {}
    assert found.best(0.75) is None


def results(kl: float, kron: float, tax: float = 0.4) -> dict[str, Any]:
    """Three seeds whose taxes at 75 % of the gain are given, with a spread of 0.001."""
    found = {"base": vectors(), "plain": vectors(answer_nll=-1, general_nll=tax)}
    metrics = {name: measure.summary(v) for name, v in found.items()}
    against = measure.difference(found["plain"], found["base"])
    points = []
    for seed in (0, 1, 2):
        off = 0.001 * (seed - 1)
        plain = point("plain", seed, 1.0, [0.4])
        points += [plain | {"metrics": metrics["plain"], "against_base": against}]
        taxes = {"merge": 0.1, "ewc": 0.1, "kl": kl, "kron": kron, "kl_lm": 0.02}
        points += [point(m, seed, 0.75, [value + off]) for m, value in taxes.items()]
    return {
        "base": {"metrics": metrics["base"]},
        "points": points,
        "failures": [],
        "settings": {"tiny": True},
    }


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (results(0.05, 0.05), ["paid a tax", "HOLDS: Kronecker EWC", "lower tax: EWC, Kronecker"]),
        (results(0.05, 0.08), ["FAILS: Kronecker EWC's tax"]),
        (results(0.05, 0.065), ["NOT DECIDED: Kronecker EWC's tax"]),
        (results(0.01, 0.05), ["FAILS: KL + replay (LM loss) has the lowest tax"]),
        (results(0.05, 0.05), ["HOLDS: the best method's tax", "HOLDS: KL + replay"]),
        (results(0.2, 0.05), ["HIGHER tax: KL on the answers (+0.100", "noise: EWC, diagonal"]),
        (results(0.05, 0.05), ["FAILS: the grid of KL on the answers reaches shares 0.75 to 0.75"]),
        (results(0.05, 0.05, 0.0), ["paid no measurable tax"]),
    ],
)
def test_verdicts_follow_the_numbers(found: dict[str, Any], words: list[str]) -> None:
    text = "\n".join(verdicts.sentences(found))
    assert all(word in text for word in words), text


def test_what_diverged_is_said() -> None:
    failure = {"method": "lr", "seed": 1, "label": "lr 9", "reason": "the loss is nan"}
    text = verdicts.sentences(results(0.05, 0.05) | {"failures": [failure]})
    assert "FAILS: lower learning rate, seed 1: the loss is nan" in text


@pytest.mark.parametrize(
    ("mean", "reach", "said"),
    [(0.01, 0.005, "less"), (0.01, 0.02, ""), (-0.01, 0.005, "MORE"), (0.01, math.inf, "")],
)
def test_speed_is_said_where_it_is_beyond_noise(mean: float, reach: float, said: str) -> None:
    saved = {"mean": mean, "se": reach / 2, "low": mean - reach, "high": mean + reach}
    timing = {"seconds": {"plain step": 0.1}, "rounds": 9}
    timing["saved_seconds"] = {"kl": saved, "ewc": saved | {"low": -1.0, "high": 1.0}}
    text = verdicts.sentences(results(0.05, 0.05) | {"timing": timing})
    spoken = [line for line in text if "plain step" in line and "rounds" in line]
    assert len(spoken) == bool(said)
    assert all(f"took 10.0 % of a plain step {said}" in line for line in spoken)


def test_the_gpu_that_is_named_is_the_one_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert environment.machine(torch.device("cuda:1"))["gpu"] == "a GPU, cuda:1"
    assert "gpu" not in environment.machine(torch.device("cpu"))
