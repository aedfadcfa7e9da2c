"""`fasttax bench`, and the kinds of rows that benchmarks measure on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fasttax import cli


def test_synthetic_kinds_of_logits_are_the_same_on_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from bench import logits

    for kind in logits.SYNTHETIC:
        x, y = logits.pair(kind, 3, 70, torch.bfloat16)
        assert x.shape == y.shape == (3, 70)
        assert x.dtype == y.dtype == torch.bfloat16
        again = logits.pair(kind, 3, 70, torch.bfloat16)
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
        assert torch.equal(x, y) == (kind == "equal")


def test_the_command_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [
        "--tokens",
        "9",
        "--vocab",
        "50",
        "--hidden",
        "8",
        "--parameters",
        "1000",
        "--rounds",
        "2",
        "--device",
        "cpu",
    ]
    assert cli.main(["bench", *sizes, "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    printed = capsys.readouterr().out
    assert len(rows) == 5
    assert all(row["name"] in printed and row["milliseconds"]["fasttax"] > 0 for row in rows)
    assert cli.main(["bench", "--tokens", "0"]) == 2
    assert "--tokens" in capsys.readouterr().err
    assert cli.main(["bench", "--device", "abacus"]) == 2
    assert "'cpu'" in capsys.readouterr().err
