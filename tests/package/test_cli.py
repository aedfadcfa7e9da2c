"""The `fasttax` command: every command is a module with a `main`, and errors are a line and a 2."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import fasttax
from fasttax import cli
from fasttax.cli.commands import COMMANDS

FOLDER = Path(cli.__file__).parent
PLUMBING = ("__init__", "main", "commands")


def test_every_command_is_a_module() -> None:
    modules = {p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_")} - set(PLUMBING)
    assert modules == set(COMMANDS)
    for name in COMMANDS:
        run = importlib.import_module(f"fasttax.cli.{name}").main
        assert list(inspect.signature(run).parameters) == ["argv"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fasttax {name}")


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == cli.main(["help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name:8} {command.summary}\n" in printed for name, command in COMMANDS.items())
    assert cli.main(["--version"]) == cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"{fasttax.__version__}\n" * 2
    assert cli.main(["taxes"]) == 2
    assert "unknown command 'taxes'; choose one of demo, fisher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "extra"), [("matplotlib", "report"), ("transformers", "report"), ("numpy", None)]
)
def test_what_is_not_installed(
    package: str,
    extra: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent(argv: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("fasttax.cli.tax.main", absent)
    if extra is None:  # no extra brings it: the installation itself is broken
        with pytest.raises(ModuleNotFoundError):
            cli.main(["tax", "report.json"])
        return
    assert cli.main(["tax", "report.json"]) == 2
    expected = f"fasttax tax: {package} is not installed; run `pip install 'fasttax[{extra}]'`\n"
    assert capsys.readouterr().err == expected


def test_fisher_wants_a_whole_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fisher", "model", "text", "--length", "1"]) == 2
    assert "--length must be at least 2" in capsys.readouterr().err
    assert cli.main(["fisher", "model", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_fisher_writes_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tests.tools import tiny_lm

    model, output = tiny_lm.save(tmp_path / "model"), str(tmp_path / "fisher.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("water boils at a hundred degrees " * 4)
    options = ["--length", "8", "--examples", "3", "--batch-size", "2", "--output", output]
    assert cli.main(["fisher", model, str(text), *options]) == 0
    estimate = fasttax.FisherEstimate.load(output)
    assert estimate.metadata["examples"] == 3
    assert capsys.readouterr().out == f"{estimate}\n{output}\n"
    assert cli.main(["fisher", model, str(text), "--length", "1000"]) == 2
    assert "has 132 tokens; expected at least --length 1000" in capsys.readouterr().err


def test_doctor_says_why_a_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "The NVIDIA driver on your system is too old (found version 11040)."

    def init() -> None:
        raise RuntimeError(f"{old} Please update\nand more")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"GPU: none ({old}" in out
    assert "install a driver for CUDA 13.0" in out


def test_doctor_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from fasttax._base import library

    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{op} " in printed for op in library.OPS)
