"""No class of transformers gets a wrong number without a word, nor an error that is no refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sweep import children
from tests.sweep.result import Case, Row
from tests.sweep.table import markdown

ROOT = Path(__file__).parents[2]
LEAST = 150  # classes that are built and compared, of the 700 that transformers 5.24 lists
# One of each kind: plain, grouped and tied heads, scaled and capped logits, experts, a refusal of
# each sort, images, sound, images in text, labels of rows, tokens and masked tokens
SAMPLE = (
    "ASTForAudioClassification",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "Idefics3ForConditionalGeneration",
    "LayoutLMv3ForSequenceClassification",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "ViTForImageClassification",
    "XLNetLMHeadModel",
)


def swept(folder: Path, *options: str) -> list[Row]:
    """The rows of a sweep in a process of its own, which forks one for each class."""
    path = folder / "rows.jsonl"
    command = [sys.executable, "-m", "tests.sweep", "--rows", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert path.is_file(), done.stderr[-2000:]
    return [Row.from_json(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    found = swept(tmp_path_factory.mktemp("sample"), "--only", *SAMPLE)
    return {row.name: row for row in found}


@pytest.mark.parametrize("name", SAMPLE)
def test_class(sample: dict[str, Row], name: str) -> None:
    row = sample[name]
    assert not row.unbuilt
    assert {"update", "observe"} <= set(row.outcomes)
    assert not row.faults


def test_the_page_says_what_came(sample: dict[str, Row]) -> None:
    page = markdown(list(sample.values()), "python -m tests.sweep", 700)
    for name in SAMPLE:
        assert f"| {name} |" in page
    assert f"{len(SAMPLE)} classes built, of {len(SAMPLE)} tried and 700" in page
    refused = [row for row in sample.values() if row.outcomes["update"].kind == "refused"]
    assert refused
    assert all(f"{row.name} (update)" in page for row in refused)


def _ends(case: Case) -> Row:
    if case.name == "Hangs":
        time.sleep(60)
    os._exit(3)


def test_a_class_that_hangs_or_dies_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "WALL_LIMIT", 2.0)
    cases = [Case("Hangs", "causal"), Case("Dies", "causal")]
    faults = {row.name: row.faults for row in children.sweep(_ends, cases, jobs=2)}
    assert faults["Dies"] == ["Dies: update: CRASH: the process died with exit code 3"]
    assert faults["Hangs"] == ["Hangs: update: CRASH: no end after 2 s"]


@pytest.mark.slow
def test_every_class(tmp_path: Path) -> None:
    rows = swept(tmp_path, "--jobs", "2")
    assert sum(not row.unbuilt for row in rows) >= LEAST
    assert [fault for row in rows for fault in row.faults] == []
