"""Commands that compute a model: kl measure, kl cache, fisher; what is wrong is said early."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import cli
from fasttax.cli import _language_model
from fasttax.integrations.reference import TopKReference
from fasttax.tax import kl_both_ways
from tests.tools import tiny_lm

TEXT = "water boils at a hundred degrees\n" * 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny_lm.save(folder / f"m{seed}", seed)
    (folder / "text.txt").write_text(TEXT)
    rows = [
        {"domain": d, "text": t}
        for d, t in (("law", "to be just"), ("law", "a"), ("art", "blue sky"))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def words(models: Path, tmp_path: Path, *more: str) -> list[str]:
    made = ["kl", "measure", str(models / "m0"), str(models / "m1"), str(models / "text.txt")]
    return [*made, "--length", "16", *more]


def test_measure_is_the_librarys_kl(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, numbers = tmp_path / "kl.html", tmp_path / "kl.json"
    line = words(models, tmp_path, "--html", str(page))
    line.insert(5, str(models / "rows.jsonl"))
    assert cli.main([*line, "--json", str(numbers), "--batch-size", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(page) in printed
    found = json.loads(numbers.read_text())
    domains = {d["name"]: d for d in found["domains"]}
    assert list(domains) == ["art", "law", "text", "all"]
    tokenizer: Any = tiny_lm.tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    rows = [torch.tensor([ids[i : i + 16]]) for i in range(0, len(ids), 16)]
    exact = kl_both_ways(tiny_lm.model(0), tiny_lm.model(1), [r for r in rows if r.shape[1] > 1])
    got = domains["text"]
    assert got["tokens"] == exact.tokens
    assert (got["policy_ref"], got["ref_policy"]) == pytest.approx(
        (exact.policy_ref, exact.ref_policy), rel=1e-4
    )
    assert domains["all"]["tokens"] == sum(domains[d]["tokens"] for d in ("art", "law", "text"))
    assert domains["art"]["policy_ref_se"] is None  # one sequence
    assert got["policy_ref_se"] > 0
    assert domains["law"]["sequences"] == 1  # "a" is one token, of which nothing is predicted
    worst = [float(row["KL(policy||ref)"]) for row in found["worst"]]
    assert len(worst) == 20
    assert max(worst) >= 0.9 * worst[0] > 0
    html = page.read_text()
    assert "background:rgba" in html
    assert "http" not in html
    assert "policy||ref" in html


def test_rows_are_as_long_as_the_model_by_default(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model has 256 positions, of which the text would take 330."""
    m0, text, out = str(models / "m0"), str(models / "text.txt"), tmp_path / "kl.json"
    assert cli.main(["kl", "measure", m0, m0, text, "--json", str(out)]) == 0
    (domain,) = json.loads(out.read_text())["domains"]
    assert (domain["sequences"], domain["tokens"]) == (2, 255 + 73)
    cached = str(tmp_path / "c.safetensors")
    assert cli.main(["kl", "cache", m0, text, "-o", cached]) == 0
    assert len(TopKReference.load(cached)) == 2


