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


def test_tax_is_kept_without_paths_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from bench import bench_tax
    from fasttax.demo.settings import cache_folder

    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "tax.md"
    page.write_text("before\n<!-- tax:begin -->\nold\n<!-- tax:end -->\nafter\n")
    monkeypatch.setattr(bench_tax, "ROOT", tmp_path)
    monkeypatch.setattr(bench_tax, "RESULTS", tmp_path / "cpu-tax.json")
    results = {
        "points": [{"tax": 0.1, "curve": {}, "changes": [1.0]}],
        "verdicts": ["HOLDS: it."],
        "model": {"origin": f"kept in {cache_folder()}/tiny"},
        "file": f"{tmp_path}/fasttax/demo/alignment.jsonl",
    }
    bench_tax.keep(results, "| a |\n", ["--seeds", "5"])
    kept = json.loads((tmp_path / "cpu-tax.json").read_text())
    assert kept["points"] == [{"tax": 0.1}]
    assert kept["command"] == "python -m bench.bench_tax --seeds 5"
    assert kept["model"]["origin"] == "kept in ~/.cache/fasttax/tiny"
    assert kept["file"] == "fasttax/demo/alignment.jsonl"
    text = page.read_text()
    assert text.startswith("before\n<!-- tax:begin -->\n| a | Made by `python -m bench.bench_tax")
    assert text.endswith("\n- HOLDS: it.\n<!-- tax:end -->\nafter\n")


def test_results_of_another_make_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from bench.__main__ import set_aside

    target, aside = tmp_path / "cpu-kl.json", tmp_path / "cpu-kl-intel.json"

    def write(cpu: str) -> None:
        set_aside(target, cpu)
        target.write_text(json.dumps({"environment": {"cpu": cpu}}))

    for cpu in ("Intel(R) Xeon(R) Processor", "AMD EPYC", "AMD EPYC"):
        write(cpu)
    assert json.loads(target.read_text())["environment"]["cpu"] == "AMD EPYC"
    assert json.loads(aside.read_text())["environment"]["cpu"].startswith("Intel")
    write("Intel(R) Xeon(R) Processor")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu-kl-amd.json", "cpu-kl.json"]
