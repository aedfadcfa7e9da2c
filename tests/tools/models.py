"""Tiny models of every architecture that has a rule of its own, and the oracles: a loop over single
examples, EWC by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from fasttax import DiagonalFisher

EXACT = 1e-5  # the contract: relative error of each parameter's Fisher against the loop
VOCAB, HIDDEN = 61, 32  # 61: a prime, no multiple of any tile or vector width

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(kind: str) -> Any:
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**_SIZES, tie_word_embeddings=False),  # GQA, RMSNorm, untied
        "llama_tied": lambda: t.LlamaConfig(**_SIZES, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**_SIZES, tie_word_embeddings=True),  # q/k/v biases
        # q/k norms: RMSNorm over (B, T, heads, 8)
        "qwen3": lambda: t.Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=False),
        # (1 + w) norms; its scaled embedding has no rule and is frozen
        "gemma": lambda: t.GemmaConfig(**_SIZES, head_dim=8, tie_word_embeddings=False),
        # Conv1D, LayerNorm, learned positions computed once a batch, tied
        "gpt2": lambda: t.GPT2Config(**_GPT2),
        "gpt2_untied": lambda: t.GPT2Config(**_GPT2, tie_word_embeddings=False),
        # parallel residual
        "neox": lambda: t.GPTNeoXConfig(
            **{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"},
            tie_word_embeddings=False,
        ),
    }[kind]()


ARCHITECTURES = ("llama", "llama_tied", "qwen2", "qwen3", "gemma", "gpt2", "gpt2_untied", "neox")


def causal_lm(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal LM in eval mode whose norms and biases are random, so that no gradient is zero or
    one by luck.
    """
    from transformers import AutoModelForCausalLM

    config = _config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = (
        "sdpa"  # eager in float64 makes NaN of left padding (finfo.min + score)
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    if kind == "gemma":
        model.get_input_embeddings().requires_grad_(False)
    return model


class TokenModel(nn.Module):
    """Embedding, RMSNorm, Linear, LayerNorm, head: no token sees another, so packed documents
    cannot leak into each other.
    """

    def __init__(
        self, tied: bool = False, vocab: int = VOCAB, width: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width, bias=False)
        self.last = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p) * 0.1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> SimpleNamespace:
        h = self.embed(input_ids)
        h = h + self.dropout(self.down(torch.tanh(self.up(self.norm(h)))))
        return SimpleNamespace(logits=self.head(self.last(h)))


def ids(B: int, T: int, vocab: int = VOCAB, seed: int = 3) -> Tensor:
    """Token ids from 3 on (0..2 are special), few enough that every row repeats some."""
    return torch.randint(3, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """SUM of -log p(next token) over one example; logits (1, T, V), labels (1, T) with -100 where
    nothing is predicted.
    """
    return nn.functional.cross_entropy(
        logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
    )


def squares(loss: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g**2
        for (n, p), g in zip(params.items(), grads, strict=True)
    }


def loop(
    model: nn.Module,
    examples: Iterable[tuple[dict[str, Any], Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss,
) -> dict[str, Tensor]:
    """Sum over examples of squared gradients, one forward and backward each; an example is (model
    arguments, labels).
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for inputs, labels in examples:
        for n, square in squares(loss(logits_of(model(**inputs)), labels), params).items():
            total[n] += square
    return total


def rows_of(input_ids: Tensor) -> list[tuple[dict[str, Any], Tensor]]:
    return [({"input_ids": row[None]}, row[None]) for row in input_ids]


def worst(out: Any, truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any parameter, and which; a parameter whose truth is 0 must be
    0.

    A gradient that is 0 on paper (a key's bias) is rounding noise: its square may be 1e3 eps^2 of
    the largest one's.
    """
    assert set(out) == set(truth), f"names differ: {sorted(set(out) ^ set(truth))}"
    noise = max(
        1e3 * min(torch.finfo(out[n].dtype).eps, 2**-23) ** 2 * float(truth[n].double().norm())
        for n in truth
    )
    errors = []
    for n, t in truth.items():
        size = float(t.double().norm())
        difference = float((out[n].double() - t.double()).norm())
        errors.append(
            (0.0 if size and difference <= noise else difference / size if size else difference, n)
        )
    return max(errors)


def ewc_compose(
    params: list[Tensor],
    anchors: list[Tensor],
    fishers: list[Tensor],
    strength: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The EWC penalty and its gradients by autograd in `dtype`."""
    leaves = [p.detach().to(dtype).requires_grad_() for p in params]
    terms = [
        (f.to(dtype) * (p - a.to(dtype)) ** 2).sum()
        for p, a, f in zip(leaves, anchors, fishers, strict=True)
    ]
    value = strength / 2 * torch.stack(terms).sum()
    return value.detach(), list(torch.autograd.grad(value, leaves))


def fisher_of(model: nn.Module, *batches: Any, **options: Any) -> fasttax.FisherEstimate:
    options.setdefault("labels", "true")
    estimator = DiagonalFisher(model, **options)
    for batch in batches:
        estimator.update(batch)
    return estimator.finalize(normalize="sum")


def assert_exact(out: Any, truth: dict[str, Tensor], bound: float = EXACT) -> None:
    error, name = worst(out, truth)
    assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"


def state_of(model: nn.Module) -> Any:
    return (
        {
            n: (p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
            for n, p in model.named_parameters()
        },
        [
            (
                n,
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
            )
            for n, m in model.named_modules()
        ],
        torch.get_rng_state(),
    )


def assert_same_state(model: nn.Module, before: Any) -> None:
    now = state_of(model)
    assert now[1] == before[1]
    assert torch.equal(now[2], before[2])
    for n, (flag, value, grad) in before[0].items():
        assert now[0][n][0] == flag
        assert torch.equal(now[0][n][1], value)
        assert (grad is None) == (now[0][n][2] is None)
        assert grad is None or torch.equal(now[0][n][2], grad)
