"""Adapters that come after the EWC: what they are is looked at, whatever their name and state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttax import EWC
from tests.ewc.test_ewc_adapters import TARGETS, merged, peft, step, truth, two, weights
from tests.tools.models import causal_lm


def test_one_that_moved_the_base_is_refused_though_it_is_not_active() -> None:
    _, model = two(["default"])
    ewc = EWC(model, {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, strength=2.0)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa")
    model.add_adapter("late", config)
    model.set_adapter("default")
    for use in (ewc.penalty, ewc.add_grad_, ewc.distance):
        with pytest.raises(ValueError, match="has taken its update out of it"):
            use()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {}])
def test_an_adapter_of_a_name_that_was_there_before_is_looked_at(options: Any) -> None:
    base = causal_lm("llama").eval()
    before = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS)).eval()
    fisher = {n: torch.rand_like(p).float() for n, p in before.items()}
    ewc = EWC(model, fisher, strength=2.0)
    configs: tuple[dict[str, Any], ...] = ({}, options)
    for config in configs:
        model.add_adapter("x", peft.LoraConfig(r=2, target_modules=TARGETS, **config))
        model.set_adapter("x")
        step(model)
        if config:
            with pytest.raises(ValueError, match="q_proj"):
                ewc.penalty()
        else:
            expected = truth(fisher, merged(model), before, 2.0)
            assert float(ewc.penalty().detach()) == pytest.approx(expected, rel=1e-4)
        model.set_adapter("default")
        model.delete_adapter("x")


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied() -> tuple[Any, dict[str, torch.Tensor]]:
    base = causal_lm("llama", tie_word_embeddings=True).eval()
    return base, {EMBEDDING: torch.rand_like(base.lm_head.weight)}


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_a_copy_of_a_tied_weight_is_held_or_refused(saved: list[str]) -> None:
    """PEFT trains the head apart from the embedding, and only the embedding has a Fisher."""
    base, fisher = tied()
    before = EWC(base, fisher, strength=2.0)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=saved)
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=rf"every use of {EMBEDDING}.*one without {HEAD}"):
        EWC(model, fisher, strength=2.0)
    with pytest.raises(ValueError, match="lm_head"):
        before.penalty()
    both = EWC(model, {**fisher, HEAD: fisher[EMBEDDING]}, strength=2.0)
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").add_(1.0)
    assert float(both.penalty().detach()) == pytest.approx(float(fisher[EMBEDDING].sum()), rel=1e-5)


def test_copies_that_stay_tied_are_one() -> None:
    base, fisher = tied()
    saved = ["lm_head", "embed_tokens"]
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS, modules_to_save=saved, ensure_weight_tying=True
    )
    model = peft.get_peft_model(base, config)
    ewc = EWC(model, fisher, strength=2.0)
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").add_(1.0)
    assert float(ewc.penalty().detach()) == pytest.approx(float(fisher[EMBEDDING].sum()), rel=1e-5)
