"""Every example runs as it stands, offline, on the tiny model, on a GPU where there is one."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.tools import tiny_lm, trl_runs

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(
    path: Path,
    saved: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.device_count() > 1:  # whose DataParallel is none of fasttax's
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), saved])
    runpy.run_path(str(path), run_name="__main__")
    numbers = [
        float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?|nan|inf", capsys.readouterr().out)
    ]
    assert len(numbers) >= 2
    assert all(map(math.isfinite, numbers))


def test_examples_are_short_and_cover_every_trainer() -> None:
    assert all(len(p.read_text().splitlines()) < 60 for p in EXAMPLES)
    assert {f"trl_{name}" for name in (*trl_runs.STABLE, *trl_runs.EXPERIMENTAL)} <= {
        p.stem for p in EXAMPLES
    }
    assert {"plain_loop", "accelerate_loop", "transformers_trainer", "lightning_module"} <= {
        p.stem for p in EXAMPLES
    }
