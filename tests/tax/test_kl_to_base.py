"""The KL of a whole model to its base: what counts, what the models are given, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.tax import kl_to_base
from tests.tools.models import causal_lm


def test_kl_to_base() -> None:
    base: Any = causal_lm("llama")
    model: Any = causal_lm("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.train()
    ids = torch.randint(3, 20, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:] = 0, 0
    got = kl_to_base(model, base, [ids, {"input_ids": ids, "attention_mask": mask}])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    values = []
    with torch.no_grad():
        model.eval()
        for real in (torch.ones_like(mask), mask):
            x, y = (
                m(input_ids=ids, attention_mask=real).logits.double().log_softmax(-1)
                for m in (model, base)
            )
            kl = (x.exp() * (x - y)).sum(-1)[:, :-1]
            values.append(kl[(real[:, 1:] * real[:, :-1]).bool()])
    assert got == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    assert kl_to_base(base, base, [ids]) == 0
    assert kl_to_base(model, base, [ids], kind="ref_policy") != got
    with pytest.raises(ValueError, match="followed by another"):
        kl_to_base(model, base, [ids[:, :1]])
    with pytest.raises(ValueError, match="input_ids"):
        kl_to_base(model, base, [{"labels": ids}])


class Anything(torch.nn.Module):
    """A wrapper as DistributedDataParallel."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class WithoutPositions(Anything):
    """A model that tells positions by itself, as with ALiBi."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.module(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("measure", [kl_to_base, fasttax.tax.kl_quadratic])
def test_documents_of_a_packed_row_are_texts_of_their_own(measure: Any) -> None:
    base: Any = causal_lm("llama")
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    one, other = torch.randint(3, 20, (1, 4)), torch.randint(3, 20, (1, 6))
    row = torch.cat((one, other), 1)
    places = torch.cat((torch.arange(4), torch.arange(6)))[None]
    # by tokens that predict another
    wanted = (3 * measure(model, base, [one]) + 5 * measure(model, base, [other])) / 8
    for batch in (
        {"input_ids": row, "position_ids": places},
        {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": places},
        {"input_ids": row, "cu_seqlens": torch.tensor([0, 4, 10])},
    ):
        assert measure(model, base, [batch]) == pytest.approx(wanted, rel=1e-4)
        if measure is kl_to_base:  # of a wrapped model, whose forward names no position_ids
            wrapped = torch.compile(model, backend="eager", dynamic=True), Anything(model)
            for outer in wrapped:
                assert measure(outer, base, [batch]) == pytest.approx(wanted, rel=1e-4)
    assert base.config.use_cache
    assert measure(model, base, [row]) != pytest.approx(wanted, rel=1e-2)


def test_positions_say_what_counts_where_the_model_takes_none() -> None:
    base: Any = causal_lm("llama")
    model, ids = copy.deepcopy(base), torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    places = torch.arange(6).expand(2, 6)
    for one in (model, WithoutPositions(model)):
        got = kl_to_base(one, WithoutPositions(base), [{"input_ids": ids, "position_ids": places}])
        assert got == pytest.approx(kl_to_base(model, base, [ids]), rel=1e-6)


def test_the_forwards_other_arguments_are_given_to_both() -> None:
    base: Any = causal_lm("gpt2")
    model, ids = copy.deepcopy(base), torch.randint(3, 20, (2, 5))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    plain = {"input_ids": ids, "index": torch.arange(2), "labels": ids}
    typed = {**plain, "token_type_ids": torch.ones_like(ids)}
    assert kl_to_base(model, base, [plain]) == kl_to_base(model, base, [ids])
    assert kl_to_base(model, base, [typed]) != kl_to_base(model, base, [ids])


@pytest.mark.parametrize("measure", [kl_to_base, fasttax.tax.kl_quadratic])
def test_models_that_predict_no_next_token_are_refused(measure: Any) -> None:
    import transformers as t

    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    one = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    ids = torch.randint(3, 20, (2, 5))
    with pytest.raises(ValueError, match=r": expected a decoder language model, got T5.*FullKL"):
        measure(one, one, [ids])
    classifier = t.LlamaForSequenceClassification(causal_lm("llama").config)
    with pytest.raises(ValueError, match=r": expected a language model, of logits .*\[2, 2\]"):
        measure(classifier, classifier, [ids])


def test_wrong_calls_of_kl_to_base_are_named() -> None:
    base: Any = causal_lm("llama")
    model, ids = copy.deepcopy(base), torch.randint(3, 20, (3, 7))
    for measure in (kl_to_base, fasttax.tax.kl_both_ways, fasttax.tax.kl_quadratic):
        for batches, error, words in (
            (ids, TypeError, r"batches: expected an iterable of batches.*pass \[batch\]"),
            ({"input_ids": ids}, TypeError, r"batches: expected an iterable of batches"),
            ("text.txt", TypeError, r"batches: expected an iterable of batches"),
            ([{"input_ids": [[3, 4]]}], TypeError, r"input_ids: expected a torch.Tensor.*return_t"),
            ([ids[0]], ValueError, r"input_ids: expected shape \(N, T\)"),
            (
                [{"input_ids": ids, "attention_mask": torch.ones(3, 2)}],
                ValueError,
                r"attention_mask: expected shape \(N, T\), one for both",
            ),
            ([ids + 1000], IndexError, r"input_ids: expected values in \[0, 61\).*tokenizer"),
        ):
            with pytest.raises(error, match=rf"{measure.__name__}: .*{words}"):
                measure(model, base, batches)
        with pytest.raises(TypeError, match=r"base: expected a torch.nn.Module, got .*from_pretra"):
            measure(model, "org/model", [ids])
