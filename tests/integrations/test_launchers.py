"""`accelerate launch` on two gloo processes: EWC and the KL are those of one process, or refused.

DDP and FSDP2 through transformers' Trainer and Accelerate's own preparation; DeepSpeed's ZeRO where
it is installed (`make matrix` installs it).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.tools import launched
from tests.tools.launched import Outcome

ROUNDING = 2e-6  # four steps of gradients that are summed in another order
KEYS = {
    "ewc": ("ewc/penalty", "ewc/distance"),
    "kl": ("kl/policy_ref",),
    "replay-lm": ("replay/lm",),
    "replay-kl": ("replay/kl",),
}
BOTH = "ewc+kl+evaluate"
RUNS = {
    "DDP": [BOTH, BOTH + "+dispatch", "replay-lm", "replay-kl"],
    "FSDP2": [BOTH, "replay-lm", "replay-kl"],
    "FSDP1": [BOTH],
    "ZeRO-1": [BOTH],
    "ZeRO-2": [BOTH],
    "ZeRO-3": ["ewc+evaluate"],
}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def cases(word: str = "") -> list[Any]:
    """Every launcher's runs that have the word."""
    return [
        pytest.param(name, run, marks=NEEDS_DEEPSPEED if name.startswith("ZeRO") else ())
        for name, runs in RUNS.items()
        for run in runs
        if word in run
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What one process has."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(lambda run: launched.trained(folder, run))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Outcome]]:
    """What two have under a launcher, by run."""

    def launch(name: str) -> dict[str, Outcome]:
        port = 29611 + list(RUNS).index(name)
        found = launched.launch(name, RUNS[name], tmp_path_factory.mktemp(name), port)
        return dict(zip(RUNS[name], found, strict=True))

    return cache(launch)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), cases())
def test_is_one_process(name: str, run: str, alone: Any, several: Any) -> None:
    found, own = several(name)[run], alone(run.removesuffix("+dispatch"))
    assert not found.refused
    assert difference(own.weights, alone("none").weights) > 1e3 * ROUNDING
    if "dispatch" not in run:  # which gives each rank other rows
        assert difference(found.weights, own.weights) <= ROUNDING
        keys = [key for name in run.split("+") for key in KEYS.get(name, ())]
        for mine, his in zip(found.log, own.log, strict=True):
            assert mine.keys() == his.keys()
            for key in his.keys() & set(keys):  # replay's are at its own steps
                assert mine[key] == pytest.approx(his[key], rel=1e-4), key
        assert all(any(key in entry for entry in own.log) for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), cases("evaluate"))
def test_evaluations_are_one_process(name: str, run: str, alone: Any, several: Any) -> None:
    """Between the steps and behind them, of rows that Accelerate fills up with the first again."""
    found = several(name)[run].evaluations
    own = alone(run.removesuffix("+dispatch")).evaluations
    keys = ("eval_ewc/penalty", "eval_kl/policy_ref")[: 2 if "kl" in run else 1]
    assert len(found) == len(own) == 4
    for mine, his in zip(found, own, strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(his[key], rel=2e-5), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "run", "port", "said"),
    [
        pytest.param("ZeRO-3", "kl", 29622, "use ZeRO-2 (zero_stage: 2)", marks=NEEDS_DEEPSPEED),
        pytest.param(
            "ZeRO-2", "callback", 29623, "use attach(trainer, ewc=ewc)", marks=NEEDS_DEEPSPEED
        ),
    ],
)
def test_is_refused_with_the_way_out(
    name: str, run: str, port: int, said: str, tmp_path: Path
) -> None:
    (found,) = launched.launch(name, [run], tmp_path, port)
    assert said in found.refused
