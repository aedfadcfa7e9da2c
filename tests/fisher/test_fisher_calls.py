"""DiagonalFisher leaves the model as it was, estimate_fisher, and the errors of wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import DiagonalFisher
from tests.tools.models import (
    VOCAB,
    TokenModel,
    assert_exact,
    assert_same_state,
    causal_lm,
    fisher_of,
    ids,
    loop,
    rows_of,
    state_of,
)
from tests.tools.utils import assert_says


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("backward fails")


@pytest.mark.parametrize("fails", ["nowhere", "forward", "backward"])
@pytest.mark.parametrize("fallback", [None, "loop"])
def test_model_is_as_before_also_after_an_exception(fails: str, fallback: str | None) -> None:
    model, x = TokenModel().train(), ids(2, 6)
    model.up.weight.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    model.register_forward_hook(lambda *_: None)
    estimator = DiagonalFisher(model, fallback=fallback)
    estimator.update(x)
    first = {n: estimator.sums.value(n).clone() for n in estimator.params}
    if fails == "forward":
        model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    if fails == "backward":
        model.up.register_forward_hook(lambda m, args, y: Fails.apply(y))
    before = state_of(model)
    if fails == "nowhere":
        estimator.update(x)
    else:
        with pytest.raises(ArithmeticError):
            estimator.update(x)
    assert_same_state(model, before)
    if fails == "forward":
        assert estimator.examples == 2
        assert all(torch.equal(estimator.sums.value(n), first[n]) for n in first)
    if fails == "backward" and fallback is None:
        with pytest.raises(RuntimeError, match="new DiagonalFisher"):  # half a batch is in the sums
            estimator.finalize()


def test_dropout_in_train_mode_warns() -> None:
    model = TokenModel(dropout=0.5).train()
    with pytest.warns(UserWarning, match=r"dropout.*model.eval\(\)"):
        DiagonalFisher(model, verify=False).update(ids(1, 4))


class _Trains(TokenModel):
    """Runs in train mode alone, as bitsandbytes' 4-bit layers of 32 inputs on a CPU."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            raise RuntimeError("shape '[32, 0]' is invalid for input of size 16")
        return super().forward(*args, **kwargs)


def test_a_model_that_does_not_run_in_eval_mode_is_told_from_a_wrong_batch() -> None:
    model, x = _Trains().train(), ids(2, 5)
    words = r"_Trains does not run on it in eval mode: RuntimeError: shape.*verify=False"
    with pytest.raises(ValueError, match=words):
        DiagonalFisher(model, labels="true").update(x)
    found = fisher_of(model, x, verify=False)  # as advised
    assert_exact(found, loop(model, rows_of(x)))
    with pytest.raises(ValueError, match=r"run on it in eval mode: .*inputs_embeds; give a"):
        DiagonalFisher(causal_lm("llama")).update({"input_ids": x, "inputs_embeds": x})


# --- estimate_fisher, finalize, wrong calls -------------------------------------------------------


def test_estimate_fisher_is_update_and_finalize(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = TokenModel(), ids(7, 5)
    out = fasttax.estimate_fisher(
        model, [x[:3], {"input_ids": x[3:]}], labels="true", max_examples=5, progress=False
    )
    assert capsys.readouterr().err == ""
    assert_exact(out, {n: f / 5 for n, f in fisher_of(model, x[:5]).items()})
    facts = {
        "labels": "true",
        "unit": "example",
        "examples": 5,
        "tokens": 20,
        "normalize": "mean",
        "storage": "fp32",
    }
    assert {k: out.metadata[k] for k in facts} == facts
    assert out.metadata["fasttax"] == fasttax.__version__
    fasttax.estimate_fisher(model, [x], progress=True)
    assert "Fisher" in capsys.readouterr().err
    packed = fasttax.estimate_fisher(model, [x], storage="u8log", progress=False)
    assert packed.metadata["storage"] == "u8log"


@pytest.mark.parametrize("how", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3, 4))])
def test_a_scripted_or_traced_model_by_the_loop(how: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 3)), (torch.randn(3, 4), torch.tensor([0, 2, 1]))
    want = fasttax.estimate_fisher(model, [batch], labels="true", progress=False)
    options: dict[str, Any] = {"labels": "true", "fallback": "loop", "progress": False}
    assert_exact(fasttax.estimate_fisher(how(model), [batch], **options), dict(want))


