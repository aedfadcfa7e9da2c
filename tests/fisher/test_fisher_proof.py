"""observe() counts what it has proved: right numbers or a refusal, of whatever model."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, assert_same_state, state_of
from tests.tools.observed import (
    CLASSES,
    B,
    H,
    T,
    V,
    Y,
    built,
    class_loss,
    observed,
    right_or_refused,
    truth_of,
)

# --- every use of a parameter is seen -------------------------------------------------------------


class Uses(nn.Module):
    """A classifier whose first layer's weight is used as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, CLASSES)
        self.big = nn.Linear(H, 8 * H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.how == "again":
            h = h + F.linear(x, self.first.weight)
        if self.how == "transposed":
            h = h @ self.first.weight.T
        if self.how == "its bias":
            h = h * self.first.bias
        if self.how == "a norm":
            h = h * self.first.weight.norm()
        return self.last(h + self.big(x).mean(-1, keepdim=True))


@pytest.mark.parametrize("how", ["again", "transposed", "its bias", "a norm"])
def test_a_weight_used_outside_its_module(how: str) -> None:
    x = torch.randn(B, H).double()
    assert not right_or_refused(built(lambda: Uses(how)), x, "first.weight", "first.bias")
    assert right_or_refused(built(lambda: Uses("once")), x)


class Watched(nn.Module):
    """A classifier whose forward asks for its activations' gradients."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "kept":
            h.retain_grad()
        if self.how == "turned":  # as a gradient reversal layer does
            h.register_hook(lambda d: -0.5 * d)
        if self.how == "refused where there are none" and not h.requires_grad:
            raise RuntimeError("no gradients")
        return self.last(h.tanh())


@pytest.mark.parametrize("how", ["kept", "turned", "refused where there are none"])
def test_a_forward_that_asks_for_gradients(how: str) -> None:
    assert right_or_refused(built(lambda: Watched(how)), torch.randn(B, H).double())


class Forces(nn.Module):
    """A model that differentiates its own output, as those of energies and forces do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.last(self.first(x).tanh()).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force[:, :CLASSES]


def test_a_model_that_differentiates_itself() -> None:
    right_or_refused(built(Forces), torch.randn(B, H).double(), "first", "last")


REPARAMETRISED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm of hooks": weight_norm,
    "weight_norm of parametrizations": parametrizations.weight_norm,
    "spectral_norm of hooks": spectral_norm,
    "spectral_norm of parametrizations": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_weight_that_is_computed_from_others(kind: str) -> None:
    def make() -> nn.Module:
        model = Uses("once")
        model.first = REPARAMETRISED[kind](model.first)  # type: ignore[assignment]
        return model

    right_or_refused(built(make), torch.randn(B, H).double(), "first")


def test_a_head_by_the_embeddings_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.body = nn.Embedding(V, H), nn.Linear(H, H)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.body(self.wte(ids)).tanh(), self.wte.weight).sum(1)

    x = torch.randint(0, V, (B, T))
    assert not right_or_refused(built(Tied), x, "wte.weight")


# --- rows are the batch's -------------------------------------------------------------------------


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(V, H), nn.Linear(H, CLASSES)
        layer = nn.TransformerEncoderLayer(H, 2, 32, dropout=0.0)
        self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.enc(self.emb(ids).transpose(0, 1)).mean(0))


@pytest.mark.parametrize("tokens", [B, 2 * B, T])
def test_a_transformer_of_sequences_first(tokens: int) -> None:
    assert not right_or_refused(built(SequenceFirst), torch.randint(0, V, (B, tokens)), "enc.")


class Against(nn.Module):
    """Logits of each example against one vector of every example: a loss of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).tanh() @ self.two(x).tanh().T


def test_examples_that_meet_in_the_model_are_refused() -> None:
    model, x = built(Against), torch.randn(B, H).double()
    with pytest.raises(ValueError, match=r"Against: its output 0, of shape ..4, 4.. for"):
        observed(model, x, torch.arange(B))


class Mixes(nn.Module):
    """Takes the batch's mean away in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(H, H), nn.Linear(H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        return self.two(h - h.mean(0))


def test_a_module_that_meets_the_other_examples_is_named() -> None:
    assert not right_or_refused(built(Mixes), torch.randn(B, H).double(), "two (Linear)")


def test_batch_statistics_without_a_memory_are_refused() -> None:
    for affine in (True, False):

        def make(affine: bool = affine) -> nn.Module:
            norm = nn.BatchNorm1d(8, track_running_stats=False, affine=affine)
            return nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3))

        with pytest.raises(ValueError, match=r"got 1 \(BatchNorm1d\).*track_running_stats=True"):
            observed(built(make), torch.randn(B, 6).double())


# --- what a proof needs, and other ways to one ----------------------------------------------------


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def by_parts(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.body(x).tanh()), y, reduction="sum")


def test_parts_of_a_model_are_proven_by_a_loss() -> None:
    model, x = built(Parts), torch.randn(B, H).double()
    with pytest.raises(ValueError, match=r"a call of the model itself.*loss=.*verify=False"):
        observed(model, x, loss=by_parts)
    truth = truth_of(model, x)
    assert_exact(observed(model, x, loss=by_parts, verify=False), truth, 1e-10)

    def alone(n: int) -> Tensor:
        return by_parts(model, x[n : n + 1], Y[n : n + 1])

    assert_exact(observed(model, x, loss=by_parts, alone=alone), truth, 1e-10)


class LinearSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.one, self.fc = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.one(self.emb(ids).transpose(0, 1)).tanh().mean(0))


