"""EWC on PEFT over weights that lie quantised in a tensor subclass, as torchao's do: the numbers
are those of the float twin, and what can't be held is refused by name.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fasttax
from tests.tools.models import causal_lm
from tests.tools.quantised import FourBit, Int8Weight, dequantise, quantise

peft = pytest.importorskip("peft", reason="pip install peft, or fasttax's dev extra")


def twins() -> tuple[Any, Any]:
    """PEFT models with the same factors, over a quantised base and over its float values."""
    base = causal_lm("llama")
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            quantise(module)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    packed = peft.get_peft_model(base, config)
    dense = copy.deepcopy(packed)
    for module in dense.modules():
        if type(module) is nn.Linear and isinstance(module.weight, Int8Weight):
            dequantise(module)
    return packed, dense


def test_lora_over_a_quantised_base_is_held_as_over_its_floats(tmp_path: Path) -> None:
    packed, dense = twins()
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    held = []
    for model in (packed, dense):
        fisher = fasttax.estimate_fisher(
            model, [ids], labels="true", lora="delta_w", progress=False
        )
        ewc = fasttax.EWC(model, fisher, strength=2.0)
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        held.append((model, ewc, fisher))
    (_, ewc, fisher), (_, truth, expected) = held
    assert list(fisher) == list(expected)
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-4, atol=1e-9)
    for found, wanted in (
        (ewc.add_grad_(), truth.add_grad_()),
        (ewc.distance().total, truth.distance().total),
    ):
        assert float(wanted) > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m, _, _ in held]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-6)
    ewc.consolidate(fisher)
    ewc.save(tmp_path / "ewc.safetensors")
    read = fasttax.EWC.load(tmp_path / "ewc.safetensors", packed)
    torch.testing.assert_close(read.penalty(), ewc.penalty())
    packed.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    packed.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(read.penalty(), ewc.penalty())  # B is 0, the base where it was


def test_a_base_that_an_adapter_has_moved_is_seen() -> None:
    packed, _ = twins()
    layer = next(m for m in packed.modules() if hasattr(m, "lora_A"))
    fisher = {"model.layers.0.self_attn.q_proj.weight": torch.ones(layer.base_layer.weight.shape)}
    ewc = fasttax.EWC(packed, fisher, strength=1.0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    packed.add_adapter("second", config)
    layer.base_layer.weight.q[0] += 1
    packed.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="expected the base weight that"):
        ewc.penalty()


@pytest.mark.parametrize("holder", [fasttax.EWC, fasttax.FisherMask])
def test_a_quantised_weight_itself_is_refused_by_name(holder: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), quantise(nn.Linear(4, 3)))
    fisher = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    options = {"strength": 1.0} if holder is fasttax.EWC else {"share": 0.5}
    with pytest.raises(ValueError, match=r"1\.weight of dtype torch\.float32 and class Int8Weight"):
        holder(model, fisher, **options)


def test_codes_under_a_floats_name_are_refused_by_name() -> None:
    """FSDP-QLoRA's bnb_4bit_quant_storage; of its own, without LoRA."""
    model = nn.Sequential(FourBit(nn.Linear(8, 8, bias=False), torch.bfloat16))
    fisher = {"0.weight": torch.ones_like(model[0].weight)}
    with pytest.raises(ValueError, match=r"0\.weight of dtype .* and class Params4bit"):
        fasttax.EWC(model, fisher, strength=1.0)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bit_codes_that_are_laid_out_anew_are_the_same_weight(storage: torch.dtype) -> None:
    """As bitsandbytes does on a CPU; and the EWC's own proof has it not done."""
    torch.manual_seed(0)
    names = ("q_proj", "down_proj")
    base = causal_lm("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj = FourBit(layer.self_attn.q_proj, storage)
        layer.mlp.down_proj = FourBit(layer.mlp.down_proj, storage)
    config = peft.LoraConfig(r=3, target_modules=list(names), init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    fours = [m for m in model.modules() if isinstance(m, FourBit)]
    shape = (fours[0].out_features, fours[0].in_features)
    fisher = {"model.layers.0.self_attn.q_proj.weight": torch.ones(shape)}
    summed = fasttax.DiagonalFisher(model, lora="delta_w").sums
    assert {summed.slots[n].shape for n in summed.squared() if "q_proj" in n} == {shape}
    ewc = fasttax.EWC(model, fisher, strength=1.0)
    assert not any(m.laid_out_anew for m in fours)
    penalty = float(ewc.penalty().detach())
    assert penalty > 0
    with torch.no_grad():
        model(torch.randint(0, 50, (2, 6)))
    assert all(m.laid_out_anew for m in fours)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=list(names)))
    model.base_model.set_adapter(["default", "late"])
    assert float(ewc.penalty().detach()) == pytest.approx(penalty, rel=1e-6)  # B is 0
    model.add_adapter("later", peft.LoraConfig(r=2, target_modules=list(names)))
    fours[0].store((fours[0].codes() + torch.eye(*shape, dtype=torch.int64)).clamp(0, 15))
    model.base_model.set_adapter(["default", "late", "later"])
    with pytest.raises(ValueError, match="expected the base weight that"):
        ewc.penalty()
