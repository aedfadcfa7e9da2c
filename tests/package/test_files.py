"""Files of fasttax: whole or not at all, one of two writers', and damage is seen."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fasttax
from fasttax import DiagonalFisher, FisherEstimate
from fasttax._base import mapped, placed
from tests.tools.models import TokenModel, ids

HEADER = {"fasttax": "FisherEstimate", "metadata": "{}"}  # of a file of an earlier version


def estimate(fill: float = 1.0) -> FisherEstimate:
    g = torch.Generator().manual_seed(0)
    values = {"a.weight": torch.rand(7, 5, generator=g), "b": torch.rand(300, generator=g)}
    values |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    return FisherEstimate({n: t * fill for n, t in values.items()}, {"fill": fill})


def same(a: FisherEstimate, b: FisherEstimate) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- modes, crashes, writers and readers -------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        estimate().save(tmp_path / "one")
        estimate().save(tmp_path / "parts", sharded=True, max_shard_bytes=300)
        fasttax.merge.linear({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0.5, output=tmp_path / "m")
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 4
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_dir()} == {
        0o777 & ~umask
    }


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    estimate().save(path)
    path.chmod(0o640)
    estimate(2).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert same(FisherEstimate.load(path), estimate(2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(error: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def write() -> None:
        with placed.file("op", path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_an_interrupted_folder_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "f"
    estimate().save(folder, sharded=True, max_shard_bytes=300)
    before = sorted(os.listdir(folder))
    real, calls = mapped.write_streamed, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(mapped, "write_streamed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimate(2).save(folder, sharded=True, max_shard_bytes=300)
    assert sorted(os.listdir(folder)) == before
    assert same(FisherEstimate.load(folder), estimate())


@pytest.mark.parametrize("sharded", [False, True])
def test_writers_and_a_reader_at_once(sharded: bool, tmp_path: Path) -> None:
    """Every read is one of the two estimates, whole, and so is what is left."""
    path, stop = tmp_path / "f", threading.Event()
    estimate(1).save(path, sharded=sharded, max_shard_bytes=300)
    done: list[float] = []

    def write(fill: float) -> None:
        while not stop.is_set():
            estimate(fill).save(path, sharded=sharded, max_shard_bytes=300)
        done.append(fill)

    writers = [threading.Thread(target=write, args=(fill,)) for fill in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    seen: list[float] = []
    try:
        while len(seen) < 100 or {*seen} != {1.0, 2.0}:  # a reader that starves hangs here
            found = FisherEstimate.load(path)
            assert same(found, estimate(found.metadata["fill"]))
            seen.append(found.metadata["fill"])
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert sorted(done) == [1.0, 2.0]
    found = FisherEstimate.load(path)
    assert same(found, estimate(found.metadata["fill"]))
    assert len([*tmp_path.rglob("*.safetensors")]) in (0, 4)  # three parts, the index
    assert [*tmp_path.rglob("*.partial")] == []


def test_an_open_file_is_one_file(tmp_path: Path) -> None:
    """What takes its place after the header was read changes nothing."""
    path = tmp_path / "f"
    estimate(1).save(path)
    with mapped.TensorFile(path) as file:
        estimate(2).save(path)
        assert torch.equal(file["fisher.b"], estimate(1)["b"])


def test_memory_that_is_shared_is_saved_under_each_name(tmp_path: Path) -> None:
    w = torch.rand(4, 6)
    f = FisherEstimate({"whole": w, "again": w, "rows": w[1:3], "turned": w.T})
    f.save(tmp_path / "f")
    assert same(FisherEstimate.load(tmp_path / "f"), f)
    assert torch.equal(load_file(tmp_path / "f")["fisher.turned"], w.T)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "u8log"])
def test_every_flipped_bit_is_seen(storage: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    estimate().to(storage).save(path)
    raw = path.read_bytes()
    for bit in range(0, 8 * len(raw), 7):  # 7 meets each bit of a byte
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(path)):
            FisherEstimate.load(path)


def test_a_flipped_bit_of_a_checkpoint_and_of_a_merge_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "state"
    estimator = DiagonalFisher(TokenModel())
    estimator.update(ids(2, 6))
    estimator.checkpoint(path)
    _flip_last(path)
    with pytest.raises(ValueError, match=f"{path}.*checksum"):
        DiagonalFisher(TokenModel()).resume(path)
    merged = tmp_path / "m.safetensors"
    fasttax.merge.linear({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0.5, output=merged)
    _flip_last(merged)
    with pytest.raises(ValueError, match=rf"merge\.linear: base: {merged}: a: the checksum"):
        fasttax.merge.linear(merged, {"a": torch.ones(2)}, 0.5)


def _flip_last(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


F = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, Any] = {
    "no object": [],
    "deep": b"[" * 200_000,
    "not text": b"\xff\xfe",
    "metadata of numbers": {"__metadata__": {"fasttax": 3}},
    "no metadata": {"__metadata__": {"fasttax": "FisherEstimate"}},
    "metadata no JSON": {"__metadata__": {**HEADER, "metadata": "{"}},
    "metadata deep": {"__metadata__": {**HEADER, "metadata": "[" * 200_000}},
    "no place": {"__metadata__": HEADER, "fisher.a": {"dtype": "F32", "shape": [1]}},
    "an entry of numbers": {"__metadata__": HEADER, "fisher.a": 3},
    "outside": {"__metadata__": HEADER, "fisher.a": {**F, "data_offsets": [4, 8]}},
    "negative": {"__metadata__": HEADER, "fisher.a": {**F, "data_offsets": [-4, 0]}},
    "shape": {"__metadata__": HEADER, "fisher.a": {**F, "shape": [2]}},
    "overlap": {"__metadata__": HEADER, "fisher.a": F, "fisher.b": F},
    "twice": b'{"fisher.a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"fisher.a":{"dtype":'
    b'"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":' + json.dumps(HEADER).encode() + b"}",
    "unknown entry": {"__metadata__": {**HEADER, "chacksum": "0"}, "fisher.a": F},
    "checksums no JSON": {
        "__metadata__": {**HEADER, "checksum": "00000000", "checksums": "["},
        "fisher.a": F,
    },
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_broken_header_names_the_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    _file(path, HEADERS[case], b"\0\0\0\0")
    for read in (FisherEstimate.load, lambda p: fasttax.merge.linear(p, {"a": torch.ones(1)}, 0.5)):
        with pytest.raises(ValueError, match=str(path)):
            read(path)


# --- sharded folders ---------------------------------------------------------------------------


def _rewrite_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = folder / "index.safetensors"
    with mapped.TensorFile(index) as file:
        metadata = json.loads(file.about["metadata"])
    change(metadata)
    save_file({"empty": torch.empty(0)}, index, {**HEADER, "metadata": json.dumps(metadata)})


def _outside(metadata: dict[str, Any]) -> None:
    parts = metadata["_parts"]
    name = next(iter(parts))
    parts[f"../{name}"] = parts.pop(name)


def _absolute(metadata: dict[str, Any]) -> None:
    metadata["_parts"]["/etc/part-00-00000.safetensors"] = []


INDICES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a name is missing": (lambda m: next(iter(m["_parts"].values())).pop(), "other tensors"),
    "a part is missing": (lambda m: m["_parts"].popitem(), "does not name part-"),
    "a name too many": (lambda m: next(iter(m["_parts"].values())).append("z"), "other tensors"),
    "outside": (_outside, "no part file beside it"),
    "absolute": (_absolute, "no part file beside it"),
    "no parts": (lambda m: m.pop("_parts"), "names no part files"),
    "parts as a list": (lambda m: m.update(_parts=[*m["_parts"]]), "names no part files"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit(case: str, tmp_path: Path) -> None:
    folder, (change, words) = tmp_path / "f", INDICES[case]
    estimate().save(folder, sharded=True, max_shard_bytes=300)
    _rewrite_index(folder, change)
    with pytest.raises(ValueError, match=words) as caught:
        FisherEstimate.load(folder)
    assert str(folder) in str(caught.value)


# --- files of earlier versions -----------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
def test_files_without_checksums_load(storage: str, tmp_path: Path) -> None:
    f = estimate().to(storage)
    tensors = {k: t for n in f for k, t in f.stored(n).tensors(n).items()}
    save_file(tensors, tmp_path / "old", {**HEADER, "metadata": json.dumps(f.metadata)})
    again = FisherEstimate.load(tmp_path / "old")
    assert same(again, f)
    assert again.metadata == f.metadata


def test_a_checkpoint_that_does_not_say_its_shift_is_taken_up(tmp_path: Path) -> None:
    path, model = tmp_path / "state", TokenModel()
    estimator = DiagonalFisher(model)
    estimator.update(ids(2, 6))
    estimator.checkpoint(path)
    with mapped.TensorFile(path) as file:
        tensors, metadata = dict(file), json.loads(file.about["metadata"])
    facts = {k: v for k, v in metadata.items() if k not in ("shift", "fallback")}
    save_file(tensors, path, {"fasttax": "DiagonalFisher", "metadata": json.dumps(facts)})
    resumed = DiagonalFisher(model)
    resumed.resume(path)
    assert resumed.examples == 2
