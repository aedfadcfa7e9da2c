"""labels="exact_head", mc_samples, observe() with several losses, robustness (hooks, compile,
autocast), resuming, own error, peers.
"""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import DiagonalFisher
from tests.tools.models import (
    HIDDEN,
    VOCAB,
    TokenModel,
    assert_exact,
    assert_same_state,
    causal_lm,
    fisher_of,
    ids,
    logits_of,
    loop,
    rows_of,
    state_of,
)

CE = nn.functional.cross_entropy
pytestmark = pytest.mark.usefixtures("one_thread")


def enumerated(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The true Fisher of one row: every joint choice of labels of its predictions, by autograd."""
    params = dict(model.named_parameters())
    logp = model(x).logits.log_softmax(-1)[0, :-1]
    truth = {n: torch.zeros_like(p) for n, p in params.items()}
    for labels in itertools.product(range(logp.shape[-1]), repeat=logp.shape[0]):
        loss = logp[range(len(labels)), list(labels)].sum()
        grads = torch.autograd.grad(
            loss, list(params.values()), retain_graph=True, allow_unused=True
        )
        for n, g in zip(params, grads, strict=True):
            truth[n] += 0 if g is None else float(loss.detach().exp()) * g**2
    return truth


class Softcapped(TokenModel):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        out = super().forward(input_ids)
        return SimpleNamespace(logits=0.5 * torch.tanh(out.logits * 3))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("kind", [TokenModel, Softcapped])
def test_exact_head_is_the_enumerated_fisher_of_the_head(kind: type[TokenModel]) -> None:
    """One pass without any sampling error at the head; elsewhere what labels='sample' draws."""
    model, x = kind(vocab=5, width=4).double(), torch.tensor([[3, 4, 3]])
    truth = enumerated(model, x)
    out = fisher_of(model, x, labels="exact_head")
    for n in ("head.weight", "head.bias"):
        assert_exact({n: out[n]}, {n: truth[n]}, 1e-12)
    sampled = fisher_of(model, x, labels="sample")
    assert all(torch.equal(out[n], sampled[n]) for n in out if not n.startswith("head"))


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_exact_head_tied_is_unbiased_and_not_negative(mc_samples: int) -> None:
    """A tied weight: rows that the example's tokens do not touch in closed form, the others sampled
    as one gradient.
    """
    model, x = TokenModel(tied=True, vocab=5, width=4).double(), torch.tensor([[3, 4, 3]])
    truth = enumerated(model, x)["embed.weight"]
    estimator = DiagonalFisher(
        model,
        labels="exact_head",
        mc_samples=mc_samples,
        generator=torch.Generator().manual_seed(2),
    )
    parts = []
    for _ in range(40):
        before = estimator.sums.value("embed.weight").clone()
        estimator.update(x.expand(60, -1))
        parts.append((estimator.sums.value("embed.weight") - before) / 60)
    each = torch.stack(parts)
    assert bool((each >= 0).all())
    untouched = [0, 1, 2]
    torch.testing.assert_close(each.mean(0)[untouched], truth[untouched], rtol=1e-10, atol=0)
    off = (each.mean(0) - truth).abs() / (each.std(0) / 40**0.5 + 1e-10)
    assert float(off.max()) < 5


def test_exact_head_of_a_language_model_and_of_sequences() -> None:
    """The head's closed form is the mean over labels, tokens independent: against many draws of a
    small Llama.
    """
    model, x = causal_lm("llama").double(), ids(2, 5)
    exact = fisher_of(model, x, labels="exact_head")["lm_head.weight"]
    hidden = model.model(x).last_hidden_state[:, :-1].flatten(0, 1).detach()
    torch.testing.assert_close(
        exact,
        fasttax.functional.lm_head_fisher(hidden, model.lm_head.weight.detach()),
        rtol=1e-6,
        atol=1e-12,
    )
    drawn = fisher_of(model, *[x.repeat(50, 1)] * 6, labels="sample")["lm_head.weight"] / 300
    assert float(drawn.sum()) == pytest.approx(float(exact.sum()), rel=0.05)
    low = fisher_of(copy.deepcopy(model).bfloat16(), x, labels="exact_head")["lm_head.weight"]
    assert float((low - exact).norm() / exact.norm()) < 0.05


class Mixes(TokenModel):
    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = super().forward(input_ids).logits
        return SimpleNamespace(logits=logits + logits.roll(1, -1) ** 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_exact_head_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"exact_head.*entry by entry"):
        fisher_of(Mixes(), ids(2, 5), labels="exact_head")
    with pytest.raises(ValueError, match=r"exact_head.*labels='sample'"):
        fisher_of(TokenModel(), ids(2, 5), labels="exact_head", params=["up.*"])
    with pytest.raises(ValueError, match=r"labels.*fallback='loop'.*exact_head"):
        DiagonalFisher(TokenModel(), labels="exact_head", fallback="loop")


@pytest.mark.parametrize("kind", ["token", "llama_tied"])
def test_mc_samples_averages_draws(kind: str) -> None:
    """K draws of one forward are the mean of K single draws from the same generator."""
    model: Any = (TokenModel() if kind == "token" else causal_lm(kind)).double()
    x = ids(2, 6)
    if kind == "llama_tied":
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    draw = torch.Generator().manual_seed(3)
    estimator = DiagonalFisher(model, generator=draw, verify=False)
    for _ in range(3):
        estimator.update(x)
    singles = {n: f / 3 for n, f in estimator.finalize("sum").items()}
    for fallback in (None, "loop"):
        out = DiagonalFisher(
            model,
            mc_samples=3,
            generator=torch.Generator().manual_seed(3),
            verify=False,
            fallback=fallback,
        )
        out.update(x)
        if fallback is None:
            assert_exact(out.finalize("sum"), singles, 1e-10)
        assert out.examples == 2
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"mc_samples.*integer >= 1"):
            DiagonalFisher(model, mc_samples=bad)
    with pytest.raises(ValueError, match=r"mc_samples.*labels='true'"):
        DiagonalFisher(model, labels="true", mc_samples=2)


# --- observe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token_tied", "llama_tied", "gpt2"])
def test_several_losses_are_summed_before_squaring(kind: str) -> None:
    model, x, other = (
        (TokenModel(tied=True) if kind == "token_tied" else causal_lm(kind)).double(),
        ids(3, 7),
        ids(3, 7, seed=8),
    )

    def both(logits: Tensor, labels: Tensor) -> Tensor:
        return CE(logits[0, :-1], labels[0, 0, 1:], reduction="sum") + 0.3 * CE(
            logits[0, :-1], labels[0, 1, 1:], reduction="sum"
        )

    truth = loop(
        model,
        [({"input_ids": x[n : n + 1]}, torch.stack((x[n], other[n]))[None]) for n in range(3)],
        both,
    )
    for two_backwards in (False, True):
        estimator = DiagonalFisher(model, labels="true")
        with estimator.observe():
            logits = model(input_ids=x).logits
            first, second = (
                w * CE(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum")
                for w, y in ((1.0, x), (0.3, other))
            )
            if two_backwards:
                first.backward(retain_graph=True)
                second.backward()
            else:
                (first + second).backward()
        # Llama's norm is float32's: a loss at a time it rounds otherwise than their sum
        assert_exact(
            estimator.finalize("sum"),
            truth,
            1e-6 if kind == "llama_tied" and two_backwards else 1e-10,
        )
        assert estimator.examples == 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_several_losses_under_checkpointing(use_reentrant: bool) -> None:
    model, x = causal_lm("llama_tied").double(), ids(3, 7)
    once = fisher_of(model, x)
    model.train().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        logits = model(input_ids=x, use_cache=False).logits
        loss = CE(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
    assert_exact(estimator.finalize("sum"), {n: 2.25 * f for n, f in once.items()}, 1e-6)
    mc = fisher_of(model, x, labels="sample", mc_samples=2)
    assert_exact(
        mc,
        dict(fisher_of(causal_lm("llama_tied").double(), x, labels="sample", mc_samples=2)),
        1e-6,
    )


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("unit", ["token", "batch"])
def test_exact_head_of_other_units_runs_on_tied_models(kind: str, unit: str) -> None:
    out = fisher_of(causal_lm(kind), ids(2, 6), labels="exact_head", unit=unit)
    assert all(bool((f >= 0).all()) and bool(f.isfinite().all()) for f in out.values())


def test_every_forward_is_a_batch_of_its_own() -> None:
    model, x = causal_lm("llama_tied").double(), ids(4, 6)
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        with torch.no_grad():
            model(input_ids=x[:2])  # an evaluation in between counts for nothing
        for rows in (x[:1], x[1:]):
            logits = model(input_ids=rows).logits
            CE(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
    assert_exact(estimator.finalize("sum"), loop(model, rows_of(x)), 1e-10)
    assert estimator.examples == 4


# --- robustness -----------------------------------------------------------------------------------


def test_hooks_of_others_are_respected() -> None:
    """Forward and pre-forward hooks that change what a layer gets and gives, and backward hooks, in
    the loop as here.
    """

    def tripled(module: nn.Module, gradients: Any) -> Any:
        return tuple(3 * g for g in gradients)

    model, x = TokenModel().double(), ids(3, 6)
    model.up.register_forward_hook(lambda m, a, y: 2 * y)
    model.down.register_forward_pre_hook(lambda m, a: (a[0] ** 2,))
    model.last.register_full_backward_hook(lambda m, gi, go: None)
    model.head.register_full_backward_pre_hook(tripled)
    before = state_of(model)
    out = fisher_of(model, x)
    assert_same_state(model, before)
    assert_exact(out, loop(model, rows_of(x)), 1e-11)


@pytest.mark.parametrize("how", ["whole", "in_place", "inner"])
def test_compiled_models_run_uncompiled(how: str) -> None:
    """Also where the code was compiled before the taps came; names are the plain model's."""
    model, x = TokenModel(), ids(2, 6)
    truth = loop(copy.deepcopy(model).double(), rows_of(x))
    compiled: Any = model
    if how == "whole":
        compiled = torch.compile(model, backend="eager")
    elif how == "in_place":
        model.compile(backend="eager")
    else:
        model.up = torch.compile(model.up, backend="eager")  # type: ignore[assignment]
        truth = {n.replace("up.", "up._orig_mod."): t for n, t in truth.items()}
    torch._dynamo.reset()
    compiled(x)
    assert_exact(fisher_of(compiled, x), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_bf16_agree_with_autograd_in_bf16(dtype: torch.dtype) -> None:
    """Off from float64 by no more than twice what the loop in the same precision is."""
    model, x = causal_lm("llama"), ids(3, 7)
    truth = loop(copy.deepcopy(model).double(), rows_of(x))
    model = model.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        own = loop(model, rows_of(x))
        out = fisher_of(model, x)
    for n in truth:
        error, theirs = (
            float((f[n].double() - truth[n]).norm() / truth[n].norm()) for f in (out, own)
        )
        assert error <= 2 * theirs + 1e-5, n
        assert out[n].dtype == torch.float32


def test_inference_mode_and_no_grad_around_do_not_matter() -> None:
    model, x = TokenModel(), ids(2, 5)
    truth = fisher_of(model, x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = fisher_of(model, x)
        assert all(torch.equal(out[n], truth[n]) for n in truth)


@pytest.mark.parametrize("name", ["attention_dropout", "dropout", "drop_prob"])
def test_dropout_by_a_function_in_train_mode_warns(name: str) -> None:
    model = causal_lm("llama").train()
    setattr(model.model.layers[1].mlp, name, 0.2)  # as OPT, Bart and Whisper hold theirs
    with pytest.warns(UserWarning, match=r"dropout.*model.eval\(\)"):
        DiagonalFisher(model, verify=False).update(ids(1, 4))


@pytest.mark.parametrize("observed", [False, True])
def test_a_loop_that_fails_halfway_is_not_gone_on_with(observed: bool) -> None:
    """Its sums have some examples of the batch; one that fails at its first has none."""
    model, batch = TokenModel(), ids(4, 6)
    estimator = DiagonalFisher(model, labels="true", fallback="loop", verify=False)
    left = [99]  # forwards of single examples before one fails

    def failing(module: nn.Module, args: Any, kwargs: Any) -> None:
        left[0] -= len(next(iter([*args, *kwargs.values()]))) == 1
        if left[0] < 0:
            raise RuntimeError("of the device")

    def run(before: int) -> None:
        left[0] = before
        if not observed:
            estimator.update(batch)
            return
        with estimator.observe(loss=lambda n: logits_of(model(batch[n : n + 1])).square().sum()):
            model(batch)

    model.register_forward_pre_hook(failing, with_kwargs=True)
    with pytest.raises((RuntimeError, ValueError), match="of the device"):
        run(0)
    run(99)
    assert estimator.examples == 4
    with pytest.raises((RuntimeError, ValueError), match="of the device"):
        run(2)
    with pytest.raises(RuntimeError, match=r"failed halfway.*start a new DiagonalFisher"):
        run(99)
    with pytest.raises(RuntimeError, match=r"failed halfway.*start a new DiagonalFisher"):
        estimator.finalize()


# --- its own error and progress -------------------------------------------------------------------


def test_progress_shows_rate_time_left_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    fasttax.estimate_fisher(TokenModel(), list(ids(6, 6).split(2)))
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "ex/s" in shown
    assert "error" in shown


def test_relative_error_is_what_repetition_shows() -> None:
    """The estimate of its own error against the spread of 30 estimates, within a third."""
    model, x = TokenModel(vocab=7, width=4), ids(12, 6, vocab=7)
    estimates, own = [], []
    for seed in range(30):
        estimator = DiagonalFisher(
            model, generator=torch.Generator().manual_seed(seed), verify=False
        )
        assert math.isnan(estimator.relative_error())
        for _ in range(3):
            for batch in x.split((3, 5, 4)):
                estimator.update(batch)
        own.append(estimator.relative_error())
        f = estimator.finalize()
        assert f.metadata["relative_error"] == own[-1]
        estimates.append(torch.cat([f[n].flatten() for n in f]))
    each = torch.stack(estimates).double()
    shown = float((each.var(0).sum() / (each.mean(0) ** 2).sum()).sqrt())
    # the twelve examples are the same in all: what their own spread adds is not in `shown`
    assert shown / 1.5 < sum(own) / len(own) < shown * 2


# --- peers ----------------------------------------------------------------------------------------


def test_agrees_with_backpack() -> None:
    """SumGradSquared on what it supports: linear layers and a convolution."""
    backpack = pytest.importorskip("backpack", reason="needs backpack-for-pytorch (in [dev])")
    from backpack.extensions import SumGradSquared

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.Tanh(),
        nn.Linear(9, 5),
    )
    x, y = torch.randn(6, 2, 8, 8), torch.arange(6) % 5
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        CE(model(x), y, reduction="sum").backward()
    peer, loss = (
        backpack.extend(copy.deepcopy(model)),
        backpack.extend(nn.CrossEntropyLoss(reduction="sum")),
    )
    with backpack.backpack(SumGradSquared()):
        loss(peer(x), y).backward()
    assert_exact(
        estimator.finalize("sum"), {n: p.sum_grad_squared for n, p in peer.named_parameters()}
    )


def test_agrees_with_opacus() -> None:
    """Per-example gradients of embedding, layer norm, RMS norm, linear and convolution, squared and
    summed.
    """
    grad_sample = pytest.importorskip("opacus.grad_sample", reason="needs opacus (in [dev])")

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm, self.up = nn.Embedding(VOCAB, 8), nn.RMSNorm(8), nn.Linear(8, 8)
            self.conv, self.last, self.head = (
                nn.Conv1d(8, 8, 3, padding=1),
                nn.LayerNorm(8),
                nn.Linear(8, VOCAB),
            )

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.up(self.norm(self.embed(input_ids)))
            return self.head(self.last(self.conv(h.transpose(1, 2)).transpose(1, 2)))

    model, x = Peer(), ids(4, 7)
    peer = grad_sample.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    CE(peer(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").backward()
    truth = {
        n.removeprefix("_module."): p.grad_sample.square().sum(0)
        for n, p in peer.named_parameters()
    }
    assert_exact(fisher_of(model, x), truth)


def test_llama_against_opacus_of_its_tied_head() -> None:
    """Opacus sums a shared weight's uses before squaring, as tied='exact' does."""
    grad_sample = pytest.importorskip("opacus.grad_sample", reason="needs opacus (in [dev])")
    model, x = TokenModel(tied=True, width=HIDDEN), ids(3, 6)
    peer = grad_sample.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    CE(peer(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").backward()
    assert_exact(
        fisher_of(model, x),
        {
            n.removeprefix("_module."): p.grad_sample.square().sum(0)
            for n, p in peer.named_parameters()
        },
    )
