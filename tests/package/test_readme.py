"""README: its Python runs, and the names, commands and files that it speaks of are there.

The snippets of docs/trainers.md that train run, too.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINERS = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BLOCKS = PYTHON.findall(README)
TRAINING = [block for block in PYTHON.findall(TRAINERS) if "trainer.train()" in block]
SHELL = re.findall(r"^```(?:bash)?\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", README)
WORDS = "\n".join([*CODE, *SHELL])


def stand_ins(folder: Path) -> dict[str, Any]:
    """What the snippets take for granted, small; every snippet gets its own."""
    from transformers import AutoModelForCausalLM

    from tests.tools import tiny_lm, trl_runs

    # by name, from which trainers take the tokenizer
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.save(folder / "model"))
    base = tiny_lm.model(1)
    ids = tiny_lm.ids(4)
    batches = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(2)
    ]
    trainer = trl_runs.make("sft", folder, model=model)
    fisher = fasttax.estimate_fisher(model, batches, progress=False)

    def task_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        )

    def ref_logits(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = base(**batch).logits
        return logits

    return {
        "model": model,
        "base": base,
        "loader": batches,
        "general_text": batches,
        "task_loss": task_loss,
        "ref_logits": ref_logits,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "ewc": fasttax.EWC(model, fisher, strength=10.0),
        "args": trainer.args,
        "data": trainer.train_dataset,
        "trainer": trainer,
    }


def title(block: str) -> str:
    """The first line that is no import."""
    lines = [line for line in block.splitlines() if line and "import" not in line]
    return lines[0][:40]


def test_there_are_snippets() -> None:
    assert len(BLOCKS) >= 6
    assert TRAINING
    for block in BLOCKS + TRAINING:
        ast.parse(block)


@pytest.mark.parametrize("block", BLOCKS + TRAINING, ids=title)
def test_snippet_runs(block: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    names = stand_ins(tmp_path)
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(compile(block, "README.md", "exec"), names)
    moved = zip(before, names["model"].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_snippets_apply_ewc_once() -> None:
    ways = [len(re.findall(r"EWCCallback\(|ewc=ewc|ewc\.add_grad_", block)) for block in BLOCKS]
    assert max(ways) == 1


AXOLOTL = "fasttax.integrations.axolotl"


def test_names_of_the_package_exist() -> None:
    dotted = set(re.findall(r"\bfasttax(?:\.[A-Za-z_]+)+", WORDS))
    assert "fasttax.tax.kl_to_base" in dotted
    for name in dotted:
        if name.startswith(AXOLOTL) and importlib.util.find_spec("axolotl") is None:
            # its package pins another torch; tests/integrations/test_axolotl.py imports it
            source = (ROOT / f"{AXOLOTL.replace('.', '/')}.py").read_text()
            assert f"\nclass {name.removeprefix(AXOLOTL + '.')}(" in source
            continue
        found: Any = fasttax
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_commands_and_targets_exist() -> None:
    commands = set(re.findall(r"\bfasttax ([a-z]+)", WORDS))
    assert commands >= {"doctor", "bench", "merge", "tax", "kl"}
    assert commands <= set(COMMANDS)
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", WORDS))
    assert targets >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_extras_exist() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"'(?:\.|fasttax)\[(\w+)\]'", WORDS))
    assert extras <= set(project["optional-dependencies"])
    assert extras


def test_files_exist() -> None:
    metrics = ("kl/", "ewc/", "replay/", "project/")
    paths = {word for word in CODE if re.fullmatch(r"[a-z_]+/[a-z_/.]*", word)}
    files = {path for path in paths if not path.startswith(metrics)}
    assert "examples/" in files
    assert [name for name in files if not (ROOT / name).exists()] == []
