"""DiagonalFisher against a loop over single examples with autograd, on every architecture and every
kind of batch.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import DiagonalFisher
from tests.tools.models import (
    ARCHITECTURES,
    EXACT,
    VOCAB,
    TokenModel,
    assert_exact,
    assert_same_state,
    causal_lm,
    fisher_of,
    ids,
    loop,
    rows_of,
    squares,
    state_of,
    worst,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_the_loop(kind: str) -> None:
    model, x = causal_lm(kind), ids(3, 11)
    truth = loop(double(model), rows_of(x))
    own, _ = worst(loop(model, rows_of(x)), truth)
    assert_exact(fisher_of(model, x), truth, max(EXACT, 2 * own))
    # Gemma's norm computes in float32
    assert_exact(fisher_of(double(model), x), truth, 1e-6 if kind == "gemma" else 1e-11)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_nothing(kind: str, side: str) -> None:
    """Against unpadded single rows: padded tokens neither count nor leak."""
    model, T = causal_lm(kind).double(), 9
    lengths = (9, 5, 2)
    x, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    examples = []
    for n, length in enumerate(lengths):
        row = ids(1, length, seed=n)[0]
        place = slice(0, length) if side == "right" else slice(T - length, T)
        x[n, place], mask[n, place] = row, 1
        examples.append(({"input_ids": row[None]}, row[None]))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    assert_exact(
        fisher_of(model, {"input_ids": x, "attention_mask": mask, "position_ids": positions}),
        loop(model, examples),
        1e-10,
    )


def test_labels_of_minus_100_leave_tokens_out() -> None:
    model, x = causal_lm("llama").double(), ids(3, 8)
    labels = x.clone()
    labels[0, :5] = -100
    labels[1, ::2] = -100
    labels[2] = -100  # an example without any label counts as an example of gradient 0
    truth = loop(model, [({"input_ids": x[n : n + 1]}, labels[n : n + 1]) for n in range(3)])
    estimator = DiagonalFisher(model, labels="true")
    estimator.update({"input_ids": x, "labels": labels})
    assert_exact(estimator.finalize(normalize="sum"), truth, 1e-10)
    assert (estimator.examples, estimator.tokens) == (3, int((labels[:, 1:] != -100).sum()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens"])
def test_packed_documents_are_examples(how: str, tied: bool) -> None:
    model, x = TokenModel(tied).double(), ids(1, 12)
    cuts = [0, 4, 5, 12]  # one document of a single token: no prediction, gradient 0
    documents = [x[:, a:b] for a, b in itertools.pairwise(cuts)]
    extra = (
        {"position_ids": torch.cat([torch.arange(d.shape[1]) for d in documents])[None]}
        if how == "position_ids"
        else {"cu_seqlens": torch.tensor(cuts)}
    )
    estimator = DiagonalFisher(model, labels="true")
    estimator.update({"input_ids": x, **extra})
    assert_exact(
        estimator.finalize(normalize="sum"),
        loop(model, [({"input_ids": d}, d) for d in documents]),
        1e-11,
    )
    assert (estimator.examples, estimator.tokens) == (3, 3 + 0 + 6)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_gradient_checkpointing(kind: str) -> None:
    x = ids(2, 7)
    truth = loop(causal_lm(kind).double(), rows_of(x))
    for reentrant in (True, False):
        for params in (
            None,
            ["model.layers.*"],
        ):  # without the embedding, nothing before the first block asks for a gradient
            model = causal_lm(kind).double().train()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            out = fisher_of(model, x, params=params)
            assert_exact(out, {n: t for n, t in truth.items() if n in out}, 1e-10)


def test_bf16_model_accumulates_in_float32() -> None:
    """320 batches of one example: a bf16 sum would stop growing at 256 times its increment."""
    model, x = TokenModel().bfloat16(), ids(1, 6)
    estimator = DiagonalFisher(model, labels="true", verify=False)
    estimator.update(x)
    one = estimator.finalize(normalize="sum")
    for _ in range(319):
        estimator.update(x)
    many = estimator.finalize(normalize="sum")
    assert all(many[n].dtype == torch.float32 for n in many)
    assert_exact(many, {n: 320 * one[n] for n in one}, 1e-4)
    truth = loop(double(model), rows_of(x))
    own, _ = worst(loop(model, rows_of(x)), truth)
    assert_exact(one, truth, 2 * own)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (["head.weight"], {"head.weight"}),
        ("up.*", {"up.weight", "up.bias"}),
        (["up.*", "last.weight"], {"up.weight", "up.bias", "last.weight"}),
        (
            lambda name, p: p.dim() == 2 and "embed" not in name,
            {"up.weight", "down.weight", "head.weight"},
        ),
    ],
    ids=["name", "pattern", "list", "predicate"],
)
def test_params_filter(params: Any, expected: set[str]) -> None:
    model, x = TokenModel().double(), ids(2, 6)
    truth = loop(model, rows_of(x))
    assert_exact(fisher_of(model, x, params=params), {n: truth[n] for n in expected}, 1e-11)


def test_frozen_parameters_are_left_out() -> None:
    model, x = TokenModel().double(), ids(2, 6)
    model.embed.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    out = fisher_of(model, x)
    assert "embed.weight" not in out
    assert "up.bias" not in out
    assert_exact(out, loop(model, rows_of(x)), 1e-11)


def test_tied_sum_of_squares_is_the_two_uses_apart() -> None:
    model, x = TokenModel(tied=True).double(), ids(2, 6)
    apart = TokenModel(tied=True).double()
    apart.head.weight = nn.Parameter(apart.embed.weight.detach().clone())
    truth = loop(apart, rows_of(x))
    truth["embed.weight"] = truth["embed.weight"] + truth.pop("head.weight")
    assert_exact(fisher_of(model, x, tied="sum_of_squares", verify=False), truth, 1e-11)
    assert worst(fisher_of(model, x), truth)[0] > 1e-3  # the cross terms matter


def test_unit_token_and_batch() -> None:
    model, x = TokenModel().double(), ids(3, 5)
    single = [
        ({"input_ids": x[n : n + 1, t : t + 2]}, x[n : n + 1, t : t + 2])
        for n in range(3)
        for t in range(4)
    ]
    out = fisher_of(model, x, unit="token")
    # no token sees another: each prediction is an example
    assert_exact(out, loop(model, single), 1e-11)
    seed = torch.Generator().manual_seed(5)
    estimator = DiagonalFisher(model, unit="batch", generator=seed, verify=False)
    state = seed.get_state()
    estimator.update(x)
    drawn = drawn_labels(model, x, state)
    logp = model(x).logits.log_softmax(-1)[:, :-1]
    loss = -logp.gather(-1, drawn[:, :-1, None]).sum()
    assert_exact(
        estimator.finalize(normalize="sum"), squares(loss, dict(model.named_parameters())), 1e-11
    )
    assert fisher_of(model, x, unit="token").metadata["unit"] == "token"


def drawn_labels(model: nn.Module, x: Tensor, state: Tensor) -> Tensor:
    """The labels that the estimator draws from a generator in `state`: inverse transform of one
    uniform a token.
    """
    generator = torch.Generator()
    generator.set_state(state)
    p = model(x).logits.detach().softmax(-1)
    u = torch.rand(p.shape[:-1], dtype=p.dtype, generator=generator)
    return (
        (p.cumsum(-1) < u[..., None] * p.sum(-1, keepdim=True)).sum(-1).clamp_max(p.shape[-1] - 1)
    )


def test_sampled_labels_average_to_the_enumerated_fisher() -> None:
    """Mean over 4000 draws within 5 standard errors of E_y over all 5^2 labels of two predictions,
    parameter by parameter.
    """
    model, x, draws = TokenModel(vocab=5, width=4).double(), torch.tensor([[3, 4, 3]]), 4000
    params = dict(model.named_parameters())
    truth = {n: torch.zeros_like(p) for n, p in params.items()}
    logp = model(x).logits.log_softmax(-1)[0]
    for first in range(5):
        for second in range(5):
            loss = logp[0, first] + logp[1, second]
            for n, square in squares_kept(loss, params).items():
                truth[n] += float(loss.detach().exp()) * square
    estimator = DiagonalFisher(model, generator=torch.Generator().manual_seed(7))
    parts = 40  # batches: their spread gives the standard error
    means = []
    for _ in range(parts):
        before = {n: estimator.sums.value(n).clone() for n in params}
        estimator.update(x.expand(draws // parts, -1))
        means.append({n: (estimator.sums.value(n) - before[n]) / (draws // parts) for n in params})
    for n in params:
        batch = torch.stack([m[n] for m in means])
        standard_error = batch.std(0) / parts**0.5
        off = (batch.mean(0) - truth[n]).abs() / (standard_error + 1e-12)
        assert float(off.max()) < 5, f"{n}: {float(off.max()):.1f} standard errors"
        # and the total over the tensor, where the errors average out, is right to 20 %: a scale
        # error cannot hide
        assert float(batch.mean(0).sum()) == pytest.approx(float(truth[n].sum()), rel=0.2)


def squares_kept(loss: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g**2
        for (n, p), g in zip(params.items(), grads, strict=True)
    }


def test_generator_makes_it_reproducible_and_global_rng_is_untouched() -> None:
    model, x = TokenModel(), ids(2, 6)
    before = torch.get_rng_state()
    runs = [
        fisher_of(model, x, labels="sample", generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    default = [fisher_of(model, x, labels="sample") for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert any(not torch.equal(runs[0][n], runs[2][n]) for n in runs[0])
    assert all(torch.equal(default[0][n], default[1][n]) for n in default[0])


# --- observe, classifier, fallback, refusals ------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "llama_tied"])
def test_observe_equals_update(kind: str) -> None:
    model, x = TokenModel() if kind == "token" else causal_lm(kind), ids(3, 7)
    update, observed = DiagonalFisher(model, labels="true"), DiagonalFisher(model, labels="true")
    update.update(x)
    before = state_of(model)
    with observed.observe():
        logits = model(x).logits
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum"
        ).backward()
    assert_same_state(model, before)
    assert observed.examples == 3
    assert_exact(observed.finalize("sum"), dict(update.finalize("sum")), 1e-5)
    with pytest.raises(RuntimeError, match="observe"), observed.observe():
        pass


def test_observe_packed() -> None:
    model, x, cu = TokenModel().double(), ids(1, 9), torch.tensor([0, 4, 9])
    estimator = DiagonalFisher(model)
    with estimator.observe(cu_seqlens=cu):
        logits = model(x).logits
        loss: Any = sum(
            nn.functional.cross_entropy(logits[0, a : b - 1], x[0, a + 1 : b], reduction="sum")
            for a, b in ((0, 4), (4, 9))
        )
        loss.backward()
    assert_exact(
        estimator.finalize("sum"),
        loop(model, [({"input_ids": x[:, a:b]}, x[:, a:b]) for a, b in ((0, 4), (4, 9))]),
        1e-11,
    )


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.score = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score(torch.tanh(self.body(self.embed(input_ids))).mean(1))


def test_classifier() -> None:
    model, x, y = Classifier().double(), ids(5, 6), torch.tensor([0, 3, 1, 1, 2])
    truth = loop(
        model,
        [({"input_ids": x[n : n + 1]}, y[n : n + 1]) for n in range(5)],
        lambda logits, label: nn.functional.cross_entropy(logits, label),
    )
    assert_exact(fisher_of(model, {"input_ids": x, "labels": y}), truth, 1e-11)


class Odd(TokenModel):
    """A bare parameter of the model itself, which no tap has a rule for, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.conv = nn.Conv2d(1, 1, 1, bias=False)  # a bias on all logits has no gradient

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        out = super().forward(input_ids)
        out.logits = self.conv((out.logits * self.scale)[:, None])[:, 0]
        return out


