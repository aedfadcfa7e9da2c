"""Damaged and foreign files: an error that names the file and the way out, never wrong numbers."""

from __future__ import annotations

import functools
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import EWC, DiagonalFisher, FisherEstimate
from fasttax._base import mapped
from fasttax.tax import TaxReport
from tests.faults.written import KINDS, Kind, Model, report

# what an error's way out may begin with
WAY_OUT = re.compile(
    r"write it|save|copy|delete|estimate it|make the|make it|see help|run |merge with|give the"
    r"|none of them|measure|expected"
)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A read that takes longer than a minute hangs; `outcome` begins each anew."""
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> None:
    raise AssertionError("no end after a minute")


@pytest.fixture
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, Path]:
    kind = KINDS[request.param]
    path = tmp_path / "file.safetensors"
    kind.write(path)
    kind.read(path)  # the whole one
    return kind, path


every_kind = pytest.mark.parametrize("written", KINDS, indirect=True)


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read and "", or None and the error's text."""
    signal.alarm(60)
    try:
        return read(), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def unchanged(found: Any) -> bool:
    """Whether it is the report that was written: spaces, digits beyond float64, a line again."""
    return isinstance(found, TaxReport) and found.as_dict() == report().as_dict()


def refuses(kind: Kind, path: Path, what: object) -> None:
    """Reading is an error with the file's name and a way out."""
    _, text = outcome(lambda: kind.read(path))
    assert text, f"{what}: was read"
    assert str(path) in text, f"{what}: {text}"
    assert WAY_OUT.search(text), f"{what}: {text}"


@every_kind
def test_truncated(written: tuple[Kind, Path], soak: bool) -> None:
    kind, path = written
    raw = path.read_bytes()
    end = len(raw.rstrip())  # a report's last line feed is no part of it
    header = 8 + int.from_bytes(raw[:8], "little")
    edges = {0, 1, 7, 8, 9, header - 1, header, header + 1, end - 1}
    some = edges if soak else edges | set(random.Random(0).sample(range(end), 40))
    for length in sorted(n for n in (range(end) if soak else some) if 0 <= n < end):
        path.write_bytes(raw[:length])
        refuses(kind, path, length)


@every_kind
def test_flipped_bits(written: tuple[Kind, Path], soak: bool) -> None:
    """Each is an error, or changes nothing that is read: a space in JSON, say."""
    kind, path = written
    raw = path.read_bytes()
    places = range(8 * len(raw)) if soak else random.Random(0).sample(range(8 * len(raw)), 150)
    for bit in places:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found, text = outcome(lambda: kind.read(path))
        if text:
            assert str(path) in text, bit
        else:
            assert unchanged(found), bit


@every_kind
def test_flipped_bits_of_the_formats_name(written: tuple[Kind, Path]) -> None:
    """It is no foreign file, of which nothing is checked."""
    kind, path = written
    raw = path.read_bytes()
    for begin in (m.start() for m in re.finditer(rb"fasttax|checksums?", raw[:300])):
        for bit in range(8 * begin, 8 * begin + 56):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            refuses(kind, path, bit)


@every_kind
def test_garbage(written: tuple[Kind, Path], soak: bool) -> None:
    """Some bytes replaced, taken out, doubled, or put in."""
    kind, path = written
    raw, draw = path.read_bytes(), random.Random(1)
    for turn in range(3000 if soak else 60):
        begin = draw.randrange(len(raw) - 1)
        end = draw.randint(begin + 1, min(len(raw), begin + 40))
        put = draw.choice([b"", raw[begin:end] * 2, draw.randbytes(end - begin), b"\0" * 9])
        spoiled = raw[:begin] + put + raw[end:]
        if spoiled == raw:
            continue
        path.write_bytes(spoiled)
        if not unchanged(outcome(lambda: kind.read(path))[0]):
            refuses(kind, path, (turn, begin, end, put))


@every_kind
def test_longer(written: tuple[Kind, Path]) -> None:
    kind, path = written
    raw = path.read_bytes()
    for more in (b"\0", b"x" * 100, raw):
        path.write_bytes(raw + more)
        refuses(kind, path, more[:5])


@pytest.mark.parametrize("other", KINDS)
@every_kind
def test_renamed(written: tuple[Kind, Path], other: str, tmp_path: Path) -> None:
    """A file of another kind under this name; storages of one kind are one, and merges take all."""
    kind, _ = written
    path = tmp_path / "other.safetensors"
    KINDS[other].write(path)
    if KINDS[other].read is kind.read or (kind.read is KINDS["merged"].read and other != "report"):
        return
    if kind.read.__code__ is KINDS[other].read.__code__ or ("ewc" in other and _is_ewc(kind)):
        return
    refuses(kind, path, other)


def _is_ewc(kind: Kind) -> bool:
    return any(kind is KINDS[name] for name in KINDS if name.startswith("ewc"))


@every_kind
def test_lengths_of_headers(written: tuple[Kind, Path]) -> None:
    kind, path = written
    raw = path.read_bytes()
    for length in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(raw), len(raw) - 8, 10**8):
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
        refuses(kind, path, length)


