"""The demo in tiny mode from end to end, its data, and the words it finds for its numbers."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from fasttax import cli, demo
from fasttax.demo import settings, texts
from fasttax.demo.codecs import ByteCodec
from fasttax.demo.methods import METHODS, SHARES
from fasttax.tax import TaxReport

ROWS = texts.read_alignment(settings.ALIGNMENT)
METRICS = (
    "answer_nll",
    "perplexity",
    "general_nll",
    "last_word",
    "kl_general",
    "kl_answers",
    "fisher_distance",
)
SMALL = ("--test-answers", "12", "--test-passages", "12", "--replay-batch", "2")
STRENGTHS = ("kl=0.3,3", "ewc=3,30", "kron=0.3,3", "lm=3", "replay_kl=3", "kl_ewc=1+3", "kl_lm=1+1")
GRIDS = [word for strength in STRENGTHS for word in ("--strengths", strength)]
SEEDS = 2


def command(output: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-u",
        "-m",
        "fasttax",
        "demo",
        "--tiny",
        "--output",
        str(output),
        *options,
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose cache is empty at first and shared by this module's runs."""
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def finished(cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    copy = output.parents[1] / "copy.json"
    options = ["--steps", "8", "--seeds", str(SEEDS), *SMALL, *GRIDS, "--json", str(copy)]
    done = subprocess.run(
        command(output, *options), env=cache, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert copy.read_text() == (output / "results.json").read_text()
    return done.stdout, output


def finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


# --- from end to end ---


def test_last_line_is_the_report(finished: tuple[str, Path]) -> None:
    stdout, output = finished
    page = Path(stdout.rstrip("\n").splitlines()[-1])
    assert page.is_file()
    assert page.samefile(output / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "Tax at equal alignment" in text
    assert "Partial" not in text
    # self-contained: nothing is loaded from elsewhere
    assert "http" not in text.split("<dl>")[0].split("base64")[0]
    assert (output / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    names = ["pareto.png", "report.html", "results.json", "table.md", "tax.json"]
    assert sorted(p.name for p in output.iterdir()) == names


def test_results(finished: tuple[str, Path]) -> None:
    # Infinity and NaN are no JSON
    results = json.loads((finished[1] / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["status"] == "complete"
    points = results["points"]
    grids = results["settings"]["grids"]
    assert list(grids) == list(METHODS)
    for seed in range(SEEDS):
        mine = [row for row in points if row["seed"] == seed]
        counts = collections.Counter(row["method"] for row in mine)
        assert counts == {"plain": 1} | {name: len(grid) for name, grid in grids.items()}
        # one seed, one order of batches, one start
        trained = [row for row in mine if row["curve"]]
        assert len({row["curve"]["loss"][0] for row in trained}) == 1
    starts = {row["curve"]["loss"][0] for row in points if row["method"] == "plain"}
    assert len(starts) == SEEDS  # seeds have orders of their own
    base = results["base"]["metrics"]
    for row in points:
        assert set(METRICS) <= set(row["metrics"])
        assert all(finite(value["mean"]) for value in row["metrics"].values())
        tax = row["metrics"]["general_nll"]["mean"] - base["general_nll"]["mean"]
        assert row["tax"] == pytest.approx(tax) == pytest.approx(sum(row["changes"]) / 12, abs=1e-5)
        assert finite(row["share"])
        trains = row["method"] not in ("stop", "merge")
        assert {len(c) for c in row["curve"].values()} == ({8} if trains else set())
        assert (row["train_seconds"] > 0) == trains
    assert base["kl_general"]["mean"] == base["fisher_distance"]["mean"] == 0
    plain = [row for row in points if row["method"] == "plain"]
    assert all(row["share"] == 1 and "preference" in row["metrics"] for row in plain)
    assert all(finite(v) for v in results["timing"]["percent_of_plain_step"].values())
    # the composition computes the same two numbers
    assert max(results["timing"]["relative_difference"].values()) < 1e-3
    for row in points:  # what holds the model is in its curve
        held = {k for k in ("kl", "replay", "penalty") if any(row["curve"].get(k, [])[1:])}
        parts = {"ewc": "penalty", "kron": "penalty", "lm": "replay", "replay_kl": "replay"}
        names = () if row["method"] == "plain" else METHODS[row["method"]].parts
        if row["method"] != "lr" and row["curve"]:
            assert held == {parts.get(name, name) for name in names}, row["label"]


def test_the_comparison_is_the_tax_reports(finished: tuple[str, Path]) -> None:
    results = json.loads((finished[1] / "results.json").read_text())
    report = TaxReport.load(finished[1] / "tax.json")
    assert results["comparison"]["over"] == f"{SEEDS} training seeds"
    for share in SHARES:
        theirs = report.tax_at(share)
        for method, row in results["comparison"]["methods"].items():
            found, at = row["tax"][f"{share:g}"], theirs[METHODS[method].title]
            assert found["mean"] == pytest.approx(at.tax, abs=1e-6)
            assert (found["low"], found["high"]) == pytest.approx((at.low, at.high), abs=1e-6)
            assert found["units"] == at.seeds == SEEDS
    table = (finished[1] / "table.md").read_text()
    assert all(f"| {method.title} |" in table for method in METHODS.values())
    assert f"standard error over {SEEDS} training seeds" in table
    assert finished[0].count("%") > 3


def test_rerun_reuses_fisher(
    finished: tuple[str, Path], cache: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        command(
            tmp_path, "--steps", "3", "--seeds", "1", "--methods", "kron", *SMALL, "--json", "-"
        ),
        env=cache,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("reused from") == 2
    again = json.loads(done.stdout)
    assert again == json.loads((tmp_path / "results.json").read_text())
    assert all(fisher["reused"] for fisher in again["fishers"].values())
    assert "the held-out passages of one training seed" in again["comparison"]["over"]
    first = json.loads((finished[1] / "results.json").read_text())
    assert not any(fisher["reused"] for fisher in first["fishers"].values())


def test_ctrl_c_keeps_finished_runs(
    finished: tuple[str, Path], cache: dict[str, str], tmp_path: Path
) -> None:
    def heed() -> None:  # a shell's background jobs, which this run may be one of, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command(tmp_path, "--steps", "40", "--methods", "merge,kl,ewc", *SMALL),
        env=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    assert process.stdout is not None
    # mid-training: plain is done, KL begins
    seen = list(itertools.takewhile(lambda line: "KL on the answers" not in line, process.stdout))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, rest, errors[-2000:])
    assert "Traceback" not in errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert [row["method"] for row in results["points"]].count("plain") == 1
    methods = {row["method"] for row in results["points"]}
    assert "ewc" in methods
    assert "kl" not in methods
    page = Path(rest.rstrip("\n").splitlines()[-1])
    assert "Partial" in page.read_text(encoding="utf-8")


# --- errors ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/no/such/folder"], ["/no/such/folder", "Hub id", "--tiny"]),
        (["--tiny", "--output", "/proc/nowhere"], ["/proc/nowhere", "output folder"]),
        (["--tiny", "--alignment", "/no/such.jsonl"], ["/no/such.jsonl", "prompt, good, bad"]),
    ],
)
def test_user_errors(
    options: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = [] if "--output" in options else ["--output", str(tmp_path)]
    assert demo.main([*options, *output]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize("file", ["model.safetensors", "fisher"])
def test_a_damaged_cache_is_named(
    file: str,
    finished: tuple[str, Path],
    cache: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path / "cache"
    shutil.copytree(Path(cache["XDG_CACHE_HOME"]), kept)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    pattern = "tiny-*/model.safetensors" if file.startswith("model") else "fisher-diagonal-*"
    (path,) = (kept / "fasttax").glob(pattern)
    path.write_bytes(path.read_bytes()[:1000])
    assert demo.main(["--tiny", "--output", str(tmp_path / "out"), "--methods", "kl"]) == 2
    said = capsys.readouterr().err
    assert str(path if file == "fisher" else path.parent) in said
    assert "add --no-cache" in said


def test_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find(name, *rest),
    )
    assert demo.main(["--tiny", "--output", str(tmp_path)]) == 2
    assert "pip install 'fasttax[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--strengths", "kl"],
        ["--strengths", "kl=a"],
        ["--strengths", "kl=1+2"],
        ["--strengths", "kl_lm=1"],
        ["--strengths", "merge=1.5"],
        ["--strengths", "kl=1,2,1"],
        ["--strengths", "kl_lm=1+2,1.0000001+2"],
        ["--strengths", "kl=1", "--strengths", "kl=2"],
        ["--methods", "lm,ewc", "--strengths", "kl=1"],
        ["--methods", "kl,ppo"],
        ["--replay-batch", "99"],
        ["--lr", "2"],
        ["--tiny", "--model", "x"],
        ["--length", "8"],
    ],
)
def test_bad_options(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cuda:99"]) == 2
    assert "demo: --device: expected one of 'auto', 'cpu'" in capsys.readouterr().err
    assert settings.parse(["--device", "cpu"]).device == "cpu"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"id": 1}', "expected a JSON object"),
        (json.dumps({**ROWS["train"][0], "split": "dev"}), "train, validation, test"),
    ],
)
def test_bad_alignment_file(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    with pytest.raises(settings.DemoError, match=words):
        texts.read_alignment(path)


# --- data ---


def test_alignment_set() -> None:
    rows = list(itertools.chain(*ROWS.values()))
    assert len(rows) >= 120
    assert len({row["id"] for row in rows}) == len(rows)
    kinds = collections.Counter((row["kind"], row["split"]) for row in rows)
    assert len({kind for kind, _ in kinds}) >= 4
    # every kind has the same number of rows in each split
    assert len(set(kinds.values())) == len(texts.SPLITS)
    for row in rows:
        assert row["good"] != row["bad"]
        assert all(
            row[f] == row[f].strip() and "\n\n" not in row[f] for f in ("prompt", "good", "bad")
        )
    answers = [row[f] for row in rows for f in ("good", "bad")]
    assert len(set(answers)) == len(answers)


def test_general_parts_do_not_overlap() -> None:
    parts = texts.general_text()
    assert all(sum(map(len, parts[part].values())) > 20_000 for part in texts.PARTS)
    topics = [set(parts[part]) for part in texts.PARTS]
    long = [
        {
            texts.normal(p)
            for text in parts[part].values()
            for p in texts.paragraphs(text)
            if len(texts.normal(p)) >= texts.SHARED
        }
        for part in texts.PARTS
    ]
    for a, b in itertools.combinations(range(3), 2):
        assert not topics[a] & topics[b]
        assert not long[a] & long[b]


def test_passages_and_their_words() -> None:
    codec, texts_by_topic = ByteCodec(), texts.general_text()["test"]
    items = texts.passages(texts_by_topic, codec, 96, 20, seed=3)
    assert items == texts.passages(texts_by_topic, codec, 96, 20, seed=3)
    assert len({item.ids for item in items}) == 20
    for item in items:
        assert len(item.ids) == 96
        for a, b in item.words:
            assert a >= 32
            assert texts.WORD.fullmatch(bytes(item.ids[a:b]).decode().strip())


def test_pairs_score_answers_only() -> None:
    codec = ByteCodec()
    (pair,), cut = texts.pairs(
        [{"kind": "k", "prompt": "Hi?", "good": "Yes.", "bad": "No " * 40}], codec, 40
    )
    assert cut == 1
    assert bytes(pair.good.ids[pair.good.start : -1]) == b"Yes."
    assert pair.good.ids[-1] == codec.end_id
    assert len(pair.bad.ids) == 40
    batch = texts.collate([pair.good, pair.bad], codec.pad_id, torch.device("cpu"))
    assert batch["scored"].sum(1).tolist() == [5, 36]
    assert batch["attention_mask"].sum(1).tolist() == [9, 40]
