"""A cache that is written as it is made: whole, and to the bit, whatever stops it in between."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax._base import files, hashes, mapped
from fasttax.integrations import _reference_file, reference
from fasttax.integrations.reference import TopKReference
from tests.tools import tiny_lm

ROOT = Path(__file__).resolve().parents[2]
V, K = 23, 5


class Toy(nn.Module):
    """Logits by the token alone; the forward of a number stops."""

    def __init__(self, stop_at: int | None = None, vocabulary: int = V) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return SimpleNamespace(logits=self.table(input_ids))


def sequences(count: int = 9) -> list[list[int]]:
    lengths = [2 + (7 * i) % 11 for i in range(count)]
    return [[(i * n + i) % V for i in range(n)] for n in lengths]


def make(path: Path, model: nn.Module, **options: Any) -> dict[str, Any]:
    given = {"k": K, "batch_size": 2, "progress": False, **options}
    return TopKReference.make_file(path, model, sequences(), **given)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of a run that nothing stopped: 5 batches."""
    path = tmp_path / "whole.safetensors"
    make(path, Toy())
    return path.read_bytes()


def test_the_file_is_what_make_keeps_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    metadata = make(path, Toy())
    made = TopKReference.make(Toy(), sequences(), k=K, batch_size=2)
    read = TopKReference.load(path)
    assert metadata == read.metadata == made.metadata
    for name in ("tokens", "offsets", "logp", "ids"):
        assert torch.equal(getattr(read, name), getattr(made, name)), name
        assert getattr(read, name).dtype == getattr(made, name).dtype
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # what others read it with
        assert torch.equal(file.get_tensor("logp"), made.logp)


@pytest.mark.parametrize("stops", [(1,), (4,), (1, 2, 1)])
def test_it_goes_on_where_it_was_stopped(
    stops: tuple[int, ...], tmp_path: Path, whole: bytes
) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"old")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            make(path, Toy(stop))
        assert path.read_bytes() == b"old"
    last = Toy()
    make(path, last)
    assert last.calls == 5 - sum(stops)
    assert path.read_bytes() == whole
    assert not (tmp_path / "cache.safetensors.partial").exists()


def test_what_a_power_loss_takes_is_made_again(tmp_path: Path, whole: bytes) -> None:
    """Values of which the line is there, a line that is torn, and all of the values."""
    path = tmp_path / "cache.safetensors"
    partial = tmp_path / "cache.safetensors.partial"

    def values_lost() -> None:
        data = bytearray((partial / "values").read_bytes())
        data[8 + 4096 + 500 :] = bytes(len(data) - 8 - 4096 - 500)
        (partial / "values").write_bytes(data)

    def line_torn() -> None:
        text = (partial / "done.jsonl").read_bytes()
        (partial / "done.jsonl").write_bytes(text[:-9])

    def line_garbled() -> None:
        lines = (partial / "done.jsonl").read_bytes().splitlines(keepends=True)
        (partial / "done.jsonl").write_bytes(b"".join([*lines[:2], b"\0\0\n", *lines[3:]]))

    def no_record() -> None:
        lines = (partial / "done.jsonl").read_bytes().splitlines(keepends=True)
        (partial / "done.jsonl").write_bytes(b"".join([*lines[:2], b"7\n", *lines[3:]]))

    def no_vocabulary() -> None:
        text = (partial / "done.jsonl").read_bytes()
        (partial / "done.jsonl").write_bytes(text.replace(b"vocabulary", b"vocabularx"))

    def no_values() -> None:
        (partial / "values").unlink()

    for harm, again in (
        (values_lost, 5),
        (line_torn, 3),
        (line_garbled, 4),
        (no_record, 4),
        (no_vocabulary, 5),
        (no_values, 5),
    ):
        with pytest.raises(KeyboardInterrupt):
            make(path, Toy(3))
        harm()
        last = Toy()
        make(path, last)
        assert 0 < last.calls <= again, harm.__name__
        assert path.read_bytes() == whole, harm.__name__


