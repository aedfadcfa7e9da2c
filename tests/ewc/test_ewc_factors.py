"""EWC on every adapter whose update is a product of factors: the penalty, and its gradient, of the
weights that PEFT merges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import EWC
from tests.tools.models import causal_lm

peft = pytest.importorskip("peft", reason="pip install peft, or fasttax's dev extra")
transformers = pytest.importorskip("transformers", reason="pip install transformers")

TARGETS = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STRENGTH = 2.0


def moe(kind: str) -> nn.Module:
    """Experts in one parameter: (experts, out, in) of Qwen3-MoE, (experts, in, out) of gpt-oss."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(**sizes, num_local_experts=4)
        return transformers.GptOssForCausalLM(config)
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=12)
    return transformers.Qwen3MoeForCausalLM(config)


class Convolved(nn.Module):
    """A convolution of each dimension, with stride and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 5, 3, stride=2, padding=1)
        self.two = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.three = nn.Conv3d(3, 4, 2)
        self.pointwise = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x) + self.two(x).sum()


def language_model() -> nn.Module:
    return causal_lm("llama")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=5, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "AdaLoRA": (
        language_model,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
        "_proj",
    ),
    "AdaLoRA of convolutions": (
        Convolved,
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["two", "pointwise"]
        ),
        "weight",
    ),
    "AdaLoRA of Conv1D": (
        lambda: causal_lm("gpt2"),
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True
        ),
        "c_attn.weight",
    ),
    "experts (out, in)": (
        lambda: moe("qwen3"),
        lambda: lora(target_modules=["q_proj"], target_parameters=EXPERTS),
        "experts|q_proj",
    ),
    "experts (in, out)": (
        lambda: moe("gpt-oss"),
        lambda: lora(target_modules=["q_proj"], target_parameters=EXPERTS[:1]),
        "experts|q_proj",
    ),
    "one parameter of a Linear": (
        language_model,
        lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
        "_proj",
    ),
    "one parameter of a Conv1D": (
        lambda: causal_lm("gpt2"),
        lambda: lora(target_modules=[], target_parameters=["attn.c_attn.weight"]),
        "c_attn.weight",
    ),
    "convolutions": (
        Convolved,
        lambda: lora(target_modules=["one", "two", "three", "pointwise"]),
        "weight",
    ),
    "MiCA": (
        language_model,
        lambda: lora(target_modules=TARGETS, init_lora_weights="mica"),
        "_proj",
    ),
    "MiCA of an embedding": (
        language_model,
        lambda: lora(target_modules=["embed_tokens"], init_lora_weights="mica"),
        "embed_tokens",
    ),
}


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {plain(n): p.detach().double().clone() for n, p in model.named_parameters()}


def merged(model: Any) -> dict[str, Tensor]:
    return weights(copy.deepcopy(model).merge_and_unload())


def step(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def made(case: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The adapted model, the Fisher of the base weights that it moves, and those weights."""
    base, config, pattern = CASES[case]
    torch.manual_seed(0)
    model = base().eval()
    before = weights(model)
    adapted = peft.get_peft_model(model, config()).eval()
    names = [n for n in before if any(part in n for part in pattern.split("|"))]
    fisher = {n: torch.rand(before[n].shape) for n in names}
    return adapted, fisher, before


def truth(fisher: dict[str, Tensor], now: dict[str, Tensor], anchor: dict[str, Tensor]) -> float:
    terms = [(f.double() * (now[n] - anchor[n]) ** 2).sum() for n, f in fisher.items()]
    return STRENGTH / 2 * float(sum(terms))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("storage", ["fp32", "u8log"])
