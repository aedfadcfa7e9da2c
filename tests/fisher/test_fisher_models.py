"""DiagonalFisher on every kind of model against the loop: encoders, OPT, Gemma, convolutions,
experts, LoRA, bare parameters.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import DiagonalFisher
from tests.tools.models import (
    HIDDEN,
    VOCAB,
    TokenModel,
    assert_exact,
    fisher_of,
    ids,
    loop,
    rows_of,
)

CE = nn.functional.cross_entropy
pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode, float64, with random norms and biases."""
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def hf(kind: str) -> Any:
    import transformers as t

    small = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    decoder = {
        **small,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    }
    gemma = {**decoder, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    makers: dict[str, Any] = {
        # learned positions, token types, a bias with two owners, tied
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**small)),
        "bert_decoder": lambda: t.BertLMHeadModel(t.BertConfig(**small, is_decoder=True)),
        "bert_classes": lambda: t.BertForSequenceClassification(
            t.BertConfig(**small, num_labels=5)
        ),
        "gpt2_classes": lambda: t.GPT2ForSequenceClassification(
            t.GPT2Config(
                vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=4, num_labels=3, pad_token_id=0
            )
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                ffn_dim=44,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                word_embed_proj_dim=16,
                pad_token_id=1,
            )
        ),
        # scaled embedding, tied, norms around zero
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**{**decoder, "head_dim": 8})),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**gemma, final_logit_softcapping=4.0)),
        # fused 3-D experts
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**decoder, num_local_experts=4, num_experts_per_tok=2)
        ),
        # one table in two embeddings and the head
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=VOCAB,
                d_model=HIDDEN,
                d_kv=8,
                d_ff=44,
                num_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)
        ),
    }
    torch.manual_seed(1)
    model: Any = shaken(makers[kind]())
    model.config._attn_implementation = "eager" if kind == "gemma2" else "sdpa"
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    return model


@pytest.mark.parametrize("kind", ["bert", "bert_decoder", "opt", "gemma", "gemma2", "mixtral"])
def test_transformers(kind: str) -> None:
    model, x = hf(kind), ids(3, 9)
    # Gemma's norm and embedding scale are float32's
    bound = 3e-6 if kind.startswith("gemma") else 1e-10
    assert_exact(fisher_of(model, x), loop(model, rows_of(x)), bound)
    single, truth = hf(kind).float(), loop(model, rows_of(x))
    assert_exact(fisher_of(single, x), truth)


@pytest.mark.parametrize("kind", ["bert", "bert_classes", "gpt2_classes", "opt", "gemma"])
def test_transformers_padded(kind: str) -> None:
    model, x = hf(kind), ids(3, 9)
    mask = torch.ones_like(x)
    for n, length in enumerate((9, 5, 2)):
        x[n, length:], mask[n, length:] = model.config.pad_token_id, 0
    batch = {"input_ids": x, "attention_mask": mask}
    if kind.endswith("classes"):
        y = torch.tensor([0, 2, 1])
        truth = loop(
            model,
            [({k: v[n : n + 1] for k, v in batch.items()}, y[n : n + 1]) for n in range(3)],
            CE,
        )
        assert_exact(fisher_of(model, {**batch, "labels": y}), truth, 1e-10)
        return
    examples = [
        ({"input_ids": x[n : n + 1, :m], "attention_mask": mask[n : n + 1, :m]}, x[n : n + 1, :m])
        for n, m in enumerate((9, 5, 2))
    ]
    assert_exact(fisher_of(model, batch), loop(model, examples), 3e-6 if kind == "gemma" else 1e-10)


