"""`accelerate launch` on two gloo processes: EWC and the KL are those of one process, or refused.

DDP and FSDP2 through transformers' Trainer and Accelerate's own preparation; DeepSpeed's ZeRO where
it is installed (`make matrix` installs it).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools import launched

ROUNDING = 2e-6  # four steps of gradients that are summed in another order
KEYS = {
    "ewc": ("ewc/penalty", "ewc/distance"),
    "kl": ("kl/policy_ref",),
    "replay-lm": ("replay/lm",),
    "replay-kl": ("replay/kl",),
}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process has, by what is attached."""
    folder = tmp_path_factory.mktemp("alone")
    replays, evaluated = (
        (("replay-lm",), ("replay-kl",)),
        (("ewc", "kl", "evaluate"), ("ewc", "evaluate")),
    )
    runs = (("ewc",), ("ewc", "kl"), ("none",), *replays, *evaluated)
    return {what: launched.trained(folder, list(what)) for what in runs}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "port"),
    [
        ("DDP", ("ewc", "kl"), 29611),
        ("FSDP2", ("ewc", "kl"), 29612),
        ("FSDP1", ("ewc", "kl"), 29620),
        ("DDP", ("replay-lm",), 29616),
        ("FSDP2", ("replay-lm",), 29617),
        ("DDP", ("replay-kl",), 29618),
        ("FSDP2", ("replay-kl",), 29619),
        pytest.param("ZeRO-1", ("ewc", "kl"), 29613, marks=NEEDS_DEEPSPEED),
        pytest.param("ZeRO-2", ("ewc", "kl"), 29614, marks=NEEDS_DEEPSPEED),
        pytest.param("ZeRO-3", ("ewc",), 29615, marks=NEEDS_DEEPSPEED),
    ],
)
def test_is_one_process(
    name: str, what: tuple[str, ...], port: int, alone: Any, tmp_path: Path
) -> None:
    found = launched.launch(name, list(what), tmp_path, port)
    assert "refused" not in found, found
    weights, log = alone[what]
    assert difference(torch.load(tmp_path / "out.pt"), weights) <= ROUNDING
    assert difference(weights, alone[("none",)][0]) > 1e3 * ROUNDING
    keys = [key for name in what for key in KEYS[name]]
    for mine, own in zip(found["log"], log, strict=True):
        assert mine.keys() == own.keys()
        for key in own.keys() & set(keys):  # replay's are at its own steps
            assert mine[key] == pytest.approx(own[key], rel=1e-4), key
    assert all(any(key in entry for entry in log) for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "port"),
    [
        ("DDP", ("ewc", "kl"), 29631),
        ("DDP", ("ewc", "kl", "dispatch"), 29632),
        ("FSDP2", ("ewc", "kl"), 29633),
        ("FSDP1", ("ewc", "kl"), 29637),
        pytest.param("ZeRO-1", ("ewc", "kl"), 29634, marks=NEEDS_DEEPSPEED),
        pytest.param("ZeRO-2", ("ewc", "kl"), 29635, marks=NEEDS_DEEPSPEED),
        pytest.param("ZeRO-3", ("ewc",), 29636, marks=NEEDS_DEEPSPEED),
    ],
)
def test_evaluations_are_one_process(
    name: str, what: tuple[str, ...], port: int, alone: Any, tmp_path: Path
) -> None:
    """Between the steps and behind them, of rows that Accelerate fills up with the first again."""
    found = launched.launch(name, [*what, "evaluate"], tmp_path, port)["log"]
    count = 2 if "kl" in what else 1
    run = (*what[:count], "evaluate")
    log = alone[run][1]
    keys = ("eval_ewc/penalty", "eval_kl/policy_ref")[:count]
    assert len(found) == len(log) == 4
    for mine, own in zip(found, log, strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(own[key], rel=2e-5), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "port", "said"),
    [
        pytest.param("ZeRO-3", "kl", 29622, "use ZeRO-2 (zero_stage: 2)", marks=NEEDS_DEEPSPEED),
        pytest.param(
            "ZeRO-2", "callback", 29623, "use attach(trainer, ewc=ewc)", marks=NEEDS_DEEPSPEED
        ),
    ],
)
def test_is_refused_with_the_way_out(
    name: str, what: str, port: int, said: str, tmp_path: Path
) -> None:
    assert said in launched.launch(name, [what], tmp_path, port)["refused"]
