"""Every writer, given a place where no file can be: what it writes, the place, and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax.integrations.reference import TopKReference
from tests.faults.written import KINDS, Model, report
from tests.tools import tiny_lm

IDS = torch.tensor([[0, 1, 2]])


def _weights() -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in Model().named_parameters()}


def _estimated(path: Path) -> Any:
    return fasttax.estimate_fisher(Model(), [IDS], checkpoint=path, progress=False)


def _shards(path: Path) -> Any:
    return fasttax.estimate_fisher(Model(), [IDS], progress=False).save(path, sharded=True)


def _cached(path: Path) -> Any:
    rows = tiny_lm.ids(2, 4).tolist()
    return TopKReference.make_file(path, tiny_lm.model(), rows, k=2, progress=False)


FILES: dict[str, Callable[[Path], Any]] = {
    **{name: kind.write for name, kind in KINDS.items() if name != "merged"},
    "cache as it is made": _cached,
    "checkpoint of an estimate": _estimated,
    "report's page": lambda path: report().html(path),
    "report's figure": lambda path: report().plot(path),
    "mergekit": lambda path: fasttax.merge.write_mergekit(path, "base", "aligned", 0.5),
    "merged": lambda path: fasttax.merge.linear(
        _weights(), _weights(), 0.5, output=path / "m.safetensors"
    ),
}
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "sharded": _shards,
    "merged": lambda path: fasttax.merge.linear(_weights(), _weights(), 0.5, output=path),
}


def refused(write: Callable[[Path], Any], path: Path, kind: type[OSError], way_out: str) -> None:
    with pytest.raises(kind) as caught:
        write(path)
    text = str(caught.value)
    assert re.match(r"\w[\w.: ]*: ", text), text
    assert f"{path}" in text
    assert text.endswith(way_out), text


@pytest.mark.parametrize("what", [name for name in FILES if name != "merged"])
def test_a_folder_stands_there(what: str, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    refused(FILES[what], path, IsADirectoryError, f"give a name in it, as {path / 'NAME'}")
    assert [*tmp_path.rglob("*")] == [path]


@pytest.mark.parametrize("what", FILES)
def test_no_folder(what: str, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    path = missing if what == "merged" else missing / "f"
    way_out = f"folder {missing} does not exist; create it first"
    refused(FILES[what], path, FileNotFoundError, way_out)


@pytest.mark.parametrize("below", ["x", "x/y"])
@pytest.mark.parametrize("what", FILES)
def test_a_file_for_a_folder(what: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    way_out = f"{tmp_path / 'file'} is a file, no folder; give another path"
    refused(FILES[what], path, NotADirectoryError, way_out)


@pytest.mark.parametrize("what", FOLDERS)
def test_folders(what: str, tmp_path: Path) -> None:
    missing = tmp_path / "none" / "x"
    way_out = f"folder {missing.parent} does not exist; create it first"
    refused(FOLDERS[what], missing, FileNotFoundError, way_out)
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "x"
    way_out = f"{below.parent} is a file, no folder; give another path"
    refused(FOLDERS[what], below, NotADirectoryError, way_out)
    if what == "sharded":
        way_out = "expected a folder's name, got that of a file; delete it, or give another name"
        refused(FOLDERS[what], tmp_path / "file", NotADirectoryError, way_out)


def test_what_a_cache_is_made_in_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    partial = tmp_path / "cache.partial"
    partial.touch()
    with pytest.raises(NotADirectoryError, match=re.escape(f"cannot write {partial}: ")):
        _cached(path)
    assert partial.is_file()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_folder_that_takes_no_file() -> None:
    """The system's error names the temporary one, which is nobody's concern."""
    with pytest.raises(OSError, match="save elsewhere") as caught:
        report().save("/proc/tax.json")
    assert caught.value.filename == "/proc/tax.json"
