"""FullKL on models whose logits are not a plain head on the backbone's states, and on adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as t
from torch import nn

from fasttax.integrations.reference import TopKReference
from fasttax.integrations.trl import FullKL
from tests.tools import kl_steps as k
from tests.tools.quantised import FourBit

CLOSE = 2e-4  # relative, float32 against float64
SIZES = k.SIZES
BERT = {n: v for n, v in SIZES.items() if n != "num_key_value_heads"}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def opt() -> Any:
    """Calls the decoder in its base model, not the base model."""
    sizes = {n: SIZES[n] for n in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return t.OPTForCausalLM(
        t.OPTConfig(**sizes, ffn_dim=20, num_attention_heads=2, word_embed_proj_dim=12, dropout=0.0)
    )


def aya() -> Any:
    """A scale in the text's configuration that this class does not apply."""
    text = t.Cohere2Config(**SIZES, logit_scale=0.25)
    return t.AyaVisionForConditionalGeneration(
        t.AyaVisionConfig(text_config=text, vision_config=VISION, image_token_index=60)
    )


def padded() -> Any:
    """A head of more rows than the model gives logits."""

    class Cut(t.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., :50]
            return output

    return Cut(t.LlamaConfig(**SIZES))


def scaled_elsewhere() -> Any:
    """States that are halved between backbone and head, of which no configuration tells."""

    class Half(t.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    return Half(t.LlamaConfig(**SIZES))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=4.0)),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "modernbert": lambda: t.ModernBertDecoderForCausalLM(
        t.ModernBertDecoderConfig(**BERT, cls_token_id=1, sep_token_id=2)
    ),
    "bert": lambda: t.BertLMHeadModel(
        t.BertConfig(
            **BERT,
            is_decoder=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    "opt": opt,
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **SIZES, head_dim=8, intermediate_size_mlp=20, num_local_experts=2, moe_layers=[]
        )
    ),
    "aya": aya,
    "padded": padded,
    "scaled": scaled_elsewhere,
}
PROVEN = ("llama", "cohere", "granite", "gemma2", "llama4", "aya", "opt")


@pytest.mark.parametrize("cls", [t.Trainer, k.NoLogits])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_kl_of_the_models_own_logits(name: str, cls: type) -> None:
    policy, ref = (k.spread(MODELS[name](), seed) for seed in (0, 1))
    kind = "ref_policy" if name in ("cohere", "opt") else "policy_ref"
    wanted, grads = k.truth(policy, ref, kind)
    found = k.step(copy.deepcopy(policy), ref, kind, cls=cls)
    assert found.kl == pytest.approx(wanted, rel=CLOSE)
    if cls is k.NoLogits:  # whose own loss has no gradient
        assert k.error(found.grads, grads, 0.5) < 1e-3
    assert k.step(policy, copy.deepcopy(policy), kind, cls=cls).kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", PROVEN)
def test_a_proven_head_keeps_the_fast_path(name: str) -> None:
    """No more logits are made by the models than the trainer asked for, and the reference's one."""
    policy, ref = (k.spread(MODELS[name](), seed) for seed in (0, 1))
    made = k.trainer(policy, k.NoLogits)
    made.current_gradient_accumulation_steps = 1
    policy.train()
    with FullKL(made, ref, 0.5) as full:
        made.state.logging_steps = 100
        made.compute_loss(made.model, dict(k.BATCH))  # proves both heads
        made.state.global_step = 1
        widths: list[int] = []
        for model in (policy, ref):
            model.get_output_embeddings().register_forward_hook(
                lambda module, args, output: widths.append(output.shape[1])
            )
        made.compute_loss(made.model, dict(k.BATCH))
    assert widths == [1, 1]
    assert full.policy.shortcut.possible()


def test_labels_of_encoder_decoders_are_not_shifted() -> None:
    sizes = {"vocab_size": k.VOCABULARY, "d_model": 16, "decoder_start_token_id": 1}
    batch = {**k.BATCH, "labels": k.BATCH["labels"].flip(1)}
    bart = t.BartConfig(
        **sizes,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        dropout=0.0,
    )
    t5 = t.T5Config(
        **sizes, d_kv=8, d_ff=20, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0
    )
    for make in (
        lambda: t.BartForConditionalGeneration(copy.deepcopy(bart)),
        lambda: t.T5ForConditionalGeneration(copy.deepcopy(t5)),
        # a decoder alone, whose loss does not shift either
        lambda: t.BartForCausalLM(copy.deepcopy(bart)),
    ):
        policy, ref = (k.spread(make(), seed) for seed in (0, 1))
        wanted, _ = k.truth(policy, ref, batch=batch, shift=False)
        found = k.step(policy, ref, cls=t.Seq2SeqTrainer, batch=batch)
        assert found.kl == pytest.approx(wanted, rel=CLOSE)
        assert found.tokens == int((batch["labels"] != -100).sum())
    policy = k.spread(t.BartForConditionalGeneration(bart))
    cache = TopKReference.make(k.llama(), [[4, 5, 6]], k=4)
    with pytest.raises(ValueError, match="an encoder-decoder; pass the reference model itself"):
        FullKL(k.trainer(policy), cache, 0.5)
    with pytest.raises(ValueError, match=r"TopKReference\.make: model: .* an encoder-decoder"):
        TopKReference.make(policy, [[4, 5, 6]])