def test_unsupported_parameters_are_named_and_the_loop_covers_them() -> None:
    model, x = Odd().double(), ids(3, 6)
    with pytest.raises(ValueError) as caught:
        DiagonalFisher(model)
    for word in ("scale", "Odd", "params=", "fallback='loop'"):
        assert word in str(caught.value)
    assert_exact(fisher_of(model, x, fallback="loop"), loop(model, rows_of(x)), 1e-11)
    plain = [n for n, _ in model.named_parameters() if n != "scale"]
    truth = loop(model, rows_of(x))
    assert_exact(fisher_of(model, x, params=plain), {n: truth[n] for n in plain}, 1e-11)


def test_a_weight_used_outside_its_module_is_caught() -> None:
    class Borrows(TokenModel):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            out = super().forward(input_ids)
            h = nn.functional.embedding(input_ids, self.embed.weight)
            out.logits = out.logits + nn.functional.linear(
                nn.functional.linear(h, self.up.weight), self.head.weight[:, :1].expand(-1, 20)
            )
            return out

    model, x = Borrows(), ids(2, 6)
    with pytest.raises(ValueError) as caught:
        fisher_of(model, x)
    for word in ("up.weight", "head.weight", "embed.weight", "fallback='loop'"):
        assert word in str(caught.value)
    assert_exact(fisher_of(model, x, fallback="loop"), loop(double(model), rows_of(x)))


