"""fasttax plan: its numbers against what small models are measured to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fasttax
from fasttax import cli
from fasttax.cli._costs import GPUS, TRAINING, U8LOG, Job, Shape, costs
from fasttax.fisher import estimate_fisher
from fasttax.integrations.reference import TopKReference
from tests.tools import tiny_lm

SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {"hidden_size": 64, "intermediate_size": 300, "num_attention_heads": 4},
    "deep": {"num_hidden_layers": 5, "num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True, "vocab_size": 600},
}


def job(**changes: Any) -> Job:
    given = {
        "gpu": GPUS["h100"],
        "gpus": 1,
        "use": 0.4,
        "tokens": 64,
        "length": 16,
        "examples": 4,
        "k": 8,
        "every": 1,
        "checkpointing": False,
    }
    return Job(**{**given, **changes})


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_flops_are_the_models(size: str) -> None:
    model = tiny_lm.model(**SIZES[size])
    shape = Shape.of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    model.set_attn_implementation("eager")  # whose products the counter sees
    ids = tiny_lm.ids(4, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    # eager attention multiplies what is masked, too; a causal kernel, as planned, half of it
    masked = 2 * shape.layers * shape.hidden * 32 * ids.numel()
    planned = shape.forward(ids.numel(), 32) + masked
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert 3 * planned == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("size", SIZES)
def test_activations_are_what_autograd_keeps(size: str) -> None:
    model = tiny_lm.model(**SIZES[size])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = tiny_lm.ids(4, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(ids)
    saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    planned = Shape.of(model.config).activations(ids.numel(), checkpointing=False)
    assert 2 * planned == pytest.approx(saved, rel=0.2)  # the plan's are bf16


def test_memory_of_fisher_anchor_and_cache(tmp_path: Path) -> None:
    model = tiny_lm.model(0)
    shape = Shape.of(model.config)
    planned = {cost.name: cost for cost in costs(shape, job())}
    fisher = estimate_fisher(model, [tiny_lm.ids(2)], progress=False)
    names = {"fp32": "fp32 Fisher and anchor", "bf16": "bf16 Fisher and anchor"}
    anchors = {"fp32": torch.float32, "bf16": torch.bfloat16, "u8log": torch.bfloat16}
    names["u8log"] = "u8log Fisher, bf16 anchor"
    for storage, name in names.items():
        ewc = fasttax.EWC(
            model, fisher, strength=1.0, storage=storage, anchor_dtype=anchors[storage]
        )
        ewc.save(tmp_path / "ewc.safetensors")
        size = (tmp_path / "ewc.safetensors").stat().st_size
        # headers, and of u8log a block of scales for each small tensor
        assert planned[f"EWC, {name}"].memory == pytest.approx(size, rel=0.25), storage
    fisher.save(tmp_path / "f.safetensors")
    sums = planned["Fisher (once, before)"].memory - shape.activations(64, False)
    # what is estimated lies in float32, beside bf16 weights
    stored = (tmp_path / "f.safetensors").stat().st_size + 2 * shape.parameters
    assert sums == pytest.approx(stored, rel=0.15)
    rows = tiny_lm.ids(4, 16)
    TopKReference.make(model, rows, k=8).save(tmp_path / "c.safetensors")
    cached = (tmp_path / "c.safetensors").stat().st_size
    assert 8 * 8 * rows.numel() == pytest.approx(cached, rel=0.5)  # the header is 1 kB


def test_shares_and_switches() -> None:
    shape = Shape.of(tiny_lm.model().config)
    one, eight = (list(costs(shape, job(gpus=n))) for n in (1, 8))
    kept = shape.activations(64, False)
    assert one[0].memory == TRAINING * shape.parameters + kept
    assert eight[0].memory == TRAINING * shape.parameters / 8 + kept
    assert eight[3].memory == pytest.approx((U8LOG + 2) * shape.parameters / 8)
    again = next(iter(costs(shape, job(checkpointing=True))))
    assert again.seconds == pytest.approx(one[0].seconds * 4 / 3)
    assert again.memory < one[0].memory
    rare = {c.name: c for c in costs(shape, job(every=4))}
    often = {c.name: c for c in one}
    assert 4 * rare["replay, KL"].seconds == pytest.approx(often["replay, KL"].seconds)


def test_command_reads_the_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lm.model().config.save_pretrained(tmp_path / "model")
    out = tmp_path / "plan.json"
    line = ["plan", str(tmp_path / "model"), "--gpu", "h100", "--gpus", "8"]
    assert cli.main([*line, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "8 x h100" in printed
    assert "Fisher (once, before)" in printed
    found = json.loads(out.read_text())
    assert found["shape"]["parameters"] == sum(p.numel() for p in tiny_lm.model().parameters())
    assert all(cost["fits"] for cost in found["costs"])
    assert cli.main(["plan", str(tmp_path / "model" / "config.json"), "--checkpointing"]) == 0
    capsys.readouterr()


def test_a_large_model_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--gpu", "rtx4090", "--gpus", "1"]) == 0
    printed = capsys.readouterr().out
    assert "8.03 B parameters" in printed  # Llama 3 8B
    assert "NO" in printed


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_quantised_model_is_planned_as_what_it_was_made_from(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_lm.model().config
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert cli.main(["plan", str(tmp_path), "--json", str(tmp_path / "plan.json")]) == 0
    assert f"lies quantised ({method}): this is the plan" in capsys.readouterr().out
    shape = json.loads((tmp_path / "plan.json").read_text())["shape"]
    assert shape == {**vars(Shape.of(config)), "quantised": method}
    assert not Shape.of(config).quantised


def test_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nonesuch"}')
    tiny_lm.model().config.save_pretrained(tmp_path / "model")
    good = str(tmp_path / "model")
    for line, says in (
        ([str(tmp_path / "none" / "x")], "folder or Hub id"),
        ([str(tmp_path)], "no config of a causal language model"),
        ([str(tmp_path / "odd")], "no config of a causal language model"),
        ([good, "--gpus", "0"], "--gpus"),
        ([good, "--use", "2"], "--use"),
        ([good, "--json", str(tmp_path / "none" / "x")], "create it first"),
    ):
        assert cli.main(["plan", *line]) == 2, line
        assert says in capsys.readouterr().err