def test_a_loss_shows_squares_that_are_not_the_examples() -> None:
    model, x = built(LinearSequenceFirst), torch.randint(0, V, (B, B))
    assert not right_or_refused(model, x, "one (Linear)")
    with pytest.raises(ValueError, match="disagree with autograd"):
        observed(model, x, alone=lambda n: class_loss(model, x[n : n + 1], Y[n : n + 1]))


def test_a_loss_that_is_no_sum_of_its_examples_is_named() -> None:
    """A mean, whose squares are B^2 times too small; examples that meet in the loss."""
    model, x = built(lambda: Uses("once")), torch.randn(B, H).double()

    def mean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        return (z @ z.T).logsumexp(-1).sum()

    says = r"(?s)loss: expected .*is the sum, got .*last.weight.*mean"
    for loss in (mean, contrastive):

        def alone(n: int, loss: Any = loss) -> Tensor:
            of_one: Tensor = loss(model, x[n : n + 1], Y[n : n + 1])
            return of_one

        with pytest.raises(ValueError, match=says):
            observed(model, x, loss=loss, alone=alone)
    found = observed(  # "sum the block's loss over its examples, and give the same function"
        model, x, alone=lambda n: class_loss(model, x[n : n + 1], Y[n : n + 1])
    )
    assert_exact(found, truth_of(model, x), 1e-10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    model, x = built(lambda: Uses("once")), torch.randn(B, H).double()
    with torch.no_grad():
        model.get_parameter("last.bias")[0] = value
    says = r"expected finite gradients, got NaN or infinite ones of first.weight.*model's weights"
    with pytest.raises(ValueError, match=says):
        observed(model, x)


def test_large_gradients_in_float16_are_compared() -> None:
    """Their norm is beyond 65504, an infinite slack in their own dtype."""
    model = built(lambda: Uses("again")).half()
    x = torch.randn(B, H).half()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x).sum() * 2000

    assert not right_or_refused(model, x, "first.weight", loss=loss)


def test_fallback_loop_takes_the_loss() -> None:
    model, x = built(SequenceFirst), torch.randint(0, V, (B, B))
    weight = model.get_parameter("fc.weight")
    weight.grad = torch.ones_like(weight)
    before = state_of(model)

    def alone(n: int) -> Tensor:
        return class_loss(model, x[n : n + 1], Y[n : n + 1])

    found = observed(model, x, alone=alone, fallback="loop")
    assert_same_state(model, before)
    assert_exact(found, truth_of(model, x), 1e-10)
    with pytest.raises(ValueError, match=r"loss: expected a function with fallback='loop'"):
        observed(model, x, fallback="loop")


def test_a_batch_of_one_proves_nothing_for_the_next() -> None:
    model, x = built(Mixes), torch.randn(B, H).double()
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        class_loss(model, x[:1], Y[:1]).backward()
    with pytest.raises(ValueError, match=r"two \(Linear\)"), estimator.observe():
        class_loss(model, x, Y).backward()
    assert estimator.examples == 1


def test_a_proven_estimator_freezes_the_parameters_again() -> None:
    """From the second batch on autograd computes no weight gradient."""
    model, x = built(Parts), torch.randn(B, H).double()
    estimator, flags = DiagonalFisher(model, labels="true"), []
    for _ in range(2):
        with estimator.observe():
            flags.append(model.get_parameter("head.weight").requires_grad)
            class_loss(model, x, Y).backward()
    assert flags == [True, False]
    truth = truth_of(model, x)
    assert_exact(estimator.finalize("sum"), {n: 2 * t for n, t in truth.items()}, 1e-10)


# --- the model afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [None, "loop"])
def test_an_estimator_inside_anothers_block_is_refused(fallback: str | None) -> None:
    model, x = built(Parts), torch.randn(B, H).double()
    outer, inner = (DiagonalFisher(model, labels="true", fallback=f) for f in (None, fallback))
    with outer.observe():
        with pytest.raises(RuntimeError, match=r"under the taps .* after that block"):
            inner.update((x, Y))
        class_loss(model, x, Y).backward()
    inner.update((x, Y))
    assert_exact(outer.finalize("sum"), truth_of(model, x), 1e-10)
    assert_exact(inner.finalize("sum"), truth_of(model, x), 1e-10)


@pytest.mark.parametrize("when", ["installs", "removes", "runs"])
def test_an_interrupt_leaves_the_model_as_it_was(when: str, monkeypatch: Any, request: Any) -> None:
    """SIGINT while hooks come and go waits until they are all there, or all gone."""
    # a shell's background jobs are given one that ignores it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    model, x = built(Parts), torch.randn(B, H).double()
    estimator = DiagonalFisher(model, labels="true")
    before = state_of(model)
    tap = estimator.view.taps[0]
    own = tap.install

    class Handle:
        def __init__(self) -> None:
            if when == "installs":
                signal.raise_signal(signal.SIGINT)
            self.handle = own()

        def remove(self) -> None:
            if when == "removes":
                signal.raise_signal(signal.SIGINT)
            self.handle.remove()

    monkeypatch.setattr(tap, "install", Handle)
    if when == "runs":
        model.get_submodule("head").register_forward_pre_hook(
            lambda *_: signal.raise_signal(signal.SIGINT)
        )
        before = state_of(model)
    with pytest.raises(KeyboardInterrupt), estimator.observe():
        class_loss(model, x, Y).backward()
    assert_same_state(model, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_update_of_one_row_proves_nothing_for_the_next() -> None:
    model, x = built(Mixes), torch.randn(B, H).double()
    estimator = DiagonalFisher(model, labels="true")
    estimator.update((x[:1], Y[:1]))
    with pytest.raises(ValueError, match="disagree with autograd"):
        estimator.update((x, Y))
    assert estimator.examples == 1
