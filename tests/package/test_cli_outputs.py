"""No command writes over what it reads: each input of each is tried as each of its outputs."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttax import cli
from fasttax.cli._options import Input, Output
from fasttax.cli.commands import COMMANDS

FILES = ("FILE", "PATH", "DIR")  # what help calls the names of files
INVENTED = {int: "2", float: "0.5"}  # for what is asked for beside


def parsers(made: argparse.ArgumentParser, *words: str) -> Iterator[tuple[list[str], Any]]:
    """Every way of a command: its words, and its arguments."""
    below = [a for a in made._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield list(words), made._actions
    for action in below:
        for name, choice in action.choices.items():
            yield from parsers(choice, *words, name)


WAYS = [
    way
    for name in COMMANDS
    for way in parsers(importlib.import_module(f"fasttax.cli.{name}").parser(), name)
]
CASES = [
    pytest.param(words, read, written, actions, id=" ".join([*words, read.dest, written.dest]))
    for words, actions in WAYS
    for read in actions
    for written in actions
    if read.type is Input and isinstance(written.type, type) and issubclass(written.type, Output)
]


def same(_: Path, read: Path) -> Path:
    return read


def symlinked(folder: Path, read: Path) -> Path:
    link = folder / "link"
    link.symlink_to(read)
    return link


def hard_linked(folder: Path, read: Path) -> Path:
    link = folder / "link"
    os.link(read, link)
    return link


def partial(folder: Path, read: Path) -> Path:
    """What an interrupted `kl cache` keeps its values in is read."""
    kept = folder / "out.partial"
    kept.mkdir()
    os.link(read, kept / "done.jsonl")
    return folder / "out"


def line(words: list[str], actions: Any, values: dict[Any, Path]) -> list[str]:
    """A command with these arguments, and something for each that it needs."""
    positional, options = [], []
    for action in actions:
        wanted = action.required or not action.option_strings
        if action not in values and (not wanted or action.nargs == "*"):
            continue
        value = str(values[action]) if action in values else INVENTED.get(action.type, "0.5")
        if action.option_strings:
            options += [action.option_strings[-1], value]
        else:
            positional.append(value)
    return [*words, *positional, *options]


@pytest.mark.parametrize("way", [same, symlinked, hard_linked, partial])
@pytest.mark.parametrize(("words", "read", "written", "actions"), CASES)
def test_an_input_is_no_output(
    words: list[str],
    read: Any,
    written: Any,
    actions: Any,
    way: Callable[[Path, Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text("kept")
    there = sorted(tmp_path.iterdir())
    target = way(tmp_path, source)
    there = sorted({*there, *tmp_path.iterdir()})
    assert cli.main(line(words, actions, {read: source, written: target})) == 2
    said = capsys.readouterr().err
    expected = f"{target}: expected a file that is not read, got one that is read as {source}; "
    assert expected in said
    assert said.startswith(f"fasttax {words[0]}")
    assert source.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == there


def test_every_command_with_both_is_tried() -> None:
    tried = {" ".join(case.values[0]) for case in CASES}
    assert tried == {
        "fisher",
        "kl cache",
        "kl measure",
        "merge config",
        "merge fisher",
        "merge linear",
        "merge run",
        "plan",
        "sample",
        "tax",
    }


def test_every_file_of_a_command_is_read_or_written() -> None:
    """What names a file says which; the demo's, below, are its own."""
    for words, actions in WAYS:
        for action in actions if words != ["demo"] else ():
            named = action.metavar in FILES or action.dest in ("model", "output", "json")
            kind = action.type if isinstance(action.type, type) else object
            assert not named or issubclass(kind, (Input, Output)), (words, action.dest)


def test_a_file_of_a_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    (model / "part").mkdir(parents=True)
    weights = model / "part" / "model.safetensors"
    for path in (weights, text):
        path.write_text("kept")
    assert cli.main(["fisher", str(model), str(text), "--output", str(weights)]) == 2
    assert f"got one that is read as {model}" in capsys.readouterr().err
    # a new file in the folder is none of its files: what is wrong with it is the model
    assert cli.main(["fisher", str(model), str(text), "--output", str(model / "new")]) == 2
    assert "without config.json" in capsys.readouterr().err
    assert weights.read_text() == "kept"


def test_the_models_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [tmp_path / name for name in ("base.safetensors", "aligned.safetensors")]
    for path in models:
        path.write_text("kept")
    written = str(tmp_path / "merge.yaml")
    names = [str(path) for path in models]
    config = ["merge", "config", *names, "--alpha", "0.5", "--method", "linear"]
    assert cli.main([*config, "--output", written]) == 0
    for path in models:
        run = ["merge", "run", written, "--output", str(tmp_path / "new"), "--json", str(path)]
        assert cli.main(run) == 2
        assert f"got one that is read as {path}" in capsys.readouterr().err
        assert path.read_text() == "kept"


def test_the_demos_alignment_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alignment = tmp_path / "tax.json"
    alignment.write_text("kept")
    assert cli.main(["demo", "--output", str(tmp_path), "--alignment", str(alignment)]) == 2
    assert "expected a file that is not read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tax.json"]