@every_kind
def test_no_file(written: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, path = written
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        kind.read(path)


# --- headers that nobody wrote, with checksums that fit ------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Changes the file's tensors and metadata, and writes it with checksums of its own."""
    with mapped.TensorFile(path) as file:
        tensors, about = dict(file), file.about
    metadata = json.loads(about["metadata"])
    change(tensors, metadata)
    specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    mapped.write_streamed(path, about["fasttax"], specs, metadata, tensors.items())


def junk() -> list[Any]:
    return [None, 3, -1, 10**400, 1e300, "x", "torch.load", [], {}, [[]], {"a": 1}, True]


@pytest.mark.parametrize("name", ["ewc", "ewc-u8log", "ewc-kronecker"])
def test_ewc_with_other_facts(name: str, tmp_path: Path, soak: bool) -> None:
    """Any fact replaced or gone: an error that names the file, or an EWC as it was."""
    path = tmp_path / "file"
    KINDS[name].write(path)
    raw, want = path.read_bytes(), float(_moved(EWC.load(path, Model())))
    with mapped.TensorFile(path) as file:
        facts = json.loads(file.about["metadata"])["ewc"]
    cases = [(key, value) for key in (*facts, "ewc") for value in (*junk(), "gone")]
    for key, value in cases:
        path.write_bytes(raw)
        rewrite(path, functools.partial(_with_fact, key, value))
        found, text = outcome(lambda: EWC.load(path, Model()))
        if text:
            assert str(path) in text, (key, value)
        elif key != "strength":
            assert float(_moved(found)) == pytest.approx(want), (key, value)


def _without(gone: str, tensors: dict[str, Any], _: dict[str, Any]) -> None:
    del tensors[gone]


def _with_fact(key: str, value: Any, _: dict[str, Any], metadata: dict[str, Any]) -> None:
    where = metadata if key == "ewc" else metadata["ewc"]
    where[key] = value
    if value == "gone":
        del where[key]


def _moved(ewc: EWC) -> Any:
    with torch.no_grad():
        for p in ewc.parameters().values():
            p.add_(0.1)
    return ewc.penalty().detach()


@pytest.mark.parametrize("name", ["ewc", "ewc-u8log", "ewc-kronecker", "checkpoint", "kronecker"])
def test_a_tensor_is_missing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    KINDS[name].write(path)
    raw = path.read_bytes()
    with mapped.TensorFile(path) as file:
        names = list(file)
    for gone in names:
        if name == "kronecker" and gone.startswith("fisher."):
            continue  # an estimate of fewer parameters
        path.write_bytes(raw)
        rewrite(path, functools.partial(_without, gone))
        refuses(KINDS[name], path, gone)


def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    KINDS["checkpoint"].write(path)
    for gone in ("generator", "error.total"):
        KINDS["checkpoint"].write(path)
        rewrite(path, functools.partial(_without, gone))
        estimator = DiagonalFisher(Model())
        with pytest.raises(ValueError, match=f"{path} has no whole {gone}"):
            estimator.resume(path)
        assert estimator.examples == 0
        assert not any(bool(t.any()) for t in estimator.sums.tensors().values())


def test_an_update_with_half_an_anchor_is_refused() -> None:
    """Without lora_a the anchor of a LoRA update would be 0 without a word."""
    ewc = EWC(Model(), {"head.weight": torch.rand(7, 4)}, strength=1.0)
    for lone in ("lora_b.head.weight", "lora_a.head.weight", "left.head.weight", "scales.x", "y"):
        state = ewc.state_dict()
        state["tensors"][lone] = torch.ones(7, 2)
        with pytest.raises(ValueError, match=rf"EWC\.load_state_dict: state: .*{lone} alone"):
            ewc.load_state_dict(state)


SHAPES = {
    "0 x 2^70": [0, 2**70],
    "strides beyond 64 bits": [0, 2**62, 2**62],
    "a thousand dimensions": [1] * 1000,
    "long numbers": [10**4000] * 2000,
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_no_tensor_has(case: str, tmp_path: Path) -> None:
    path, shape = tmp_path / "file", SHAPES[case]
    size = 4 if case.startswith("a ") else 0
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    about = {"fasttax": "FisherEstimate", "metadata": "{}"}
    text = json.dumps({"__metadata__": about, "fisher.a": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    with pytest.raises(ValueError, match=f"{path} is truncated or no safetensors file"):
        FisherEstimate.load(path)
    with pytest.raises(ValueError, match=f"{path} is truncated or no safetensors file"):
        fasttax.merge.linear(path, {"fisher.a": torch.ones(1)}, 0.5)


# --- indices of folders --------------------------------------------------------------------------

OUTSIDE = ("../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", ".")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_no_file_outside(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    KINDS["merged"].write(tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(folder))):
        fasttax.merge.linear(folder, {"head.weight": torch.ones(7, 4)}, 0.5)


# --- reports and results -------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has parts, itself not counted."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts if isinstance(value, dict | list) else ():
        yield (*path, key)
        yield from leaves(part, (*path, key)) if isinstance(part, dict | list) else ()


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    where = copy
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return copy


def test_a_changed_number_of_a_report_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tax.json"
    report().save(path)
    text = path.read_text()
    assert '"kl": 0.25' in text
    path.write_text(text.replace('"kl": 0.25', '"kl": 0.45'))
    with pytest.raises(ValueError, match=f"{path}, whose checksum.*delete its line 'checksum'"):
        TaxReport.load(path)
    changed = json.loads(path.read_text())
    del changed["checksum"]
    path.write_text(json.dumps(changed))
    assert TaxReport.load(path).checkpoints[0].kl == 0.45


def test_reports_of_other_contents(tmp_path: Path, soak: bool) -> None:
    """Each part replaced in turn, as by hand: read, or refused with the file's name."""
    path, content = tmp_path / "tax.json", report().as_dict()
    parts = list(leaves(content))
    for place in parts if soak else parts[:: max(1, len(parts) // 40)]:
        for value in junk():
            path.write_text(json.dumps(replaced(content, place, value)))
            _, text = outcome(lambda: TaxReport.load(path))
            assert not text or str(path) in text, (place, value)


LM_EVAL = {
    "results": {
        "mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.01},
        "gsm8k": {"exact_match,strict": 0.3, "exact_match_stderr,strict": "N/A"},
    },
    "group_subtasks": {"mmlu": ["a", "b"], "a": ["c"], "b": []},
    "n-samples": {"a": {"effective": 10}, "b": {"effective": 3}},
    "higher_is_better": {"mmlu": {"acc": True}},
    "config": {"model_args": {"pretrained": "base"}},
    "versions": {"mmlu": 1},
    "n-shot": {"mmlu": 5},
}


def test_results_of_other_contents(tmp_path: Path, soak: bool) -> None:
    base, path = tmp_path / "base.json", tmp_path / "results.json"
    base.write_text(json.dumps(LM_EVAL))
    for place in leaves(LM_EVAL):
        for value in junk():
            path.write_text(json.dumps(replaced(LM_EVAL, place, value)))
            for files in ([base, path], [path, base]):
                _, text = outcome(functools.partial(TaxReport.from_lm_eval, files, tasks=["mmlu"]))
                assert not text or str(path) in text or "TaxReport" in text, (place, value)


def test_groups_within_each_other(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    turns = {"mmlu": ["a"], "a": ["b"], "b": ["mmlu", "a"]}
    path.write_text(json.dumps({**LM_EVAL, "group_subtasks": turns}))
    report = TaxReport.from_lm_eval([path, path])
    assert report.base.capability["gsm8k"] == 0.3


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", "NaN", "\ufeff{}"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    for read in (TaxReport.load, lambda p: TaxReport.from_lm_eval([p, p])):
        with pytest.raises(ValueError, match=str(path)):
            read(path)


# --- mergekit's configurations -------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAML: dict[str, str] = {
    "deep": "merge_method: linear\nmodels: " + "[" * 50_000,
    "a number without end": "merge_method: linear\nparameters: {weight: " + "1" * 5000 + "}",
    "no date": "merge_method: 2001-99-99",
    "bomb in a key": BOMB + "merge_method: linear\n",
    "bomb as method": BOMB.replace("a11:", "merge_method:"),
    "bomb in parameters": "merge_method: linear\nparameters:\n"
    + "".join(f"  {line}\n" for line in BOMB.splitlines()),
    "a loop": "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: &x [*x]}\n"
    "- model: b\n  parameters: {weight: 1}",
    "a loop as filter": "merge_method: linear\nmodels:\n- model: a\n  parameters:\n"
    "    weight: [{filter: &x [*x], value: 1}]\n- model: b\n  parameters: {weight: 1}",
    "a weight beyond float64": "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: "
    + "9" * 400
    + "}\n- model: b\n  parameters: {weight: 1}",
    "not text": "merge_method: \udcff",
    "tags": "merge_method: !!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("case", YAML)
def test_configurations_that_are_none(case: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "merge.yml"
    path.write_bytes(YAML[case].encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=str(path)) as caught:
        fasttax.merge.read_mergekit(path)
    assert len(str(caught.value)) < 5000


def test_spoiled_configurations(tmp_path: Path, soak: bool) -> None:
    """Read, or refused with the file's name."""
    pytest.importorskip("yaml")
    path, draw = tmp_path / "merge.yml", random.Random(2)
    fasttax.merge.write_mergekit(path, "base", "aligned", {"*.mlp.*": 0.5, "*": 0.25})
    raw = path.read_bytes()
    for turn in range(20_000 if soak else 300):
        spoiled = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(spoiled))
            spoiled[at : at + draw.randint(0, 6)] = draw.choice(
                [b"", b"\n", b": ", b"- ", b"*", b"&a ", b"[", b"{", b"'", b"1e999", b"\x80"]
            )
        path.write_bytes(spoiled)
        _, text = outcome(lambda: fasttax.merge.read_mergekit(path))
        assert not text or str(path) in text, (turn, bytes(spoiled))