def test_the_penalty_is_that_of_the_merged_weights(case: str, storage: str) -> None:
    model, fisher, before = made(case)
    ewc = EWC(model, fisher, strength=STRENGTH, storage=storage)
    stored = {n: f.double() for n, f in ewc.fisher.items()}
    assert set(stored) == set(fisher)
    assert float(ewc.penalty().detach()) == 0
    step(model)
    expected = truth(stored, merged(model), before)
    assert expected > 0
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    assert float(ewc.add_grad_()) == pytest.approx(expected, rel=1e-4)
    assert float(ewc.distance().total) == pytest.approx(2 * expected / STRENGTH, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_its_gradient_is_the_penaltys(case: str) -> None:
    """By differences of the penalty of the merged weights, along one direction."""
    model, fisher, before = made(case)
    model.double()
    ewc = EWC(model, {n: f.double() for n, f in fisher.items()}, strength=STRENGTH)
    before = {n: p.double() for n, p in before.items()}
    step(model)
    ewc.add_grad_()
    trained = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in n for n, _ in trained)
    generator = torch.Generator().manual_seed(2)
    ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for _, p in trained]
    slope = sum(float((p.grad * way).sum()) for (_, p), way in zip(trained, ways, strict=True))
    values, size = [], 1e-4
    for sign in (1, -2):
        with torch.no_grad():
            for (_, p), way in zip(trained, ways, strict=True):
                p.add_(way, alpha=sign * size)
        values.append(truth(fisher, merged(model), before))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * size), rel=1e-5)
    value = ewc.penalty()
    grads = torch.autograd.grad(value, [p for _, p in trained])
    assert all(bool(g.any()) for g in grads)


@pytest.mark.parametrize("case", CASES)
def test_it_is_consolidated_saved_loaded_restored_and_copied(case: str, tmp_path: Any) -> None:
    model, fisher, _ = made(case)
    step(model)
    ewc = EWC(model, fisher, strength=STRENGTH)
    ewc.consolidate(fisher, decay=0.0)
    start = merged(model)
    assert float(ewc.penalty().detach()) < 1e-9
    step(model)
    step(model)
    expected = truth(fisher, merged(model), start)
    ewc.save(tmp_path / "e.safetensors")
    loaded = EWC.load(tmp_path / "e.safetensors", model)
    restored = EWC(model, fisher, strength=1.0)
    restored.load_state_dict(ewc.state_dict())
    copied = copy.deepcopy((model, ewc))[1]
    for one in (ewc, loaded, restored, copied, ewc.on(model)):
        assert float(one.penalty().detach()) == pytest.approx(expected, rel=1e-3)


def test_the_rank_that_adalora_gives_up_counts_no_more() -> None:
    """Its allocator sets entries of E to 0, and ends with factors of a smaller rank."""
    model, fisher, before = made("AdaLoRA")
    ewc = EWC(model, fisher, strength=STRENGTH)
    step(model)
    for module in model.modules():
        if hasattr(module, "ranknum"):
            with torch.no_grad():
                module.lora_E["default"][1:3] = 0
    expected = truth(fisher, merged(model), before)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    pattern = {
        plain(n).replace(".lora_E.default", ".lora_E"): [True, False, False, True]
        for n, _ in model.named_parameters()
        if "lora_E" in n
    }
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert float(ewc.penalty().detach()) == pytest.approx(
        truth(fisher, merged(model), before), rel=1e-4
    )


def test_two_adapters_over_experts_add_up() -> None:
    model, fisher, before = made("experts (out, in)")
    model.add_adapter("more", lora(target_modules=["q_proj"], target_parameters=EXPERTS))
    model.base_model.set_adapter(["default", "more"])
    ewc = EWC(model, fisher, strength=STRENGTH)
    step(model)
    expected = truth(fisher, merged(model), before)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    with model.disable_adapter():
        assert float(ewc.penalty().detach()) == 0


def test_a_bfloat16_stack_of_experts_is_held_within_its_rounding() -> None:
    model, fisher, before = made("experts (out, in)")
    model.bfloat16()
    before = weights(model)
    ewc = EWC(model, fisher, strength=STRENGTH)
    step(model)
    double = copy.deepcopy(model).double()
    expected = truth(fisher, merged(double), before)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-2)


def test_a_stack_of_experts_that_computes_otherwise_is_seen() -> None:
    model, fisher, _ = made("experts (out, in)")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    own = layer.get_delta_factors
    layer.forward = lambda *x, **k: 1.1 * type(layer).forward(layer, *x, **k)
    with pytest.raises(ValueError, match=r"computes with its weight.*experts.*merge_and_unload"):
        EWC(model, fisher, strength=1.0)
    del layer.forward
    EWC(model, fisher, strength=1.0)
    assert layer.get_delta_factors == own


def test_the_proof_leaves_the_experts_as_they_are() -> None:
    model, fisher, _ = made("experts (out, in)")
    ids = torch.arange(12).view(2, 6)
    step(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    logits = model(input_ids=ids).logits
    EWC(model, fisher, strength=1.0)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_convolutions_in_groups_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"without groups.*0.*weight, a Conv2d in groups; leave"):
        EWC(adapted, {"0.weight": torch.ones(4, 2, 3, 3)}, strength=1.0)