@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens"])
@pytest.mark.parametrize("kind", ["gemma", "mixtral", "opt"])
def test_transformers_packed(kind: str, how: str) -> None:
    """Attention keeps the documents apart by their positions; OPT's does not, which is an error."""
    model, x = hf(kind), ids(1, 11)
    cuts = [0, 4, 11]
    documents = [x[:, a:b] for a, b in itertools.pairwise(cuts)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    batch |= (
        {"position_ids": positions} if how == "position_ids" else {"cu_seqlens": torch.tensor(cuts)}
    )
    if kind == "opt":
        with pytest.raises(ValueError, match=r"do not see each other.*one document a row"):
            fisher_of(model, batch)
        return
    truth = loop(model, [({"input_ids": d}, d) for d in documents])
    assert_exact(fisher_of(model, batch), truth, 3e-6 if kind == "gemma" else 1e-10)
    if how == "cu_seqlens":
        assert_exact(
            fisher_of(model, batch, fallback="loop"), truth, 3e-6 if kind == "gemma" else 1e-10
        )


def test_t5_by_observe() -> None:
    """Encoder and decoder of different lengths; both and the head use the shared table."""
    model, x, y = hf("t5"), ids(2, 7), ids(2, 4, seed=9)
    for block in (
        model.encoder.block[0],
        model.decoder.block[0],
    ):  # once for the whole batch: no example's own
        block.layer[0].SelfAttention.relative_attention_bias.requires_grad_(False)
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        CE(
            model(input_ids=x, labels=y).logits.flatten(0, 1), y.flatten(), reduction="sum"
        ).backward()
    truth = loop(
        model,
        [({"input_ids": x[n : n + 1], "labels": y[n : n + 1]}, y[n : n + 1]) for n in range(2)],
        lambda logits, label: CE(logits[0], label[0], reduction="sum"),
    )
    assert_exact(estimator.finalize("sum"), truth, 1e-10)


class ConvNet(nn.Module):
    """Strided, padded, dilated, grouped, depthwise and transposed convolutions, a group norm, a
    batch norm in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        first = [
            nn.Conv2d(3, 8, 3, padding=1, stride=2),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2, padding="same"),
        ]
        second = [
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 3, dilation=2, padding=2, padding_mode="circular"),
            nn.ConvTranspose2d(6, 4, 2),
        ]
        self.body = nn.Sequential(*first, *second)
        self.line = nn.Conv1d(4, 5, 3, stride=2)
        self.out = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.line(self.body(x).flatten(2)).mean(-1))


def test_conv_net() -> None:
    model, x, y = (
        shaken(ConvNet()),
        torch.randn(4, 3, 8, 8, dtype=torch.float64),
        torch.tensor([0, 3, 6, 1]),
    )
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        CE(model(x), y, reduction="sum").backward()
    truth = loop(model, [({"x": x[n : n + 1]}, y[n : n + 1]) for n in range(4)], CE)
    assert_exact(estimator.finalize("sum"), truth, 1e-11)
    model.train()
    with pytest.raises(ValueError, match=r"batch.*model.eval\(\)"):
        DiagonalFisher(model)


@pytest.mark.parametrize("labels", ["true", "sample"])
def test_images_by_update(labels: str) -> None:
    """pixel_values in place of ids; labels are needed only where they are not drawn."""
    import transformers as t

    config = t.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model, x, y = (
        shaken(t.ViTForImageClassification(config)),
        torch.randn(3, 3, 8, 8, dtype=torch.float64),
        torch.tensor([0, 2, 1]),
    )
    inner = [
        n
        for n, _ in model.named_parameters()
        if "embeddings.cls" not in n and "embeddings.position" not in n
    ]
    batch: Any = {"pixel_values": x, "labels": y} if labels == "true" else {"pixel_values": x}
    if labels == "sample":
        assert fisher_of(model, batch, labels="sample", params=inner).metadata["examples"] == 3
        with pytest.raises(ValueError, match=r"labels.*\(B,\)"):
            fisher_of(model, batch)
        return
    truth = loop(model, [({"pixel_values": x[n : n + 1]}, y[n : n + 1]) for n in range(3)], CE)
    assert_exact(fisher_of(model, batch), truth, 1e-10)


def test_mlp() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        CE(model(x), y, reduction="sum").backward()
    assert_exact(
        estimator.finalize("sum"),
        loop(model, [({"input": x[n : n + 1]}, y[n : n + 1]) for n in range(5)], CE),
        1e-11,
    )


class Experts(nn.Module):
    """Top-1 routing of single tokens to experts that are modules; expert 3 gets none."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.router = flat, nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)) for _ in range(4)
        )

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        rows = h.reshape(-1, h.shape[-1])
        logits = self.router(rows)
        weight, choice = logits.softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mine = (choice == e).nonzero().flatten()
            if len(mine):
                out.index_add_(0, mine, expert(rows[mine]) * weight[mine, None])
        return (out if self.flat else out.view_as(h)), logits


class Routed(TokenModel):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.moe = Experts(flat)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        h = self.embed(input_ids)
        inner, _ = self.moe(h.flatten(0, 1) if self.moe.flat else h)
        return SimpleNamespace(logits=self.head(self.last(h + inner.view_as(h))))


@pytest.mark.parametrize("flat", [True, False], ids=["rows", "batch"])
def test_experts_that_are_modules(flat: bool) -> None:
    model, x = Routed(flat).double(), ids(3, 7)
    truth = loop(model, rows_of(x))
    assert_exact(fisher_of(model, x), truth, 1e-11)
    assert not fisher_of(model, x)["moe.experts.3.0.weight"].any()
    packed = {"input_ids": x.view(1, -1), "cu_seqlens": torch.tensor([0, 7, 14, 21])}
    assert_exact(fisher_of(model, packed), truth, 1e-11)
    assert "forward" not in model.moe.__dict__
    with pytest.raises(ValueError, match=r"experts.*unit='token'"):
        fisher_of(model, x, unit="token", verify=False)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.tensor(0.7)), nn.Linear(16, 16)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h * self.gain).tanh()


