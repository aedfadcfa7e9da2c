"""The demo in tiny mode from end to end, its data, and the words it finds for its numbers."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import math
import os
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

from fasttax import demo
from fasttax.demo import measure, settings, texts, verdicts
from fasttax.demo.codecs import ByteCodec

ROWS = texts.read_alignment(settings.ALIGNMENT)
METRICS = (
    "answer_nll",
    "preference",
    "perplexity",
    "general_nll",
    "last_word",
    "kl_general",
    "kl_answers",
    "fisher_distance",
)
QUICK = ("--steps", "6", "--kl-strengths", "1", "--ewc-strengths", "10")


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
    done = subprocess.run(command(output), env=cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert "How the strengths were chosen" in text
    assert "Partial" not in text
    # self-contained: nothing is loaded from elsewhere
    assert "http" not in text.split("<dl>")[0].split("base64")[0]
    assert (output / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in output.iterdir()) == ["pareto.png", "report.html", "results.json"]


def test_results(finished: tuple[str, Path]) -> None:
    results = json.loads((finished[1] / "results.json").read_text())
    assert results["status"] == "complete"
    assert list(results["runs"]) == ["plain", "kl", "ewc", "both"]
    for name, row in {"base": results["base"], **results["runs"]}.items():
        assert set(row["metrics"]) == set(METRICS)
        for metric, value in row["metrics"].items():
            assert finite(value["mean"]), (name, metric)
            assert metric == "fisher_distance" or finite(value["se"]), (name, metric)
        assert len(row["curve"]) == (0 if name == "base" else results["settings"]["steps"])
        assert all(finite(v) for step in row["curve"] for v in step.values())
    base, plain = results["base"]["metrics"], results["runs"]["plain"]["metrics"]
    assert (
        base["kl_general"]["mean"]
        == base["kl_answers"]["mean"]
        == base["fisher_distance"]["mean"]
        == 0
    )
    assert plain["answer_nll"]["mean"] < base["answer_nll"]["mean"]
    assert plain["kl_general"]["mean"] > 0
    first = {results["runs"][name]["curve"][0]["loss"] for name in results["runs"]}
    assert len(first) == 1  # one seed, one order of batches, one start
    assert sum(c["chosen"] for c in results["candidates"]) == 2
    for family, run in (("kl", "kl"), ("ewc", "ewc"), ("kl", "both"), ("ewc", "both")):
        chosen = next(c for c in results["candidates"] if c["family"] == family and c["chosen"])
        assert results["runs"][run][f"{family}_strength"] == chosen["strength"]
    assert all(finite(v) for v in results["timing"]["percent_of_plain_step"].values())
    # the composition computes the same two numbers
    assert max(results["timing"]["relative_difference"].values()) < 1e-3
    assert len(results["verdicts"]) == 5


def test_rerun_reuses_fisher(
    finished: tuple[str, Path], cache: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        command(tmp_path, *QUICK), env=cache, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reused from" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["fisher"]["reused"]
    assert not json.loads((finished[1] / "results.json").read_text())["fisher"]["reused"]


def test_ctrl_c_keeps_finished_runs(
    finished: tuple[str, Path], cache: dict[str, str], tmp_path: Path
) -> None:
    def heed() -> None:  # a shell's background jobs, which this run may be one of, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command(tmp_path, "--steps", "40"),
        env=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    assert process.stdout is not None
    # mid-training: plain is done, KL begins
    seen = list(itertools.takewhile(lambda line: "candidate KL" not in line, process.stdout))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, rest, errors[-2000:])
    assert "Traceback" not in errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert list(results["runs"]) == ["plain"]
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
        ["--kl-strengths", "a"],
        ["--lr", "2"],
        ["--tiny", "--model", "x"],
        ["--length", "8"],
    ],
)
def test_bad_options(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2


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


# --- words from numbers ---


def vectors(**shift: float) -> measure.Vectors:
    noise = torch.linspace(-1, 1, 40, dtype=torch.float64)
    return {name: noise + shift.get(name, 0.0) + 0.05 * noise.roll(7) for name in measure.METRICS}


def test_difference_counts_beyond_two_errors() -> None:
    wobble = {name: v + 0.1 * v.roll(3) for name, v in vectors().items()}
    assert all(d["verdict"] == "same" for d in measure.difference(wobble, vectors()).values())
    d = measure.difference(vectors(general_nll=0.5, preference=0.5, kl_answers=0.5), vectors())
    assert [d[m]["verdict"] for m in ("general_nll", "preference", "kl_answers", "answer_nll")] == [
        "worse",
        "better",
        "different",
        "same",
    ]


def candidate(answer: float, general: float) -> dict[str, Any]:
    return {"validation": {"answer_nll": {"mean": answer}, "general_nll": {"mean": general}}}


def test_choice_of_strength() -> None:
    base, plain = {"answer_nll": 3.0}, {"answer_nll": 1.0}
    assert (
        verdicts.choose(
            [candidate(1.1, 2.9), candidate(1.4, 2.5), candidate(2.0, 2.0)], base, plain, 0.75
        )[0]
        == 1
    )
    index, reason = verdicts.choose([candidate(2.9, 2.0), candidate(2.2, 2.5)], base, plain, 0.75)
    assert index == 1
    assert "none reached" in reason


@pytest.mark.parametrize(
    ("tax", "regularised", "words"),
    [
        (0.5, 0.1, ["paid an alignment tax", "kept more capability", "80% of the tax"]),
        (0.5, 0.8, ["paid an alignment tax", "did not help"]),
        (0.5, 0.5, ["did not measurably help"]),
        (0.0, 0.0, ["No tax beyond noise", "did not measurably help"]),
        (-0.3, -0.3, ["no tax on general text"]),
    ],
)
def test_verdicts_follow_the_numbers(tax: float, regularised: float, words: list[str]) -> None:
    found = {
        "base": vectors(),
        "plain": vectors(answer_nll=-1, general_nll=tax),
        "kl": vectors(answer_nll=-0.9, general_nll=regularised),
    }
    rows = {name: {"label": name, "metrics": measure.summary(v)} for name, v in found.items()}
    rows["plain"]["against_base"] = measure.difference(found["plain"], found["base"])
    rows["kl"]["against_plain"] = measure.difference(found["kl"], found["plain"])
    text = " ".join(verdicts.sentences({"base": rows.pop("base"), "runs": rows}))
    assert all(word in text for word in words), text
