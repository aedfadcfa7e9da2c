"""The quadratic form of the whole Fisher: the KL to second order, and the block Fisher's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax.tax import kl_quadratic, kl_to_base
from tests.tools.models import TokenModel, causal_lm, ids


def near(base: nn.Module, by: float) -> nn.Module:
    model = copy.deepcopy(base)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama_tied"])
def test_is_the_kl_to_second_order(kind: str) -> None:
    base = causal_lm(kind).double().eval()
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    batches = [ids(2, 7), {"input_ids": ids(3, 8), "attention_mask": mask}]
    off = []
    for by in (1e-3, 5e-4):
        model = near(base, by)
        quadratic = kl_quadratic(model, base, batches)
        off.append(abs(quadratic / kl_to_base(model, base, batches) - 1))
    assert off[1] < 0.02
    assert off[1] < 0.75 * off[0]  # the next order
    assert kl_quadratic(base, base, batches) == 0
    assert base.training is False


def test_is_the_form_of_the_enumerated_fisher() -> None:
    base = TokenModel(vocab=7, width=4).double()
    model, x = near(base, 0.1), ids(1, 4, vocab=7)
    params = dict(base.named_parameters())
    change = {n: p - params[n] for n, p in model.named_parameters()}
    total = 0.0
    for t in range(3):

        def log_probs(logits: Tensor, t: int = t) -> Tensor:
            return logits[0, t].log_softmax(-1)

        log_p = log_probs(base(x).logits)
        for v in range(7):
            grads = torch.autograd.grad(log_probs(base(x).logits)[v], list(params.values()))
            along = sum(float((g * d).sum()) for g, d in zip(grads, change.values(), strict=True))
            total += float(log_p[v].detach().exp()) * along**2 / 2
    assert kl_quadratic(model, base, [x]) == pytest.approx(total / 3, rel=1e-5)


def test_a_change_below_the_bases_precision() -> None:
    """Of float32 weights and a bfloat16 base: a 50th of the base's last place is still a change."""
    base = causal_lm("llama", torch.bfloat16)
    wide = copy.deepcopy(base).float()
    x = ids(3, 8)
    for by in (1e-3, 1e-5):
        model = near(wide, by)
        expected = kl_quadratic(model, wide, [x])
        assert kl_quadratic(model, base, [x]) == pytest.approx(expected, rel=0.1)


class _Merging(TokenModel):
    """As loralib's layers do: eval() merges an update into the weights, train() takes it out."""

    def train(self, mode: bool = True) -> Any:
        if mode is not self.training:
            with torch.no_grad():
                self.up.weight.add_(-0.1 if mode else 0.1)
        return super().train(mode)


def test_a_model_that_does_more_in_eval_is_left_as_it_was() -> None:
    model, base = _Merging(), TokenModel()
    before = model.up.weight.detach().clone()
    kl_to_base(model, base, [ids(1, 4)])
    assert model.training
    assert torch.equal(model.up.weight, before)
    normed = TokenModel()  # whose weight's norm is iterated at every look in train mode
    torch.nn.utils.parametrizations.spectral_norm(normed.up)
    vectors = {name: t.clone() for name, t in normed.named_buffers()}
    kl_to_base(normed, base, [ids(1, 4)])
    assert vectors
    assert all(torch.equal(t, vectors[name]) for name, t in normed.named_buffers())


def test_wrong_calls() -> None:
    base = causal_lm("llama")
    with pytest.raises(ValueError, match=r"kl_quadratic: model: expected a model of base"):
        kl_quadratic(causal_lm("gpt2"), base, [ids(1, 4)])
    with pytest.raises(ValueError, match=r"kl_quadratic: batches: expected a token"):
        kl_quadratic(base, base, [ids(2, 1)])
    with pytest.raises(ValueError, match="input_ids"):
        kl_quadratic(base, base, [{"labels": ids(2, 3)}])


class _NoTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return d


def test_an_op_without_forward_mode_is_named() -> None:
    class Odd(TokenModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = _NoTangent.apply(output.logits)
            return output

    base = Odd()
    with pytest.raises(NotImplementedError, match=r"kl_quadratic: base: .*forward-mode.* Odd"):
        kl_quadratic(near(base, 0.1), base, [ids(1, 4)])