def test_a_model_has_no_kl_to_itself(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m0 = str(models / "m0")
    assert cli.main(["kl", "measure", m0, m0, str(models / "rows.jsonl"), "--dtype", "auto"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[:1] == ["all"])[3:6:2] == ["0", "0"]


def broken(models: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """What is wrong, the command, and what it says."""
    other, damaged, lacking = (tmp_path / n for n in ("other", "damaged", "lacking"))
    tiny_lm.model(0).save_pretrained(other)
    backend = json.loads((models / "m0" / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (other / name).write_text((models / "m0" / name).read_text())
    (other / "tokenizer.json").write_text(json.dumps(backend))
    tiny_lm.save(damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tiny_lm.save(lacking)
    from safetensors.torch import load_file, save_file

    state = load_file(lacking / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "far.jsonl").write_text('{"input_ids": [4, 5, 260]}\n')
    (tmp_path / "ids.jsonl").write_text('{"input_ids": ["a"]}\n')
    m0, m1, text = str(models / "m0"), str(models / "m1"), str(models / "text.txt")

    def measure(policy: str = m0, ref: str = m1, file: str = text, *more: str) -> list[str]:
        return ["kl", "measure", policy, ref, file, *more]

    def fisher(model: str = m0, file: str = text, *more: str) -> list[str]:
        return ["fisher", model, file, "--length", "8", "--output", str(tmp_path / "f"), *more]

    def cache(model: str = m0, file: str = text, *more: str) -> list[str]:
        return ["kl", "cache", model, file, "--output", str(tmp_path / "c"), *more]

    none = str(tmp_path / "none" / "x")
    return {
        "no text": (measure(file=none), "No such file"),
        "no model": (measure(policy=none), "folder or Hub id"),
        "folder of no model": (measure(ref=str(tmp_path / "empty")), "without config.json"),
        "another tokenizer": (measure(ref=str(other)), "2 tokens with other ids"),
        "damaged weights": (measure(ref=str(damaged)), "does not load"),
        "weights that lack": (measure(ref=str(lacking)), "layers.1.mlp.up_proj.weight"),
        "not UTF-8": (measure(file=str(tmp_path / "latin.txt")), "expected UTF-8"),
        "row of another kind": (
            measure(file=str(tmp_path / "bad.jsonl")),
            "row 2: expected a JSON object",
        ),
        "ids of another kind": (measure(file=str(tmp_path / "ids.jsonl")), "list of integers"),
        "ids beyond": (measure(file=str(tmp_path / "far.jsonl")), "below 260"),
        "too long": (measure(m0, m1, text, "--length", "300"), "pass --length 256"),
        "fisher: too long": (fisher(m0, text, "--length", "300"), "pass --length 256"),
        "cache: too long": (cache(m0, text, "--length", "300"), "pass --length 256"),
        "page without a folder": (measure(m0, m1, text, "--html", none), "create it first"),
        "page where nothing is written": (
            measure(m0, m1, text, "--html", "/proc/x"),
            "cannot write",
        ),
        "fisher: read-only": (["fisher", m0, text, "--output", "/proc/x"], "cannot write /proc/x"),
        "cache: read-only": (
            ["kl", "cache", m0, text, "--output", "/proc/x"],
            "cannot write /proc",
        ),
        "page that is a folder": (measure(m0, m1, text, "--html", str(tmp_path)), "a file's name"),
        "device": (measure(m0, m1, text, "--device", "cuda:99"), "one of 'auto', 'cpu'"),
        "size": (measure(m0, m1, text, "--batch-size", "0"), "at least 1"),
        "length": (measure(m0, m1, text, "--length", "0"), "at least 2"),
        "cache: length": (cache(m0, text, "--length", "1"), "at least 2"),
        "fisher: output": (["fisher", m0, text, "--output", none], "create it first"),
        "fisher: text": (fisher(m0, none), "No such file"),
        "fisher: device": (fisher(m0, text, "--device", "gpu"), "--device"),
        "fisher: weights": (fisher(str(lacking)), "random numbers"),
        "fisher: json": (fisher(m0, text, "--json", none), "create it first"),
        "cache: data": (cache(m0, none), "No such file"),
        "cache: output": (["kl", "cache", m0, text, "--output", none], "create it first"),
        "cache: weights": (cache(str(damaged)), "does not load"),
        "cache: temperature": (cache(m0, text, "--temperature", "0"), "--temperature"),
    }


def test_what_is_wrong_is_one_line_and_leaves_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = broken(models, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for case, (line, says) in cases.items():
        assert cli.main(line) == 2, case
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1]
        assert says in last, (case, said)
        assert last.count("fasttax") == 1, (case, last)  # no doubled prefix
        assert "Traceback" not in said
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_nothing_is_loaded_before_the_rest_is_right(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(time, "sleep", loaded)  # as the Hub's clients do between two tries

    monkeypatch.setattr(_language_model, "load", loaded)
    early = [case for case in broken(models, tmp_path).items() if "weights" not in case[0]]
    assert len(early) > 25
    for case, (line, _) in early:
        assert cli.main(line) == 2, case


def test_the_hub_is_asked_once(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    m0, text = str(models / "m0"), str(models / "text.txt")
    asked: list[tuple[str, float]] = []
    of_client: Any = HfHubHTTPError.__bases__[0]
    for error in (ConnectionError("no route"), of_client("not known")):

        def ask(_: Any, name: str, timeout: float, error: Exception = error) -> None:
            asked.append((name, timeout))
            raise error

        for kind in ("model_info", "dataset_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, kind, ask)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for line, word in (
            (["fisher", "nobody/nothing", text], "model"),
            (["kl", "cache", m0, "nobody/nothing"], "data"),
            (["kl", "measure", m0, "nobody/nothing", text], "ref"),
            (["plan", "nobody/nothing"], "model"),
        ):
            assert cli.main(line) == 2
            said = capsys.readouterr().err
            assert f": {word}: expected " in said
            assert f"'nobody/nothing': no file or folder here, and of the Hub: {error}" in said
    assert asked == [("nobody/nothing", 5.0)] * 8


def test_json_of_fisher_and_cache(models: Path, tmp_path: Path) -> None:
    m0, text = str(models / "m0"), str(models / "text.txt")
    out = str(tmp_path / "f.safetensors")
    options = ["--length", "8", "--examples", "4", "--output", out, "--dtype", "bfloat16"]
    assert cli.main(["fisher", m0, text, *options, "--json", str(tmp_path / "f.json")]) == 0
    said = json.loads((tmp_path / "f.json").read_text())
    assert said["output"] == out
    assert said["examples"] == 4
    assert fasttax.FisherEstimate.load(out).metadata["examples"] == 4
    cached = str(tmp_path / "c.safetensors")
    line = ["kl", "cache", m0, text, "--length", "16", "--k", "4", "--output", cached]
    assert cli.main([*line, "--json", str(tmp_path / "c.json"), "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["k"] == TopKReference.load(cached).k == 4


def test_fisher_by_factors(models: Path, tmp_path: Path) -> None:
    m0, text, out = str(models / "m0"), str(models / "text.txt"), str(tmp_path / "k.safetensors")
    line = ["fisher", m0, text, "--length", "8", "--examples", "2", "--output", out]
    assert cli.main([*line, "--structure", "kron", "--max-dim", "24"]) == 0
    estimate = fasttax.KroneckerEstimate.load(out)
    assert estimate.metadata["max_dim"] == 24
    assert estimate.factors
    assert cli.main([*line, "--max-dim", "24"]) == 2


def test_sample_is_the_models_own_text(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    line = ["sample", str(models / "m0"), "--number", "5", "--length", "9", "--batch-size", "2"]
    state = torch.get_rng_state()
    assert cli.main([*line, "--output", str(out), "--json", str(tmp_path / "s.json")]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert len(rows) == json.loads((tmp_path / "s.json").read_text())["texts"] == 5
    assert all(2 <= len(row["input_ids"]) <= 10 for row in rows)
    assert len({tuple(row["input_ids"]) for row in rows}) > 1
    assert cli.main([*line, "--output", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    assert cli.main([*line, "--output", str(out), "--seed", "1"]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() != out.read_bytes()
    # what kl cache and kl measure read
    cached = str(tmp_path / "c.safetensors")
    assert cli.main(["kl", "cache", str(models / "m0"), str(out), "--output", cached]) == 0
    for wrong, says in (
        (["--number", "0"], "--number"),
        (["--temperature", "0"], "--temperature"),
        (["--output", str(tmp_path / "none" / "s.jsonl")], "create it first"),
        (["--length", "100000"], "--length"),
    ):
        capsys.readouterr()
        assert cli.main([*line, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_sample_takes_the_distribution_alone(models: Path, tmp_path: Path) -> None:
    """Of a generation_config, which chat models have, no penalty: only what ends a text."""
    shutil.copytree(models / "m0", tmp_path / "m0")
    ends = {"eos_token_id": 1, "pad_token_id": 0}
    chats = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [9, 10, 11]}
    texts = []
    for config in (ends, {**ends, **chats}):
        (tmp_path / "m0" / "generation_config.json").write_text(json.dumps(config))
        line = ["sample", str(tmp_path / "m0"), "--number", "4", "--length", "40", "--output"]
        assert cli.main([*line, str(tmp_path / "s.jsonl")]) == 0
        texts.append((tmp_path / "s.jsonl").read_text())
    assert texts[0] == texts[1]


def test_two_files_of_one_name_are_two_domains(models: Path, tmp_path: Path) -> None:
    paths = [tmp_path / folder / "x.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"of the folder {path.parent.name}")
    names = [str(path) for path in paths]
    line = ["kl", "measure", str(models / "m0"), str(models / "m1"), *names]
    assert cli.main([*line, "--json", str(tmp_path / "kl.json")]) == 0
    found = json.loads((tmp_path / "kl.json").read_text())["domains"]
    assert [domain["name"] for domain in found] == [*names, "all"]


def test_ctrl_c_leaves_the_old_file(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "kl.html"
    page.write_text("old")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop)
    assert cli.main(words(models, tmp_path, "--html", str(page))) == 130
    assert "no file was left half written" in capsys.readouterr().err
    assert page.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kl.html"]


def test_out_of_memory_says_what_is_smaller(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(_language_model, "load", full)
    assert cli.main(words(models, models)) == 2
    said = capsys.readouterr().err
    assert "--batch-size" in said
    assert "Tried" in said
    assert "more\n" not in said


def test_an_interrupted_cache_is_gone_on_with(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = (str(tmp_path / f"{name}.safetensors") for name in ("whole", "out"))
    line = ["kl", "cache", str(models / "m0"), str(models / "text.txt"), "--length", "16"]
    assert cli.main([*line, "--output", whole]) == 0
    load, made = _language_model.load, []

    def stopped(*args: Any) -> Any:
        model = load(*args)

        def count(*_: Any) -> None:
            made.append(1)
            if len(made) == 2:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(_language_model, "load", stopped)
    assert cli.main([*line, "--output", out]) == 130
    assert f"kept in {out}.partial; the same command goes on there" in capsys.readouterr().err
    assert cli.main([*line, "--output", out, "--k", "3"]) == 2
    said = capsys.readouterr().err
    assert "k 64, now 3" in said
    assert "or pass --restart" in said
    assert cli.main([*line, "--output", out]) == 0
    assert Path(out).read_bytes() == Path(whole).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors"]


def test_json_alone_on_stdout(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    m0, text = str(models / "m0"), str(models / "text.txt")
    short = ["--length", "8", "--output"]
    two = [str(models / name / "model.safetensors") for name in ("m0", "m1")]
    for line in (
        ["fisher", m0, text, "--examples", "2", *short, str(tmp_path / "f")],
        ["kl", "cache", m0, text, *short, str(tmp_path / "c")],
        ["kl", "measure", m0, m0, text, "--length", "8"],
        ["sample", m0, "--number", "2", *short, str(tmp_path / "s")],
        ["merge", "linear", *two, "--alpha", "0.5", "--output", str(tmp_path / "m.safetensors")],
        ["plan", m0],
        ["tax", "--published", "llama2-7b"],
    ):
        assert cli.main([*line, "--json", "-"]) == 0, line
        printed = capsys.readouterr()
        assert isinstance(json.loads(printed.out), dict), line
        assert printed.err


def command(models: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `fasttax` is the command."""
    line = line.replace("fasttax", f"{sys.executable} -m fasttax")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fasttax.__file__).parents[1])},
        cwd=models,
        check=False,
    )


@pytest.mark.parametrize(
    "line", ["fasttax kl measure m0 m1 text.txt | true", "fasttax help kl | true"]
)
def test_a_reader_that_leaves_is_no_error(line: str, models: Path) -> None:
    run = command(models, line)
    assert run.stderr == ""
    assert run.returncode in (0, 141)


def test_nothing_is_shown_where_stderr_is_a_file(models: Path, tmp_path: Path) -> None:
    run = command(models, f"fasttax kl cache m0 text.txt --output {tmp_path}/c")
    assert run.stderr == ""
    assert run.stdout == f"2 sequences, 330 tokens, k=64\n{tmp_path}/c\n"