def test_another_run_is_not_gone_on_with(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cache.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(path, Toy(2))
    other = Toy()
    with torch.no_grad():
        other.table.weight.add_(1)
    for options, says in (
        ({"k": 4}, "k 5, now 4"),
        ({"batch_size": 3}, "batch_size 2, now 3"),
        ({"temperature": 2.0}, "temperature 1.0, now 2.0"),
    ):
        with pytest.raises(ValueError, match=f"{says}; .*restart="):
            make(path, Toy(), **options)
    with pytest.raises(ValueError, match="model '"):
        make(path, other)
    with pytest.raises(ValueError, match="sequences '"):
        TopKReference.make_file(path, Toy(), [[1, 2]], k=K, batch_size=2)
    shutil.copytree(tmp_path / "cache.safetensors.partial", tmp_path / "b.safetensors.partial")
    last = Toy()
    make(path, last)
    assert last.calls == 3
    assert path.read_bytes() == whole
    anew = Toy()
    make(tmp_path / "b.safetensors", anew, restart=True, temperature=2.0)
    assert anew.calls == 5
    assert TopKReference.load(tmp_path / "b.safetensors").temperature == 2.0


def test_a_model_is_more_than_its_parameters(tmp_path: Path) -> None:
    """Of the same weights a rope's base, a quantized layer's buffers, an adapter's scale."""

    class Config:
        def __init__(self, name: str, theta: float, kinds: set[str]) -> None:
            written = {"transformers_version": name, "torch_dtype": name, "rope_theta": theta}
            self.facts = {"_name_or_path": name, "text_config": written, "kinds": kinds}

        def to_dict(self) -> dict[str, Any]:
            return dict(self.facts)

    def toy(stop: int | None, **changes: Any) -> Toy:
        model: Any = Toy(stop)
        given = {"name": "a", "theta": 1e4, "kinds": {"q", "k"}, "codes": 1, "alpha": 8, **changes}
        model.config = Config(given["name"], given["theta"], given["kinds"])
        model.peft_config = {"default": Config("", given["alpha"], set())}
        model.register_buffer("codes", torch.full((3,), given["codes"], dtype=torch.uint8))
        return model

    path = tmp_path / "cache.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(path, toy(2))
    for changes in ({"theta": 1e6}, {"kinds": {"q"}}, {"alpha": 16}):
        with pytest.raises(ValueError, match=r"configuration '.*restart="):
            make(path, toy(None, **changes))
    with pytest.raises(ValueError, match=r"model '.*restart="):
        make(path, toy(None, codes=2))
    last = toy(None, name="elsewhere")
    make(path, last)
    assert last.calls == 3


def test_a_folder_that_its_last_writer_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the next one's opening of the journal and its lock."""
    path, folder = tmp_path / "cache.safetensors", tmp_path / "cache.safetensors.partial"
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def late(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            shutil.rmtree(folder)
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    make(path, Toy())
    assert len(calls) == 2
    assert len(TopKReference.load(path)) == 9
    assert not folder.exists()


def test_two_at_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    refused: list[BlockingIOError] = []

    class Second(Toy):
        def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            try:
                make(path, Toy())
            except BlockingIOError as error:
                refused.append(error)
            return super().forward(input_ids)

    make(path, Second())
    assert len(refused) == 5
    assert "another process is writing" in str(refused[0])
    assert len(TopKReference.load(path)) == 9


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    yield
    assert list(folder.iterdir()) == []


def test_what_fails_before_the_first_batch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.safetensors"
    broken = Toy()
    with torch.no_grad():
        broken.table.weight.fill_(torch.nan)
    with nothing_left(tmp_path), pytest.raises(ValueError, match="NaN for sequence"):
        make(path, broken)
    with nothing_left(tmp_path), pytest.raises(ValueError, match="from 1 to V = 23"):
        make(path, Toy(), k=24)
    with nothing_left(tmp_path), pytest.raises(ValueError, match="at least 2 tokens"):
        TopKReference.make_file(path, Toy(), [[1, 2], [3]])
    with nothing_left(tmp_path), pytest.raises(FileNotFoundError, match="create it first"):
        make(tmp_path / "none" / "x", Toy())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with nothing_left(tmp_path), pytest.raises(OSError, match="make room"):
        make(path, Toy())


KILLED = """
import os, resource, signal, sys
from tests.integrations.test_reference_file import Toy
from fasttax.integrations.reference import TopKReference
from tests.tools import tiny_lm

class Killed(Toy):
    def forward(self, input_ids, **_):
        if self.calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input_ids)

rows = [[(i * n) % 64 for i in range(1000)] for n in range(200)]
model = Killed(vocabulary=64)
TopKReference.make_file(sys.argv[1] + "x", model, rows[:2], k=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.calls = 0
TopKReference.make_file(sys.argv[1], model, rows, k=64, batch_size=2)
print(model.calls, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_killed_process_loses_nothing_and_memory_does_not_grow(tmp_path: Path) -> None:
    """102 MB of log-probs; what a batch of 2 x 1000 tokens takes is a few."""
    path = tmp_path / "cache.safetensors"

    def run(stop: int, at: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(at), str(stop)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run(60, path).returncode == -signal.SIGKILL
    assert not path.exists()
    done = run(-1, path)
    assert done.returncode == 0, done.stderr
    calls, grown = map(int, done.stdout.split())
    assert calls == 40
    assert grown < 60_000  # KB
    assert path.stat().st_size > 100_000_000
    rows = [[(i * n) % 64 for i in range(1000)] for n in range(200)]
    made = TopKReference.make(Toy(vocabulary=64), rows, k=64, batch_size=2)
    read = TopKReference.load(path)
    assert torch.equal(read.logp, made.logp)
    assert torch.equal(read.ids, made.ids)


def status(key: str) -> int:
    """Bytes of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
def test_a_file_is_read_without_being_held(tmp_path: Path) -> None:
    """205 MB of lists, of which 1 << 18 entries are checked at a time."""
    path, n, k, length = tmp_path / "cache.safetensors", 400_000, 64, 1000
    specs = {
        "tokens": (torch.int64, (n,)),
        "offsets": (torch.int64, (n // length + 1,)),
        "logp": (torch.float32, (n, k)),
        "ids": (torch.int32, (n, k)),
    }
    with mapped.Filled(path, specs) as file:
        file.write("tokens", 0, torch.arange(n))
        file.write("offsets", 0, torch.arange(0, n + 1, length))
        for row in range(0, n, 10_000):
            at = torch.arange(row, row + 10_000)[:, None]
            file.write("logp", row, -5.0 - (at % 97).float().expand(-1, k))
            file.write("ids", row, ((at + torch.arange(k)) % 512).int())
        file.finish(reference.KIND, {"vocabulary": 512})
    assert path.stat().st_size > 200_000_000
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    read = TopKReference.load(path)
    assert len(read) == n // length
    assert status("VmHWM") - before < 50_000_000
    held = status("RssAnon")
    for begin in range(0, n, length):
        at = torch.arange(begin, begin + length - 1)[:, None]
        logp, ids = read.lookup(torch.arange(begin, begin + length))
        assert torch.equal(logp, -5.0 - (at % 97).float().expand(-1, k))
        assert torch.equal(ids, (at + torch.arange(k)) % 512)
    assert read.highest_id == 511
    # what was read lies in the system's cache, and is its to drop
    assert status("RssAnon") - held < 20_000_000


def test_every_bit_of_the_lists_is_checked(tmp_path: Path, whole: bytes) -> None:
    """Of a file that is read some rows at a time, in each part."""
    path = tmp_path / "cache.safetensors"
    for place in range(len(whole) - 8 * K * sum(map(len, sequences())), len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: .*checksum does not match"):
            TopKReference.load(path)


def test_rows_at_a_time_are_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"x": torch.randn(7, 3), "none": torch.empty(4, 0), "one": torch.randn(5)}
    files.write(path, "kind", tensors, {})
    with mapped.TensorFile(path) as file:
        for rows in (1, 2, 7, 100):
            assert torch.equal(torch.cat(list(file.parts("x", rows))), tensors["x"])
            assert torch.equal(torch.cat(list(file.parts("one", rows))), tensors["one"])
            assert not list(file.parts("none", rows))
        assert [len(some) for some in file.parts("x", 3)] == [3, 3, 1]


def test_a_model_that_is_changed_anywhere_is_another(tmp_path: Path) -> None:
    """An edited row, as of an added token, lies between the samples of `weights_hash`."""

    def edited(change: str) -> Toy:
        model = Toy(vocabulary=600)
        with torch.no_grad():
            rows = model.table.weight
            if change == "a row":
                rows[300] += 1
            elif change == "one bit":
                rows[300, 7] = -rows[300, 7]
            elif change == "two rows swapped":
                rows[[300, 302]] = rows[[302, 300]]
            elif change == "signs of two":
                rows[300, [7, 9]] = -rows[300, [7, 9]]
        return model

    plain = Toy(vocabulary=600)
    sample = hashes.weights_hash(plain.named_parameters())
    path = tmp_path / "cache.safetensors"
    stopped = Toy(2, vocabulary=600)
    with pytest.raises(KeyboardInterrupt):
        make(path, stopped)
    for change in ("a row", "one bit", "two rows swapped", "signs of two"):
        assert hashes.weights_hash(edited(change).named_parameters()) == sample, change
        with pytest.raises(ValueError, match=r"model 'crc1-.*restart="):
            make(path, edited(change))
    metadata = make(path, plain)
    assert plain.calls == 3
    assert metadata["model"] == hashes.fingerprint(plain.named_parameters())


def test_a_fingerprint_is_of_names_dtypes_shapes_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.arange(24.0).view(4, 6)
    every = [
        [("x", x)],
        [("y", x)],
        [("x", x.view(6, 4))],
        [("x", x.view(torch.int32))],
        [("x", x.bfloat16())],
        [("x", x.T)],
        [("x", x), ("none", torch.empty(0))],
        [("x", x), ("none", torch.empty(0, 2))],
        [("x", x), ("one", torch.tensor(True))],
    ]
    found = [hashes.fingerprint(tensors) for tensors in every]
    assert len({*found}) == len(every)
    assert hashes.fingerprint([("x", x.T.contiguous().T)]) == found[0]
    assert hashes.fingerprint(reversed(every[-1])) == found[-1]
    monkeypatch.setattr(hashes, "PART", 5)
    assert [hashes.fingerprint(tensors) for tensors in every] == found


def test_the_same_model_by_another_transformers(tmp_path: Path) -> None:
    """A real configuration, as another version wrote it, from another place and in another name."""
    from transformers import AutoModelForCausalLM

    written = tiny_lm.save(tmp_path / "one")
    shutil.copytree(written, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    config |= {"transformers_version": "4.57.1", "architectures": None}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    one, two, other = (
        _reference_file.identity(AutoModelForCausalLM.from_pretrained(tmp_path / name, **options))
        for name, options in (("one", {}), ("two", {}), ("one", {"rms_norm_eps": 0.1}))
    )
    assert one == two
    assert one["model"] == other["model"]
    assert one["configuration"] != other["configuration"]
