"""fasttax doctor: what is active here and why, in words and as JSON."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttax
from fasttax import cli
from fasttax._base import library
from fasttax.cli import doctor
from fasttax.cli.commands import COMMANDS


@pytest.fixture(autouse=True)
def _no_trl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying TRL's ops takes seconds, which one test is for."""
    if "with_trl" not in request.fixturenames:
        monkeypatch.setattr(doctor, "TRL_TARGETS", "fasttax")
        monkeypatch.setattr(doctor, "patchable", list)


def test_doctor_says_why_a_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "The NVIDIA driver on your system is too old (found version 11040)."

    def init() -> None:
        raise RuntimeError(f"{old} Please update\nand more")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"GPU: none ({old}" in out
    assert "install a driver for CUDA 13.0" in out


def test_doctor_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from fasttax._base import library

    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{op} " in printed for op in library.OPS)


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fasttax"] == fasttax.__version__
    assert {row["op"] for row in facts["ops"]} == set(library.OPS)
    assert set(doctor.PEERS) == set(facts["peers"])
    assert cli.main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    assert capsys.readouterr().out.startswith("fasttax ")
    assert json.loads((tmp_path / "d.json").read_text())["ops"] == facts["ops"]
    assert cli.main(["doctor", "--json", str(tmp_path / "none" / "d.json")]) == 2
    assert "create it first" in capsys.readouterr().err


def within(call: Callable[[], Any]) -> dict[str, set[str]]:
    """The fasttax ops that a call comes to, each with those within it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    calls: dict[str, set[str]] = {}
    for event in profile.events() or ():
        name = event.name.removeprefix("fasttax::")
        if name not in library.OPS:
            continue
        calls.setdefault(name, set())
        parent = event.cpu_parent
        while parent is not None:
            calls.setdefault(parent.name.removeprefix("fasttax::"), set()).add(name)
            parent = parent.cpu_parent
    return calls


def composed() -> list[Callable[[], Any]]:
    """Calls that come to every composed op, in each of the ways that it takes."""
    h, w, ref_h, ref_w = (torch.randn(n, 8) for n in (4, 11, 4, 11))
    h.requires_grad_()
    ref_h.requires_grad_()
    ids = torch.arange(4)

    def kl(**options: Any) -> Any:
        return fasttax.linear_token_kl(h, w, ref_h, ref_w, **options).sum().backward()

    def stats() -> None:
        made = fasttax.linear_token_logprobs(h, w, ids, outputs=("logp", "entropy"))
        (made.logp + made.entropy).sum().backward()

    return [
        kl,
        lambda: kl(reduction="mean"),
        lambda: kl(reduction="sum", vocab_chunk=5),
        lambda: kl(vocab_chunk=5),
        stats,
        lambda: fasttax.functional.lm_head_fisher(h.detach(), w),
    ]


def test_composed_ops_say_what_they_call() -> None:
    """What the report says of them against what the profiler sees."""
    seen: dict[str, set[str]] = {}
    for call in composed():
        for name, called in within(call).items():
            if name in library.OPS:
                seen.setdefault(name, set()).update(called)
    whole = set(library.COMPOSED) - {"linear_token_total"}  # which is in torch.compile's graphs
    assert {name for name, called in seen.items() if called} == whole
    for name, says in library.COMPOSED.items():
        assert seen.get(name, set()) <= set(says), name
        backend, why = library.active(name, "cpu")
        assert backend == "composed"
        assert all(f"{op} ({library.active(op, 'cpu')[0]})" in why for op in says)


def test_no_row_reads_like_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert " yet" not in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_what_patch_would_do(with_trl: None, capsys: pytest.CaptureFixture[str]) -> None:
    from fasttax.integrations.trl import patch

    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    with patch(quiet=True) as handle:
        fits = re.findall(r"^  (\S+) \(.*\): fits$", printed, flags=re.MULTILINE)
        assert sorted(fits) == sorted(handle.patched)
        left = re.findall(r"^  (\S+) \(.*\): left alone: (.+)$", printed, flags=re.MULTILINE)
        assert dict(left) == handle.skipped


@pytest.fixture
def with_trl() -> None:
    """The installed TRL is tried."""


def test_a_trl_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "raise ImportError(\"cannot import name 'x' from 'transformers'\\nand more\")\n"
    (tmp_path / "broken_targets.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "TRL_TARGETS", "broken_targets")
    monkeypatch.setattr(doctor, "version_of", lambda _: "1.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    assert cli.main(["doctor"]) == 0
    said = "trl does not import (ImportError: cannot import name 'x' from 'transformers')"
    assert f"fasttax.integrations.trl.patch: {said}\n" in capsys.readouterr().out


def test_an_error_of_fasttaxs_own_is_not_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> list[Any]:
        raise AttributeError("fasttax's own")

    monkeypatch.setattr(doctor, "patchable", wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    with pytest.raises(AttributeError, match="fasttax's own"):
        doctor.patch_of_trl()


def test_completion_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(name in script for name in COMMANDS)


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for words, completed in (
        ("he", "help"),
        ("kl ca", "cache"),
        ("kl cache --te", "--temperature"),
    ):
        command = (
            f"source ./script; COMP_WORDS=(fasttax {words}); COMP_CWORD={len(words.split())}; "
            "_shtab_fasttax; echo ${COMPREPLY[@]}"
        )
        run = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == completed


def test_completion_without_shtab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "run `pip install 'fasttax[completion]'`" in capsys.readouterr().err
