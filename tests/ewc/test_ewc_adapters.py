"""EWC on every kind of adapter: the penalty of the weights that the model computes with, or a
refusal when it is made, never a silent 0.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC
from tests.tools.models import causal_lm

peft = pytest.importorskip("peft", reason="pip install peft, or fasttax's dev extra")
transformers = pytest.importorskip("transformers", reason="pip install transformers")

TARGETS = ["q_proj", "down_proj"]


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


def merged(model: Any) -> dict[str, Tensor]:
    """The weights that a PEFT model computes with, by PEFT itself."""
    return weights(copy.deepcopy(model).merge_and_unload())


def step(model: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)


def truth(
    fisher: dict[str, Tensor], now: dict[str, Tensor], anchor: dict[str, Tensor], strength: float
) -> float:
    terms = [
        (f.double() * (now[plain(n)] - anchor[plain(n)]) ** 2).sum() for n, f in fisher.items()
    ]
    return strength / 2 * float(sum(terms))


def some_fisher(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.rand_like(p) for n, p in model.named_parameters()}


def ids() -> Tensor:
    return torch.randint(3, 60, (3, 6))


# --- what moves the base weight ----------------------------------------------------------------

INITS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", True]


def pissa_like(init: Any, **options: Any) -> tuple[dict[str, Tensor], Any]:
    base = causal_lm("llama").eval()
    before = weights(base)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, **options)
    return before, peft.get_peft_model(base, config).eval()


def corda() -> tuple[dict[str, Tensor], Any]:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = causal_lm("llama").eval()
    before = weights(base)
    config = peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    samples = torch.randint(3, 60, (1, 60))
    preprocess_corda(base, config, run_model=lambda: base(input_ids=samples))
    return before, peft.get_peft_model(base, config).eval()


def made(init: Any) -> tuple[dict[str, Tensor], Any]:
    return corda() if init == "corda" else pissa_like(init)


@pytest.mark.parametrize("init", [*INITS, "corda"])
@pytest.mark.parametrize("storage", ["fp32", "u8log"])
def test_an_init_that_moves_the_base_starts_at_0(init: Any, storage: str) -> None:
    """Then it is the penalty of the merged weights."""
    _, model = made(init)
    start = merged(model)
    fisher = fasttax.estimate_fisher(
        model, [ids()], lora="delta_w", labels="true", progress=False, storage=storage
    )
    ewc = EWC(model, fisher, strength=1e3, storage=storage)
    assert float(ewc.penalty()) == 0
    assert float(ewc.add_grad_()) == 0
    step(model)
    expected = truth(dict(fisher), merged(model), start, 1e3)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-3)
    assert expected > 0


@pytest.mark.parametrize("init", [*INITS, "corda"])
def test_the_bases_own_weights_are_the_anchor_with_either_fisher(init: Any) -> None:
    before, model = made(init)
    fisher = {n: torch.rand_like(p).float() for n, p in before.items() if "_proj" in n}
    anchor = {n: p.float() for n, p in before.items()}
    for options in ({}, {"anchor": anchor}):
        twin = copy.deepcopy(model)
        ewc = EWC(twin, fisher, strength=2.0, **options)
        assert float(ewc.penalty().detach()) < 1e-9
        step(twin)
        expected = truth(fisher, merged(twin), before, 2.0)
        assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_its_anchor_but_for_rounding(
    init: str, dtype: torch.dtype
) -> None:
    base = causal_lm("llama").to(dtype)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
    model = peft.get_peft_model(base, config)
    fisher = {n: torch.rand(p.shape) for n, p in before.items()}
    assert float(EWC(model, fisher, strength=2.0, anchor=before).penalty().detach()) == 0
    before = {n: p * 1.02 for n, p in before.items()}
    with pytest.raises(ValueError, match="low rank"):
        EWC(model, fisher, strength=2.0, anchor=before)


def test_a_gradient_near_the_anchor_has_its_digits() -> None:
    """The update is 1e-6 of the two that it is the difference of."""
    _, model = made("pissa")
    ewc = EWC(model, {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, strength=1.0)
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    step(model, 1e-6)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    names = [f"{layer}.lora_{x}.default.weight" for x in "BA"]
    b, a = (model.get_parameter(n).detach().double() for n in names)
    scale = model.get_submodule(layer).scaling["default"]
    delta = scale * (b @ a - start[names[0]] @ start[names[1]])
    assert float(ewc.penalty().detach()) == pytest.approx(float((delta**2).sum()) / 2, rel=1e-4)


def test_another_anchor_is_refused_and_its_advice_works() -> None:
    before, model = made("pissa")
    fisher = {n: torch.rand_like(p).float() for n, p in before.items() if "q_proj" in n}
    moved = {n: p.float() + 0.01 for n, p in before.items()}
    with pytest.raises(ValueError, match=r"q_proj.*low rank.*before the first step.*leave that"):
        EWC(model, fisher, strength=1.0, anchor=moved)
    assert float(EWC(model, fisher, strength=1.0, anchor={}).penalty().detach()) < 1e-9


def test_a_pissa_ewc_is_saved_loaded_and_restored(tmp_path: Any) -> None:
    _, model = made("pissa")
    start = merged(model)
    fisher = {n: torch.rand_like(p).float() for n, p in start.items() if "_proj" in n}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    ewc.save(tmp_path / "e.safetensors")
    again = EWC.load(tmp_path / "e.safetensors", model)
    restored = EWC(model, fisher, strength=1.0)
    restored.load_state_dict(ewc.state_dict())
    expected = truth(fisher, merged(model), start, 2.0)
    for one in (ewc, again, restored, ewc.on(model)):
        assert float(one.penalty().detach()) == pytest.approx(expected, rel=1e-3)


def test_a_file_of_the_plain_model_is_held_from_its_own_anchor(tmp_path: Any) -> None:
    """Its anchors are those of the base weights, wherever an init has put a part of them."""
    base = causal_lm("llama").eval()
    before = weights(base)
    fisher = some_fisher(base)
    EWC(base, fisher, strength=2.0).save(tmp_path / "base.safetensors")
    for init in (True, "pissa"):
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        ewc = EWC.load(tmp_path / "base.safetensors", model)
        assert float(ewc.penalty().detach()) < 1e-9
        step(model)
        expected = truth(fisher, merged(model), before, 2.0)
        assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(1.1)
    with pytest.raises(ValueError, match=r"EWC\.load: anchor: .*low rank"):
        EWC.load(tmp_path / "base.safetensors", peft.get_peft_model(base, config))


def test_a_state_is_refused_over_another_base(tmp_path: Any) -> None:
    """B A is relative to the weight that it is added to."""
    before, model = made(True)
    fisher = {n: torch.rand_like(p).float() for n, p in before.items() if "_proj" in n}
    ewc = EWC(model, fisher, strength=2.0)
    ewc.save(tmp_path / "e.safetensors")
    for other in (made("pissa")[1], model_of_another_base()):
        with pytest.raises(ValueError, match=r"EWC\.load: path: .*base weights.*same init"):
            EWC.load(tmp_path / "e.safetensors", other)
        with pytest.raises(ValueError, match=r"EWC\.load_state_dict: state: .*base weights"):
            EWC(other, fisher, strength=2.0).load_state_dict(ewc.state_dict())


def model_of_another_base() -> Any:
    _, model = made(True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.mul_(1.1)
    return model


# --- several adapters --------------------------------------------------------------------------


def two(active: list[str]) -> tuple[dict[str, Tensor], Any]:
    base = causal_lm("llama").eval()
    before = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS))
    model.add_adapter("more", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    return before, model.eval()


@pytest.mark.parametrize("active", [["default", "more"], ["default"], ["more"]])
def test_two_adapters_count_while_they_are_active(active: list[str]) -> None:
    before, model = two(["default", "more"])
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    model.base_model.set_adapter(active)
    expected = truth(fisher, merged(model), before, 2.0)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    with model.disable_adapter():
        assert float(ewc.penalty().detach()) == 0
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_that_is_added_later_counts() -> None:
    base = causal_lm("llama").eval()
    before = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS)).eval()
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "more"])
    step(model)
    expected = truth(fisher, merged(model), before, 2.0)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_one_that_is_added_later_and_is_another_kind_is_refused(options: Any) -> None:
    _, model = two(["default"])
    ewc = EWC(model, {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, strength=2.0)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=TARGETS, **options))
    model.set_adapter("late")
    for use in (ewc.penalty, ewc.add_grad_, ewc.distance):
        with pytest.raises(ValueError, match="q_proj"):
            use()


def test_merged_adapters_are_refused_until_they_are_apart() -> None:
    before, model = two(["default", "more"])
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    expected = truth(fisher, merged(model), before, 2.0)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        ewc.penalty()
    model.unmerge_adapter()
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


def test_frozen_factors_count_as_trainable_ones_do() -> None:
    before, model = two(["default"])
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    for p in model.parameters():
        p.requires_grad_(False)
    expected = truth(fisher, merged(model), before, 2.0)
    assert float(ewc.penalty()) == pytest.approx(expected, rel=1e-4)
    assert float(ewc.add_grad_()) == pytest.approx(expected, rel=1e-4)


def test_modules_to_save_follow_the_active_adapter() -> None:
    config = peft.LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["lm_head"])
    base = causal_lm("llama").eval()
    before = weights(base)
    model = peft.get_peft_model(base, config).eval()
    model.add_adapter("more", config)
    model.set_adapter("more")
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    expected = truth(fisher, merged(model), before, 2.0)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
    idle = "base_model.model.lm_head.modules_to_save.default.weight"
    with pytest.raises(ValueError, match="of an adapter that is not active"):
        EWC(model, {idle: fisher["lm_head.weight"]}, strength=1.0)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="lm_head"):
        ewc.penalty()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_bias_under_lora_is_a_plain_parameter(bias: str) -> None:
    base = causal_lm("gpt2").eval()
    before = weights(base)
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias=bias
    )
    model = peft.get_peft_model(base, config).eval()
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    step(model)
    expected = truth(fisher, merged(model), before, 2.0)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


# --- what is no W + scale B A ------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=TARGETS),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[1, 5]
    ),
    "LoRA and trainable tokens": lambda: peft.LoraConfig(
        r=2, target_modules=TARGETS, trainable_token_indices=[1, 5]
    ),
}
NAMED = r"_proj|norm|embed_tokens"
ADVICE = r"merge|leave it out|use_dora=False"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_with_ways_out_that_work(kind: str) -> None:
    base = causal_lm("llama").eval()
    before = weights(base)
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    model = peft.get_peft_model(base, OTHERS[kind]())
    with pytest.raises(ValueError, match=rf"(?s)EWC: model: .*({NAMED}).*({ADVICE})"):
        EWC(model, fisher, strength=1.0)
    touched = {
        n: f
        for n, f in fisher.items()
        if any(plain(k) == n and "base_layer" in k for k, _ in model.named_parameters())
        or (kind == "LoRA and trainable tokens" and "embed_tokens" in n)
    }
    assert touched
    left = {n: f for n, f in fisher.items() if n not in touched}
    if left:
        EWC(model, left, strength=1.0)  # "leave it out of the Fisher"
    united = model.merge_and_unload()  # "merge the adapter"
    ewc = EWC(united, fisher, strength=2.0, anchor={n: p.float() for n, p in before.items()})
    for p in united.parameters():
        p.requires_grad_(True)
    step(united)
    expected = truth(fisher, weights(united), before, 2.0)
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


PROMPTS: dict[str, Any] = {
    "PromptTuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PromptEncoder": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "PrefixTuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "AdaptionPrompt": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_weights_under_a_learned_prompt_are_refused_with_the_reason(kind: str) -> None:
    base = causal_lm("llama").eval()
    of_the_base = {n: torch.rand_like(p) for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, PROMPTS[kind]())
    whole = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    for fisher in (of_the_base, whole):
        with pytest.raises(
            ValueError, match=rf"EWC: model: .*embed_tokens.* {kind}, .*stay 0.*LoRA"
        ):
            EWC(model, fisher, strength=1.0)
    own = {n: whole[n] for n, p in model.named_parameters() if p.requires_grad}
    ewc = EWC(model, own, strength=2.0)  # "hold the prompt's own parameters"
    start = weights(model)
    step(model)
    now = weights(model)
    expected = sum(float((f.double() * (now[n] - start[n]) ** 2).sum()) for n, f in own.items())
    assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)


def test_a_bias_of_loras_own_is_refused() -> None:
    base = causal_lm("gpt2").eval()
    fisher = some_fisher(base)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    model = peft.get_peft_model(base, lora)
    for part in ("weight", "bias"):
        name = f"transformer.h.0.attn.c_attn.{part}"
        with pytest.raises(ValueError, match=r"lora_bias in .*c_attn.*lora_bias=False"):
            EWC(model, {name: fisher[name]}, strength=1.0)


def test_a_layer_that_computes_otherwise_is_seen() -> None:
    """It has all that a LoRA layer has, and a forward of its own."""
    _, model = two(["default"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 1.01
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=rf"computes with its weight.*{name}"):
        EWC(model, {name: torch.ones(32, 32)}, strength=1.0)


class Loralib(nn.Linear):
    """Factors beside the weight, as loralib and others have them."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, 4))
        self.lora_B = nn.Parameter(torch.randn(4, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.lora_A.T @ self.lora_B.T


def test_factors_beside_their_weight_are_refused() -> None:
    model = nn.Sequential(Loralib())
    with pytest.raises(ValueError, match=r"0\.weight beside lora_A.*PEFT's LoRA"):
        EWC(model, {"0.weight": torch.ones(4, 4)}, strength=1.0)
    EWC(model, {"0.bias": torch.ones(4)}, strength=1.0)
    EWC(model, {"0.lora_A": torch.ones(2, 4)}, strength=1.0)


def test_an_adapter_put_around_a_held_layer_is_refused() -> None:
    model = causal_lm("llama").eval()
    ewc = EWC(model, some_fisher(model), strength=1.0)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.weight under 1 adapter layers.*make the EWC"):
        ewc.penalty()


def test_training_mode_and_the_global_generator_are_left_alone() -> None:
    _, model = two(["default"])
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    name = "model.layers.0.self_attn.q_proj.weight"
    EWC(model, {name: torch.ones(32, 32)}, strength=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
