"""Saves that are killed, that meet each other, or that find the disk full."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import EWC, DiagonalFisher, FisherEstimate
from fasttax._base import placed
from fasttax.integrations.reference import TopKReference
from fasttax.tax import TaxReport
from tests.faults.children import ended, running
from tests.faults.written import Model

SIZE = 20_000  # values, in 80 KB
Fill = Callable[[Path, float], Any]
Read = Callable[[Path], float]


def _estimate(fill: float) -> FisherEstimate:
    values = {f"w{i}": torch.full((SIZE // 4,), fill) for i in range(4)}
    return FisherEstimate(values, {"fill": fill})


def _one_of(estimate: FisherEstimate) -> float:
    """The number that all values are."""
    fill = float(estimate.metadata["fill"])
    assert len(estimate) == 4
    assert all(bool((t == fill).all()) for t in estimate.values())
    return fill


def _sharded(path: Path, fill: float) -> None:
    _estimate(fill).save(path, sharded=True, max_shard_bytes=SIZE)


def _ewc(path: Path, fill: float) -> None:
    model = Model()
    fisher = {n: torch.full_like(p, fill) for n, p in model.named_parameters()}
    EWC(model, fisher, strength=fill).save(path)


def _read_ewc(path: Path) -> float:
    ewc = EWC.load(path, Model())
    assert all(bool((t == ewc.strength).all()) for t in ewc.fisher.values())
    return ewc.strength


def _checkpoint(path: Path, fill: float) -> None:
    estimator = DiagonalFisher(Model())
    for t in estimator.sums.tensors().values():
        t.fill_(fill)
    estimator.examples = int(fill)
    estimator.checkpoint(path)


def _resumed(path: Path) -> float:
    estimator = DiagonalFisher(Model())
    estimator.resume(path)
    assert all(bool((t == estimator.examples).all()) for t in estimator.sums.tensors().values())
    return float(estimator.examples)


def _cache(path: Path, fill: float) -> None:
    logp = torch.full((SIZE // 8, 1), -fill)
    tokens, offsets = torch.arange(SIZE // 8), torch.tensor([0, SIZE // 8])
    TopKReference(tokens, offsets, logp, torch.zeros_like(logp).int()).save(path)


def _read_cache(path: Path) -> float:
    cache = TopKReference.load(path)
    assert bool((cache.logp == cache.logp[0]).all())
    return -float(cache.logp[0])


def _report(path: Path, fill: float) -> None:
    made = TaxReport(fill, 0.0)
    for step in range(3):
        made.add(f"{step}", fill - 1, fill, step=step)
    made.save(path)


SAVES: dict[str, tuple[Fill, Read]] = {
    "file": (lambda p, fill: _estimate(fill).save(p), lambda p: _one_of(FisherEstimate.load(p))),
    "folder": (_sharded, lambda p: _one_of(FisherEstimate.load(p))),
    "ewc": (_ewc, _read_ewc),
    "checkpoint": (_checkpoint, _resumed),
    "cache": (_cache, _read_cache),
    "report": (_report, lambda p: TaxReport.load(p).base.capability["capability"]),
}


@pytest.mark.parametrize("what", SAVES)
def test_killed_saves_lose_and_leave_nothing(what: str, tmp_path: Path, soak: bool) -> None:
    """Kill -9 in the middle: the file is one of those saved, and the next save cleans up."""
    save, read = SAVES[what]
    path, draw = tmp_path / "saved", random.Random(0)
    save(path, 1.0)
    left = 0
    for turn in range(200 if soak else 10):
        fills = (float(2 + turn), float(3 + turn))
        before = read(path)

        def both(fills: tuple[float, float] = fills) -> None:
            for fill in fills:
                save(path, fill)

        with running(both):
            time.sleep(draw.uniform(0.001, 0.05))
        left += len([*tmp_path.rglob("*.partial")])
        assert read(path) in (before, *fills)
    save(path, 1.0)
    assert read(path) == 1.0
    assert [*tmp_path.rglob("*.partial")] == []
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == (5 if what == "folder" else 1)
    if soak:
        assert left > 0  # some were killed in the middle


def test_a_killed_merge_leaves_nothing(tmp_path: Path, soak: bool) -> None:
    models = [{f"w{i}": torch.full((SIZE,), float(k)) for i in range(4)} for k in range(2)]
    base = tmp_path / "base"
    fasttax.merge.linear(models[0], models[1], 0.0, output=base)
    path, draw = tmp_path / "merged", random.Random(0)
    for _ in range(100 if soak else 5):

        def merge() -> None:
            fasttax.merge.linear(base, models[1], 0.5, output=path)
            time.sleep(60)  # once it is there there is nothing to do

        with running(merge):
            time.sleep(draw.uniform(0.001, 0.03))
        if path.exists():
            assert bool((fasttax.merge.linear(path, models[1], 0.0)["w3"] == 0.5).all())
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    fasttax.merge.linear(base, models[1], 0.5, output=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged"]


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """A writer takes away what a dead one left, and not what a living one has."""
    path = tmp_path / "f"
    dead = tmp_path / f".f.{'0' * 16}.partial"
    folder = tmp_path / f".f.{'1' * 16}.partial"
    dead.write_text("half")
    folder.mkdir()
    (folder / "part").write_text("half")
    others = [tmp_path / f".g.{'0' * 16}.partial", tmp_path / ".f.partial"]
    for other in others:
        other.write_text("another's")
    with placed.file("op", path) as mine:
        assert not dead.exists()
        assert not folder.exists()
        mine.write_text("first")
        with placed.file("op", path) as second:
            second.write_text("second")
        assert mine.read_text() == "first"
    assert path.read_text() == "first"
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_writers_in_other_processes(what: str, tmp_path: Path, soak: bool) -> None:
    """Two of them, killed now and then, while this one reads: every read is whole."""
    save, read = SAVES[what]
    path = tmp_path / "saved"
    save(path, 1.0)
    for _ in range(60 if soak else 4):
        with running(lambda: save(path, 1.0)), running(lambda: save(path, 2.0)):
            seen: set[float] = set()
            until = time.monotonic() + (5 if soak else 0.5)
            while time.monotonic() < until:
                seen.add(read(path))
            assert seen <= {1.0, 2.0}
    save(path, 3.0)
    assert read(path) == 3.0
    assert [*tmp_path.rglob("*.partial")] == []


@pytest.mark.parametrize("what", [*SAVES, "merge"])
def test_a_full_disk(what: str, tmp_path: Path) -> None:
    """An error with the file's name and the way out; what stood there stands."""
    path = tmp_path / "saved"
    models: Any = [{"w": torch.ones(SIZE)}, {"w": torch.zeros(SIZE)}]
    if what == "merge":
        fasttax.merge.linear(*models, 0.5, output=tmp_path / "base")
    save, read = SAVES.get(what, (None, None))
    if save is not None:
        save(path, 1.0)
    before = sorted(tmp_path.rglob("*"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        if save is None:
            fasttax.merge.linear(tmp_path / "base", models[1], 0.5, output=path)
        else:
            save(path, 2.0)

    said = ended(limited)
    assert "OSError: [Errno 27] File too large; free space there, or save elsewhere" in said
    assert str(path) in said.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
    if read is not None:
        assert read(path) == 1.0


def test_offload_on_a_full_disk() -> None:
    model = Model()
    fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        EWC(model, fisher, strength=1.0, offload="cpu")

    said = ended(limited)
    assert "OSError: [Errno 27] File too large; free space there, or save elsewhere" in said
    assert "offload='cpu'" in said


def test_offload_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it by a process that is killed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = Model()
    fisher = {n: torch.full_like(p, 2.0) for n, p in model.named_parameters()}
    ewc = EWC(model, fisher, strength=1.0, offload="cpu")
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert float(ewc.penalty().detach()) == sum(p.numel() for p in model.parameters())


def _fill(path: Path) -> None:
    """A file that takes all the space that there is."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_disk_of_its_own(tmp_path: Path, soak: bool) -> None:
    if not soak:
        pytest.skip("mounts a file system: make soak")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        for what in SAVES:
            save, read = SAVES[what]
            path = disk / what
            save(path, 1.0)
            filler = disk / "filler"
            _fill(filler)
            before = sorted(disk.rglob("*"))
            with pytest.raises(OSError, match=r"No space left.*free space there") as caught:
                save(path, 2.0)
            assert str(path) in str(caught.value)
            assert read(path) == 1.0
            assert sorted(disk.rglob("*")) == before
            filler.unlink()
            subprocess.run(["rm", "-r", path], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert os.listdir(disk) == []