class WithBare(TokenModel):
    """A bare parameter beside a child, a GRU, and multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.bare, self.rnn = Bare(), nn.GRU(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        h = self.rnn(self.bare(self.embed(input_ids)))[0]
        h = (
            h
            + self.attention(
                h,
                h,
                h,
                need_weights=False,
                is_causal=True,
                attn_mask=torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1),
            )[0]
        )
        return SimpleNamespace(logits=self.head(self.last(h)))


def test_bare_parameters_recurrent_cells_and_attention() -> None:
    model, x = WithBare().double(), ids(3, 6)
    assert_exact(fisher_of(model, x), loop(model, rows_of(x)), 1e-11)


# --- LoRA -----------------------------------------------------------------------------------------


def adapted(kind: str = "llama", **options: Any) -> nn.Module:
    import peft

    from tests.tools.models import causal_lm

    torch.manual_seed(0)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2_untied": ["c_attn", "wte"]}[kind]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights=False,
        fan_in_fan_out=kind != "llama",
        **options,
    )
    return peft.get_peft_model(causal_lm(kind).double(), config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2_untied"])
def test_lora_factors_and_delta_w(kind: str) -> None:
    model, x = adapted(kind), ids(3, 7)
    factors = {n for n, p in model.named_parameters() if p.requires_grad}
    assert_exact(fisher_of(model, x), loop(model, rows_of(x)), 1e-10)
    out = fisher_of(model, x, lora="delta_w")
    assert set(out) == {n.partition(".lora_")[0] + ".base_layer.weight" for n in factors}
    assert out.metadata["lora"] == "delta_w"
    for n, p in model.named_parameters():
        p.requires_grad_(n in out)
    assert_exact(out, loop(model, rows_of(x)), 1e-10)


class Packed(nn.Module):
    """A 4-bit linear layer in outline: codes of another shape and dtype than the weight they stand
    for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 7
        codes = (linear.weight.detach() / self.scale).round().clamp(-7, 7).to(torch.int8) + 8
        self.weight = nn.Parameter(
            (codes.flatten()[::2] * 16 + codes.flatten()[1::2]).to(torch.uint8)[:, None],
            requires_grad=False,
        )

    def dense(self) -> Tensor:
        high, low = self.weight[:, 0] // 16, self.weight[:, 0] % 16
        return (
            torch.stack((high, low), -1)
            .flatten()
            .view(self.out_features, self.in_features)
            .double()
            - 8
        ) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype))


class Adapter(nn.Module):
    def __init__(self, base: nn.Module, i: int, o: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"default": nn.Linear(i, 2, bias=False)}),
            nn.ModuleDict({"default": nn.Linear(2, o, bias=False)}),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def test_delta_w_of_a_packed_base() -> None:
    """Only the base layer's input and output gradient are needed: its weight may be packed."""
    model: Any = TokenModel()
    x = ids(3, 6)
    packed = Packed(model.up)
    model.up = Adapter(packed, 16, 20)
    model = model.double().requires_grad_(False)
    for p in (model.up.lora_A["default"].weight, model.up.lora_B["default"].weight):
        p.requires_grad_(True)
    out = fisher_of(model, x, lora="delta_w")
    dense = nn.Linear(16, 20, bias=False).double()
    dense.weight.data.copy_(packed.dense())
    model.up.base_layer = dense
    model.requires_grad_(False)
    dense.weight.requires_grad_(True)
    truth = loop(model, rows_of(x))
    assert_exact(out, truth, 1e-6)  # a packed weight's sum is float32


def test_delta_w_refusals() -> None:
    with pytest.raises(ValueError, match=r"lora.*delta_w.*lora='factors'"):
        DiagonalFisher(TokenModel(), lora="delta_w")
    with pytest.raises(ValueError, match=r"lora.*q_proj"):
        DiagonalFisher(adapted(use_dora=True), lora="delta_w")


def test_mlm_labels_in_place() -> None:
    """shift=False: the label of a token is its own, as a masked language model has it."""
    model, x = hf("bert"), ids(2, 6)
    labels = torch.full_like(x, -100)
    labels[:, 2:4] = x[:, 2:4]
    truth = loop(
        model,
        [({"input_ids": x[n : n + 1]}, labels[n : n + 1]) for n in range(2)],
        lambda z, y: CE(z[0], y[0], reduction="sum"),
    )
    assert_exact(fisher_of(model, {"input_ids": x, "labels": labels}, shift=False), truth, 1e-10)
