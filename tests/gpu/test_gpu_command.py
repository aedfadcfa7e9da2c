"""`make test-gpu` without a GPU: it says so and runs nothing; with one, what it would run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu import __main__ as command
from tests.tools import kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """(FASTTAX_BACKEND, arguments) of what was started, of which one file fails."""
    found: list[tuple[str, list[str]]] = []

    def run(arguments: list[str], env: dict[str, str]) -> Any:
        found.append((env["FASTTAX_BACKEND"], arguments))
        return SimpleNamespace(returncode=int("tests/gpu/test_two_gpus.py" in arguments))

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_without_a_gpu_nothing_runs(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main() == 0
    assert "no GPU here, so that nothing was run" in capsys.readouterr().out
    assert not started


def test_with_one_every_part_runs_and_one_that_fails_is_named(
    started: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert command.main() == 1
    assert len(started) == len(command.PARTS)
    said = capsys.readouterr().out
    assert "1 x a GPU" in said
    assert "failed:\n  tests/gpu/test_two_gpus.py\n" in said
    for backend, arguments in started:
        assert arguments[:4] == [sys.executable, "-m", "pytest", "-q"]
        assert all((ROOT / a).is_file() for a in arguments if a.endswith(".py"))
        assert backend in ("auto", "triton")


def test_a_gpus_kernels_are_those_of_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words that choose them are of names that tests have there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {kernels.name(kernel) for kernel in kernels.kernels()}
    assert {"cuda", "triton"} <= names
    assert {part.words for part in command.PARTS} == {"", "cuda or triton"}
