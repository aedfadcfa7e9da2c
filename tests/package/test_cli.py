"""The `fasttax` command: every command is a module with a `main`, and errors are a line and a 2."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fasttax
from fasttax import cli
from fasttax.cli import _options
from fasttax.cli.commands import COMMANDS
from tests.tools import tiny_lm

FOLDER = Path(cli.__file__).parent
PLUMBING = ("__init__", "main", "commands")


def test_every_command_is_a_module() -> None:
    modules = {p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_")} - set(PLUMBING)
    assert modules == set(COMMANDS)
    for name in COMMANDS:
        module = importlib.import_module(f"fasttax.cli.{name}")
        assert list(inspect.signature(module.main).parameters) == ["argv"]
        assert module.parser().prog == f"fasttax {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fasttax {name}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", name])
    assert ended.value.code == 0
    assert capsys.readouterr().out == said


def test_a_stdout_that_is_closed_or_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert cli.main(["help"]) == 0
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with monkeypatch.context() as full, open("/dev/full", "w", encoding="utf-8") as stdout:
        full.setattr(sys, "stdout", stdout)
        assert cli.main(["help"]) == 2
    said = capsys.readouterr().err
    assert said == "fasttax: cannot write to stdout: No space left on device\n"


def test_one_file_for_two_outputs(tmp_path: Path) -> None:
    same = [f"{tmp_path}/a", f"{tmp_path}/../{tmp_path.name}/a"]
    with pytest.raises(ValueError, match="a file for each output, got the same one twice"):
        _options.check_outputs("op", same, [])


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == cli.main(["help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name:10} {summary}\n" in printed for name, summary in COMMANDS.items())
    assert cli.main(["--version"]) == cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"{fasttax.__version__}\n" * 2
    assert cli.main(["taxes"]) == 2
    assert "unknown command 'taxes'; choose one of demo, fisher" in capsys.readouterr().err
    assert cli.main(["help", "taxes"]) == 2
    assert "unknown command 'taxes'; choose one of demo, fisher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["help", "kl", "cache"])
    assert capsys.readouterr().out.startswith("usage: fasttax kl cache")


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("matplotlib", "report"),
        ("transformers", "transformers"),
        ("datasets", "trl"),
        ("numpy", None),
    ],
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
    assert "fasttax fisher: --length: expected at least 2, got" in capsys.readouterr().err
    assert cli.main(["fisher", "model", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_fisher_writes_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_fisher_of_rows_is_of_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row an example, cut and padded; braces and keys of the JSON are no text."""
    model, output = tiny_lm.save(tmp_path / "model"), str(tmp_path / "fisher.safetensors")
    texts = ["water boils at a hundred degrees", "to be", "blue sky", "never read"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["--length", "12", "--examples", "3", "--labels", "true", "--storage", "fp32"]
    assert cli.main(["fisher", model, str(rows), *options, "--output", output]) == 0
    found = fasttax.FisherEstimate.load(output)
    tokenizer = tiny_lm.tokenizer()
    ids = [torch.tensor([tokenizer(text)["input_ids"][:12]]) for text in texts[:3]]
    own = fasttax.estimate_fisher(tiny_lm.model().eval(), ids, labels="true", progress=False)
    assert found.metadata["tokens"] == own.metadata["tokens"] == sum(t.numel() - 1 for t in ids)
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-10)
    rows.write_text('{"text": ""}')
    assert cli.main(["fisher", model, str(rows)]) == 2
    assert "rows.jsonl has no row of at least 2 tokens" in capsys.readouterr().err


def every_parser() -> Iterator[argparse.ArgumentParser]:
    """Of each command, and of the tools that some have."""
    for name in COMMANDS:
        parsers = [importlib.import_module(f"fasttax.cli.{name}").parser()]
        for parser in parsers:
            yield parser
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()


def test_help_says_every_default() -> None:
    said = 0
    for parser in every_parser():
        for action in parser._actions:
            default = action.default
            if default is None or default is False or default in ([], argparse.SUPPRESS):
                continue
            text = f"{default:g}" if isinstance(default, float) else str(default)
            if isinstance(default, Path):
                text = ""  # of this machine
            where = f"{parser.prog} {action.option_strings}"
            assert re.search(rf"\(default:? ?{re.escape(text)}", action.help or ""), where
            said += 1
    assert said > 30
