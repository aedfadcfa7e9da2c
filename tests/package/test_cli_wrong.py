"""Commands that read models' files or reports: wrong paths, corrupt files, Ctrl-C at the write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasttax import cli
from fasttax._base import placed
from fasttax.tax import TaxReport
from tests.tools import tiny_lm

TEXT = "water boils at a hundred degrees\n" * 10


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models, texts and reports, and bad ones."""
    folder = tmp_path_factory.mktemp("there")
    for seed in (0, 1):
        tiny_lm.save(folder / f"m{seed}", seed)
        save_file({"a.weight": torch.full((4, 4), float(seed))}, folder / f"w{seed}.safetensors")
    tiny_lm.save(folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    save_file({"a.weight": torch.zeros(4, 5)}, folder / "wide.safetensors")
    save_file({"b.weight": torch.zeros(4, 4)}, folder / "named.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "w0.safetensors").read_bytes()[:40])
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text(TEXT)
    report = TaxReport(0.6, 0.2)
    for k in range(3):
        report.add(f"{k}", 0.6 - 0.01 * k, 0.2 + 0.1 * k, kl=0.1 * k, step=k)
    report.save(folder / "report.json")
    (folder / "no.json").write_text("{")
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "words.json").write_text(
        '{"base": {"capability": "x", "alignment": 1}, "checkpoints": []}'
    )
    return folder


def wrong(there: Path, new: Path) -> dict[str, tuple[list[str], str]]:
    """What is wrong, the command, and what it says."""

    def at(name: str) -> str:
        return str(there / name)

    def linear(base: str, aligned: str, *more: str) -> list[str]:
        end = more or ("--output", str(new / "out.safetensors"))
        return ["merge", "linear", at(base), at(aligned), "--alpha", "0.5", *end]

    nowhere = str(new / "none" / "x")
    w0, report = at("w0.safetensors"), at("report.json")
    fisher = ["merge", "fisher", w0, w0, "--output", str(new / "f.safetensors")]
    sample = ["sample", "--number", "2", "--length", "4", "--output", str(new / "s.jsonl")]
    return {
        "merge: no base": (linear("none", "m1"), "none"),
        "merge: no weights": (linear("empty", "m1"), "empty"),
        "merge: cut": (linear("w0.safetensors", "cut.safetensors"), "cut.safetensors"),
        "merge: damaged": (
            linear("m0", "damaged", "--output", str(new / "folder")),
            "damaged",
        ),
        "merge: other shapes": (linear("w0.safetensors", "wide.safetensors"), "a.weight"),
        "merge: other names": (linear("w0.safetensors", "named.safetensors"), "b.weight"),
        "merge: output": (
            linear("w0.safetensors", "w1.safetensors", "--output", nowhere + ".safetensors"),
            "none",
        ),
        "merge: alpha": ([*linear("w0.safetensors", "w1.safetensors"), "--alpha", "x"], "--alpha"),
        "merge: no Fisher": ([*fisher, "--fisher", nowhere, "--fisher", nowhere], "none"),
        "merge: cut Fisher": (
            [*fisher, "--fisher", at("cut.safetensors"), "--fisher", at("cut.safetensors")],
            "cut.safetensors",
        ),
        "tax: no file": (["tax", nowhere], "none"),
        "tax: no JSON": (["tax", at("no.json")], "JSON"),
        "tax: no report": (["tax", at("other.json")], "base"),
        "tax: no numbers": (["tax", at("words.json")], "capability"),
        "tax: a folder without results": (
            ["tax", at("empty")],
            "the base's file and a checkpoint's",
        ),
        "tax: two folders without results": (["tax", at("empty"), at("empty")], "empty"),
        "tax: page": (["tax", report, "--html", nowhere], "create it first"),
        "tax: figure": (["tax", report, "--png", nowhere], "create it first"),
        "tax: report and published": (["tax", report, "--published", "llama2-7b"], "not both"),
        "tax: nothing": (["tax"], "expected REPORT"),
        "sample: no model": ([*sample, nowhere], "folder or Hub id"),
        "sample: damaged": ([*sample, at("damaged")], "does not load"),
        "sample: no model's folder": ([*sample, at("empty")], "without config.json"),
        "bench: output": (["bench", "--json", nowhere], "create it first"),
        "plan: no model": (["plan", nowhere], "folder or Hub id"),
    }


def test_one_line_and_nothing_left(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, (line, says) in wrong(there, tmp_path).items():
        try:
            code = cli.main(line)
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        said = capsys.readouterr().err
        assert code == 2, (case, said)
        assert "Traceback" not in said, case
        assert says in said, (case, said)
        assert said.strip().splitlines()[-1].count("fasttax") <= 2, (case, said)
        assert not list(tmp_path.iterdir()), case


def writing(there: Path, new: Path) -> dict[str, list[str]]:
    """Commands that write, each over a file that is there."""
    m0, text = str(there / "m0"), str(there / "text.txt")
    two = [str(there / f"w{k}.safetensors") for k in (0, 1)]
    report = str(there / "report.json")
    short = ["--length", "8", "--examples", "2"]
    return {
        "fisher": ["fisher", m0, text, *short, "--output", str(new / "fisher")],
        "cache": ["kl", "cache", m0, text, "--length", "8", "--output", str(new / "cache")],
        "sample": ["sample", m0, "--number", "2", "--length", "4", "--output", str(new / "sample")],
        "merge": ["merge", "config", *two, "--alpha", "1", "--output", str(new / "merge")],
        "page": ["tax", report, "--html", str(new / "page")],
        "figure": ["tax", report, "--png", str(new / "figure")],
        "json": ["tax", report, "--json", str(new / "json")],
    }


@pytest.mark.parametrize("kind", ["fisher", "cache", "sample", "merge", "page", "figure", "json"])
def test_ctrl_c_as_a_file_is_written(
    kind: str,
    there: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The new file is on the disk under another name: it goes, and the old one stays."""
    (tmp_path / kind).write_text("old")
    asked: list[Any] = []

    def stop(path: Path) -> None:
        asked.append(path)
        raise KeyboardInterrupt

    # what is called last before a new file takes the name
    monkeypatch.setattr(placed, "sync", stop)
    assert cli.main(writing(there, tmp_path)[kind]) == 130, capsys.readouterr().err
    assert asked
    said = "goes on there" if kind == "cache" else "no file was left half written"
    assert said in capsys.readouterr().err
    # a cache's batches are kept, for the same command to go on
    left = [kind, f"{kind}.partial"] if kind == "cache" else [kind]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert (tmp_path / kind).read_text() == "old"


def test_ctrl_c_as_a_merge_is_written(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(placed, "sync", stop)
    for models, name in ((("m0", "m1"), "folder"), (("w0.safetensors", "w1.safetensors"), "f")):
        line = ["merge", "linear", *(str(there / m) for m in models), "--alpha", "0.5"]
        end = ".safetensors" if name == "f" else ""
        assert cli.main([*line, "--output", str(tmp_path / f"{name}{end}")]) == 130
        assert not list(tmp_path.iterdir())