M, X = TokenModel(), ids(2, 4)
Errors = type[Exception] | tuple[type[Exception], ...]
WRONG: dict[str, tuple[Callable[[], Any], Errors, tuple[str, ...]]] = {
    "no module": (
        lambda: DiagonalFisher("gpt2"),
        TypeError,
        ("DiagonalFisher", "model", "torch.nn.Module", "gpt2"),
    ),
    "scripted": (
        lambda: DiagonalFisher(nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 2)))),
        ValueError,
        ("1.weight", "it is scripted", "fallback='loop'"),
    ),
    **{
        how.__name__: (
            partial(DiagonalFisher, how(nn.Sequential(nn.Linear(4, 2)), *given)),
            ValueError,
            ("0.weight", "it is scripted", "fallback='loop'"),
        )
        for how, given in ((torch.jit.script, ()), (torch.jit.trace, (torch.ones(3, 4),)))
    },
    "labels": (
        lambda: DiagonalFisher(M, labels="model"),
        ValueError,
        ("labels", "'sample'", "'true'", "'model'"),
    ),
    "unit": (
        lambda: DiagonalFisher(M, unit="row"),
        ValueError,
        ("unit", "'example'", "'token'", "'batch'", "'row'"),
    ),
    "batch true": (
        lambda: DiagonalFisher(M, unit="batch", labels="true"),
        ValueError,
        ("labels", "'sample'", "biased"),
    ),
    "tied": (
        lambda: DiagonalFisher(M, tied="no"),
        ValueError,
        ("tied", "'exact'", "'sum_of_squares'"),
    ),
    "fallback": (
        lambda: DiagonalFisher(M, fallback="slow"),
        ValueError,
        ("fallback", "'loop'", "'slow'"),
    ),
    "pattern": (
        lambda: DiagonalFisher(M, params=["heads.*"]),
        ValueError,
        ("params", "heads.*", "named_parameters"),
    ),
    "nothing": (
        lambda: DiagonalFisher(M, params=lambda n, p: False),
        ValueError,
        ("params", "at least one", "requires_grad_(True)"),
    ),
    "no ids": (
        lambda: DiagonalFisher(M).update({"tokens": X}),
        ValueError,
        ("update", "input_ids", "tokens"),
    ),
    "no batch": (
        lambda: DiagonalFisher(M).update([1, 2]),
        TypeError,
        ("update", "batch", "input_ids"),
    ),
    "floats": (
        lambda: DiagonalFisher(M).update(X.float()),
        TypeError,
        ("input_ids", "int64", "float32"),
    ),
    "vector": (
        lambda: DiagonalFisher(M).update(X[0]),
        ValueError,
        ("input_ids", "(examples, tokens)", "(4,)"),
    ),
    "mask shape": (
        lambda: DiagonalFisher(M).update({"input_ids": X, "attention_mask": X[:, :2]}),
        ValueError,
        ("attention_mask", "(2, 4)", "(2, 2)"),
    ),
    "labels shape": (
        lambda: DiagonalFisher(M).update({"input_ids": X, "labels": X[:, :2]}),
        ValueError,
        ("labels", "(2, 4)", "(2, 2)"),
    ),
    "labels range": (
        lambda: DiagonalFisher(M, labels="true").update({"input_ids": X, "labels": X + VOCAB}),
        (ValueError, IndexError),
        ("labels", str(VOCAB)),
    ),
    "mask of answers": (
        lambda: DiagonalFisher(M).update({"input_ids": X, "assistant_masks": X > 3}),
        ValueError,
        ("labels", "assistant_masks, which no model", "masked_fill(assistant_masks == 0, -100)"),
    ),
    "cu": (
        lambda: DiagonalFisher(M).update({"input_ids": X[:1], "cu_seqlens": torch.tensor([0, 3])}),
        ValueError,
        ("cu_seqlens", "0 to 4", "[0, 3]"),
    ),
    "early finalize": (
        lambda: DiagonalFisher(M).finalize(),
        RuntimeError,
        ("finalize", "update(batch)"),
    ),
    "normalize": (
        lambda: fasttax.estimate_fisher(M, [X], normalize="max", progress=False),
        ValueError,
        ("normalize", "'mean'", "'sum'", "'max'"),
    ),
    "storage": (
        lambda: fasttax.estimate_fisher(M, [X], storage="int4", progress=False),
        ValueError,
        ("storage", "'u8log'", "'int4'"),
    ),
    "one batch": (
        lambda: fasttax.estimate_fisher(M, X, progress=False),
        TypeError,
        ("batches", "iterable", "[batch]"),
    ),
    "no batches": (
        lambda: fasttax.estimate_fisher(M, [], progress=False),
        ValueError,
        ("batches", "at least one", "empty"),
    ),
    "max": (
        lambda: fasttax.estimate_fisher(M, [X], max_examples=0),
        ValueError,
        ("max_examples", ">= 1", "0"),
    ),
    "no group": (lambda: DiagonalFisher(M).reduce(), ValueError, ("reduce", "init_process_group")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(call, error, words)


def test_ids_of_another_tokenizer_are_named() -> None:
    with pytest.raises(ValueError, match=rf"input_ids.*\[0, {VOCAB}\).*tokenizer"):
        DiagonalFisher(causal_lm("llama")).update(ids(1, 4) + VOCAB)


@pytest.mark.parametrize("labels", ["sample", "true", "exact_head"])
def test_rows_of_one_token_predict_nothing(labels: str) -> None:
    """They are examples whose gradient is 0, beside others; alone they are no estimate."""
    model, two = causal_lm("llama"), ids(2, 7)
    single = DiagonalFisher(model, labels=labels)
    single.update(two)
    mixed = DiagonalFisher(model, labels=labels)
    for batch in (two, two[:, :1]):
        mixed.update(batch)
    assert_exact(mixed.finalize("sum"), dict(single.finalize("sum")))
    assert (mixed.examples, mixed.tokens) == (4, 12)


@pytest.mark.parametrize("fallback", [None, "loop"])
def test_nothing_to_predict_is_no_fisher_of_zeros(fallback: Any) -> None:
    model, x = causal_lm("llama"), ids(2, 5)
    for batch in (
        x[:, :1],
        {"input_ids": x, "labels": torch.full_like(x, -100)},
        {"input_ids": x, "attention_mask": torch.zeros_like(x)},
    ):
        with pytest.raises(RuntimeError, match=r"none of 2 examples has a prediction that counts"):
            fisher_of(model, batch, labels="true", fallback=fallback)


def test_a_tokenizers_lists_and_a_model_without_values() -> None:
    model, lists = causal_lm("llama"), {"input_ids": [[3, 4]], "attention_mask": [[1, 1]]}
    for batch in (lists, {"input_ids": np.ones((1, 2), int)}):
        with pytest.raises(ValueError, match=r"lists of .*input_ids; tokenizer.*return_tensors="):
            DiagonalFisher(model).update(batch)
    with pytest.raises(
        ValueError, match=r"model: expected parameters that hold values.*meta; load"
    ):
        DiagonalFisher(model.to("meta"))


@pytest.mark.parametrize("verify", [False, True])
def test_factors_of_one_parameter_are_named_with_a_way_out(verify: bool) -> None:
    """No module that holds them computes with them: torch's error said nothing of that."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.down_proj.weight"],
        init_lora_weights=False,
    )
    model, x = peft.get_peft_model(causal_lm("llama").double(), config).eval(), ids(2, 5)
    with pytest.raises(ValueError, match=r"target_parameters\); pass fallback='loop'"):
        fisher_of(model, x, verify=verify)
    truth = loop(model, rows_of(x))
    assert all(bool(t.any()) for t in truth.values())
    assert_exact(fisher_of(model, x, fallback="loop"), truth)


@pytest.mark.parametrize(
    ("swapped", "said"),
    [
        (lambda model, x: (model, x), r"got a int64 tensor.*; for one batch pass \[batch\]"),
        (lambda model, x: ([x], model), r"got TokenModel\(.*; the model comes first"),
        (lambda model, x: (model, ["text"]), "a tokenizer's dict.*, got 'text'"),
    ],
)
def test_batches_that_are_none(swapped: Callable[[Any, Tensor], Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"^[^\n]*{said}[^\n]*$"):
        fasttax.estimate_fisher(*swapped(TokenModel(), ids(2, 4)), progress=False)