class Twice(TokenModel):
    """Every use of a weight before the square: a linear layer, a norm and a tied table, each called
    twice.
    """

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        h = self.last(torch.tanh(self.up(self.embed(input_ids))) @ self.down.weight.T.detach())
        out = super().forward(input_ids)
        out.logits = out.logits + self.head(
            torch.tanh(self.down(torch.tanh(self.up(self.embed(input_ids))))) + h
        )
        return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_module_called_twice_is_squared_once(tied: bool) -> None:
    model, x = Twice(tied).double(), ids(3, 6)
    assert_exact(fisher_of(model, x), loop(model, rows_of(x)), 1e-11)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batch_split_and_order_do_not_matter(kind: str) -> None:
    model, x = causal_lm(kind), ids(4, 6)
    whole = dict(fisher_of(model, x))
    assert_exact(fisher_of(model, x[:1], x[1:]), whole)
    assert_exact(fisher_of(model, x[[2, 0, 3, 1]]), whole)


# --- the identity ---------------------------------------------------------------------------------


def test_kl_is_half_delta_fisher_delta() -> None:
    """KL(ref||policy) of one prediction after a step in one weight, against the enumerated Fisher:
    an O(delta) error.
    """
    model, x = TokenModel(vocab=7, width=4).double(), torch.tensor([[3, 5]])
    with torch.no_grad():
        reference = model(x).logits[0, :1]
    estimator = DiagonalFisher(model, generator=torch.Generator().manual_seed(1))
    estimator.update(x.expand(20000, -1))
    sampled = estimator.finalize()
    params = dict(model.named_parameters())
    logp = model(x).logits[0, 0].log_softmax(-1)
    exact = {n: torch.zeros_like(p) for n, p in params.items()}
    for y in range(7):
        for n, square in squares_kept(logp[y], params).items():
            exact[n] += float(logp[y].detach().exp()) * square
    step, checked = 1e-3, 0
    for n, p in params.items():
        i = int(exact[n].argmax())
        if float(exact[n].flatten()[i]) < 1e-4:
            continue
        with torch.no_grad():
            p.view(-1)[i] += step
            kl = float(fasttax.token_kl(model(x).logits[0, :1], reference, kind="ref_policy"))
            p.view(-1)[i] -= step
        assert kl == pytest.approx(0.5 * step**2 * float(exact[n].flatten()[i]), rel=2e-2), n
        # 20000 draws: 5 sigma < 10 %
        assert kl == pytest.approx(0.5 * step**2 * float(sampled[n].flatten()[i]), rel=0.1), n
        checked += 1
    assert checked >= 6
