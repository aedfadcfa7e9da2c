"""The section of a model card: what it says is the objects' own, and it replaces an older one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fasttax
from fasttax.integrations import AdaptiveKL
from fasttax.integrations.trl import FullKL
from fasttax.tax import BothWays, ModelCardSection, TaxReport, kl_both_ways
from tests.tools import tiny_lm
from tests.tools.kl_steps import llama, trainer

CARD = """---
license: apache-2.0
tags:
- llama
---

# A model

What it does.
"""


def held(folder: Path, structure: Any = "diagonal") -> tuple[Any, Path]:
    """An EWC whose weights have moved, and its Fisher's file."""
    model = tiny_lm.model()
    batches = list(tiny_lm.ids(6).split(2))
    fisher = fasttax.estimate_fisher(model, batches, structure=structure, progress=False)
    path = folder / "fisher.safetensors"
    fisher.save(path)
    ewc = fasttax.EWC(model, path, strength=12.5)
    with torch.no_grad():
        model.get_output_embeddings().weight += 0.01
    return ewc, path


def report() -> TaxReport:
    made = TaxReport({"mmlu": 0.62, "gsm8k": 0.38}, 0.31)
    made.add("dpo-500", {"mmlu": 0.61, "gsm8k": 0.33}, 0.52, kl=0.8, run="dpo", step=500)
    made.add("ewc-500", {"mmlu": 0.62, "gsm8k": 0.37}, 0.5, kl=0.2, run="ewc", step=500)
    return made


@pytest.mark.parametrize("structure", ["diagonal", "kron"])
def test_every_number_is_an_objects_own(structure: str, tmp_path: Path) -> None:
    ewc, path = held(tmp_path, structure)
    base = tiny_lm.model(1)
    texts = {"general": list(tiny_lm.ids(4, seed=1).split(2)), "task": [tiny_lm.ids(2, seed=2)]}
    kl = {name: kl_both_ways(tiny_lm.model(), base, some) for name, some in texts.items()}
    of = trainer(llama())
    with FullKL(of, llama(1), AdaptiveKL(target=0.05, beta=0.2), "ref_policy") as full_kl:
        said = str(ModelCardSection(ewc=ewc, full_kl=full_kl, fisher=path, kl=kl, report=report()))
    lines = said.splitlines()
    parameters = sum(p.numel() for p in ewc.parameters().values())
    kind = {"diagonal": "diagonal", "kron": "Kronecker factors"}[structure]
    facts = ewc.metadata
    expected = [
        "| EWC, strength | 12.5 |",
        f"| parameters held | {parameters:,} |",
        f"| Fisher | {kind}, labels sample, unit example, examples 6, tokens {facts['tokens']}, "
        "normalize mean |",
        f"| EWC penalty at the end | {float(ewc.penalty()):.4g} |",
        "| Fisher file | `fisher.safetensors` |",
        "| KL(base \\|\\| model) in the loss, coefficient | 0.2 at the end, steered to 0.05 nats a "
        "token |",
        *(
            f"| {name} | {m.tokens} | {m.policy_ref:.4g} | {m.ref_policy:.4g} |"
            for name, m in kl.items()
        ),
    ]
    for line in expected:
        assert line in lines
    tax = next(line for line in lines if line.startswith("| dpo dpo-500") or "dpo-500" in line)
    assert "+0.03" in tax
    assert str(tmp_path) not in said
    for line in lines:  # rows of a table have as many cells as its head
        assert not line.startswith("|") or line.replace("\\|", "").count("|") >= 3


def test_a_section_takes_an_older_ones_place() -> None:
    one = ModelCardSection(kl={"general": BothWays(0.25, 0.5, 100)})
    card: Any = one.into(ModelCard(CARD), model_name="mine")
    assert card.text.count("fasttax:begin") == 1
    assert "# A model\n\nWhat it does." in card.text
    assert card.data.tags == ["llama", "fasttax"]
    card = ModelCard(str(card).replace("What it does.", "What it does.\n") + "\n## After\n")
    other = ModelCardSection(
        kl={"general": BothWays(0.125, 0.5, 100)}, report=report(), checkpoint="ewc-500"
    )
    again = other.into(card)
    assert again.text.count("fasttax:begin") == again.text.count("fasttax:end") == 1
    assert "0.25" not in again.text
    assert again.text.rstrip().endswith("## After")
    read = ModelCard(str(again))  # as the Hub reads it
    data: Any = read.data
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert results == {
        ("general", "KL(model || base)"): 0.125,
        ("general", "KL(base || model)"): 0.5,
        ("mmlu", "capability"): 0.62,
        ("gsm8k", "capability"): 0.37,
        ("alignment", "alignment"): 0.5,
        ("all benchmarks", "alignment tax"): pytest.approx(0.005),
    }
    assert data.model_name == "mine"
    assert data.license == "apache-2.0"
    assert str(other.into(again)) == str(again)


def test_what_does_not_fit(tmp_path: Path) -> None:
    ewc, path = held(tmp_path)
    with pytest.raises(ValueError, match="at least one of ewc, full_kl, kl and report"):
        ModelCardSection()
    with pytest.raises(ValueError, match="fisher: expected an EWC"):
        ModelCardSection(fisher=path, report=report())
    other = fasttax.estimate_fisher(tiny_lm.model(1), [tiny_lm.ids(2)], progress=False)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the EWC's own, got .*other of model_hash .*examples 2"):
        ModelCardSection(ewc=ewc, fisher=tmp_path / "other")
    report().save(tmp_path / "report.json")
    with pytest.raises(ValueError, match="a file of FisherEstimate or KroneckerEstimate"):
        ModelCardSection(ewc=ewc, fisher=tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"a repository of the Hub .* which is neither"):
        ModelCardSection(ewc=ewc, fisher="no/such/file")
    assert "](https://huggingface.co/me/f)" in str(ModelCardSection(ewc=ewc, fisher="me/f"))
    with pytest.raises(ValueError, match=r"checkpoint: expected one of .*ewc-500, got x, 0 times"):
        ModelCardSection(report=report(), checkpoint="x")
    with pytest.raises(ValueError, match="model_name: expected a name for the results"):
        ModelCardSection(kl={"a": BothWays(0.1, 0.1, 1)}).into(ModelCard(CARD))
    assert "fasttax:begin" in str(ModelCardSection(ewc=ewc).into(ModelCard(CARD)))
