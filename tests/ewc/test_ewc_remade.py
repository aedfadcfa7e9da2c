"""An EWC that was made before FSDP2 shards its model is made anew on the shards, as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC
from fasttax.integrations._models import on_model
from tests.tools.models import causal_lm
from tests.tools.processes import on_ranks
from tests.tools.quantised import FourBit

peft = pytest.importorskip("peft", reason="pip install peft, or fasttax's dev extra")

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"storage": "u8log", "anchor_dtype": "bf16+8"},
    "offloaded": {"storage": "bf16", "anchor_dtype": "bf16", "offload": "cpu"},
}
CASES = [(None, "packed"), (None, "offloaded"), (True, "packed"), ("pissa", "plain")]


def model_of(adapter: Any) -> Any:
    torch.manual_seed(0)
    base: Any = causal_lm("llama")
    if adapter is None:
        return base
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=adapter)
    model = peft.get_peft_model(base, config)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.requires_grad_(True)
    return model


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    named = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    return {
        n.replace("base_layer.", ""): torch.rand(p.shape, generator=generator)
        for n, p in named.items()
    }


def move(model: nn.Module) -> None:
    """By a number, which every shard takes alike."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.01).add_(0.01)


def facts(ewc: EWC) -> list[Any]:
    hold = ewc.hold
    return [ewc.strength, ewc.storage, ewc.offload, hold.anchor_dtype, ewc.metadata]


def sharded(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    out: dict[str, float] = {}
    for adapter, form in CASES:
        model = model_of(adapter)
        ewc = EWC(model, fisher_of(model), strength=3.0, **FORMS[form])
        ewc.metadata["from"] = "here"
        fully_shard(model)
        with pytest.raises(ValueError, match=r"embed_tokens\.weight.*ewc\.on\(model\)"):
            ewc.penalty()
        again = on_model("test", ewc, model)
        assert again is not ewc
        assert facts(again) == facts(ewc)
        if form == "plain":
            assert float(again.penalty().detach()) == 0
        move(model)
        out[f"{adapter} {form}"] = float(again.penalty().detach())
        assert float(again.add_grad_()) == pytest.approx(out[f"{adapter} {form}"], rel=1e-5)
        assert on_model("test", again, model) is again
    model = causal_lm("llama")
    layer = model.model.layers[0].self_attn
    shape = tuple(layer.q_proj.weight.shape)
    layer.q_proj = FourBit(layer.q_proj)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["layers.0.self_attn.q_proj"])
    )
    fully_shard(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight, got lora.* could not be run alone"):
        EWC(model, {"model.layers.0.self_attn.q_proj.weight": torch.ones(shape)}, strength=1.0)
    torch.save(out, folder / f"{rank}.pt")


def test_it_is_the_one_process(tmp_path: Path) -> None:
    on_ranks(sharded, tmp_path)
    for adapter, form in CASES:
        model = model_of(adapter)
        ewc = EWC(model, fisher_of(model), strength=3.0, **FORMS[form])
        move(model)
        truth = float(ewc.penalty().detach())
        assert truth > 0
        for rank in range(2):
            got = torch.load(tmp_path / f"{rank}.pt")[f"{adapter} {form}"]
            # u8log's blocks are cut anew on the shards
            assert got == pytest.approx(truth, rel=2e-2 if form == "packed" else 1e-5)