# --- what PEFT puts around the model --------------------------------------------------------------

PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("cls", [t.Trainer, k.NoLogits])
@pytest.mark.parametrize("name", PROMPTS)
def test_the_reference_does_not_see_the_prompt(name: str, cls: type) -> None:
    base = k.llama()
    plain = copy.deepcopy(base)
    policy = k.shaken(peft.get_peft_model(base, PROMPTS[name]()))
    wanted, grads = k.truth(policy, plain)
    assert wanted > 1e-3
    cache = TopKReference.make(plain, k.IDS.tolist(), k=k.VOCABULARY)
    for ref in (None, plain, cache):
        found = k.step(copy.deepcopy(policy), ref, cls=cls)
        assert found.kl == pytest.approx(wanted, rel=CLOSE)
        if cls is k.NoLogits:
            assert k.error(found.grads, grads, 0.5) < 1e-3


class Embeds(t.Trainer):
    """Passes what `made` makes of the policy and the batch."""

    made: Callable[[Any, dict[str, Any]], dict[str, Any]]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        given = type(self).made(model, inputs)
        return model(**{"labels": inputs["labels"], **given}).loss


def _embedded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}


def _detached(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() for name, value in _embedded(model, inputs).items()}


def _filled(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "past_key_values": t.DynamicCache(config=model.config)}


@pytest.mark.parametrize(
    ("name", "made"),
    [("inputs_embeds", _embedded), ("inputs_embeds", _detached), ("past_key_values", _filled)],
)
def test_what_the_policy_has_computed_is_refused(name: str, made: Any) -> None:
    class Given(Embeds):
        pass

    Given.made = staticmethod(made)
    with pytest.raises(ValueError, match=f"got {name}, which the policy has computed; pass inp"):
        k.step(k.llama(), k.llama(1), cls=Given)
    Given.made = staticmethod(lambda model, x: {"input_ids": x["input_ids"]})  # as advised
    wanted, _ = k.truth(k.llama(), k.llama(1))
    assert k.step(k.llama(), k.llama(1), cls=Given).kl == pytest.approx(wanted, rel=CLOSE)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("cls", [t.Trainer, k.NoLogits])
def test_an_adapter_on_the_head_is_in_the_kl_and_gets_its_gradient(cls: type, dora: bool) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"], use_dora=dora
    )
    policy = k.shaken(peft.get_peft_model(k.llama(), config))
    ref = k.llama(1)
    wanted, grads = k.truth(policy, ref, "ref_policy")
    cache = TopKReference.make(ref, k.IDS.tolist(), k=k.VOCABULARY)
    for given in (ref, cache):
        found = k.step(copy.deepcopy(policy), given, "ref_policy", cls=cls)
        assert found.kl == pytest.approx(wanted, rel=CLOSE)
        if cls is k.NoLogits:
            assert any("lm_head" in name for name in found.grads)
            assert k.error(found.grads, grads, 0.5) < 1e-3
    wanted, _ = k.truth(policy, k.llama())  # the base model
    assert k.step(policy, None, cls=cls).kl == pytest.approx(wanted, rel=CLOSE)


def test_a_factor_that_the_user_froze_stays_frozen() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    policy = k.shaken(peft.get_peft_model(k.llama(), config))
    for name, p in policy.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in policy.named_parameters()}
    k.step(policy, None)
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == flags


def test_four_bit_layers_have_their_gradient_after_the_reference_ran() -> None:
    """On a CPU bitsandbytes' have none after a forward in eval mode without one."""
    base = k.llama()
    for layer in base.model.layers:
        layer.self_attn.q_proj = FourBit(layer.self_attn.q_proj, torch.bfloat16)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    policy = k.shaken(peft.get_peft_model(base, config)).train()
    for _ in range(2):
        found = k.step(policy, None)
    assert any("layers.0" in name for name in found.grads)
    assert not any(m.laid_out_anew for m in policy.modules() if isinstance(m, FourBit))
    assert all(m.training for m in policy.modules())


def test_classes_without_logits_of_tokens_are_refused() -> None:
    model = t.LlamaForSequenceClassification(t.LlamaConfig(**SIZES))
    with pytest.raises(TypeError, match="got LlamaForSequenceClassification; pass one of the"):
        FullKL(k.trainer(model), k.llama(), 0.5)
    with pytest.raises(TypeError, match="got Linear; pass one of the classes"):
        FullKL(k.trainer(k.llama()), nn.Linear(2, 2), 0.5)
