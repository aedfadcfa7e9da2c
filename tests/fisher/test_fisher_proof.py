"""observe() counts what it has proved: right numbers or a refusal, of whatever model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, assert_same_state, state_of

B, T, V, H, CLASSES = 4, 6, 61, 16, 3
Y = torch.tensor([0, 2, 1, 1])
Model = Callable[[], nn.Module]


def built(make: Model) -> nn.Module:
    """In float64 and eval mode, every weight unlike its neighbours."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def class_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def truth_of(model: nn.Module, x: Tensor, y: Tensor = Y, loss: Any = class_loss) -> dict[str, Any]:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for n in range(len(x)):
        value = loss(model, x[n : n + 1], y[n : n + 1])
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for name, g in zip(params, found, strict=True):
            if g is not None:
                total[name] += g**2
    return total


def observed(
    model: nn.Module, x: Tensor, y: Tensor = Y, loss: Any = class_loss, **options: Any
) -> Any:
    alone = options.pop("alone", None)
    estimator = DiagonalFisher(model, labels="true", **options)
    with estimator.observe(loss=alone):
        loss(model, x, y).backward()
    return estimator.finalize("sum")


def right_or_refused(model: nn.Module, x: Tensor, *names: str, loss: Any = class_loss) -> bool:
    """Whether the numbers are right; a refusal names one of `names`, and changes nothing."""
    estimator = DiagonalFisher(model, labels="true")
    before = state_of(model)
    try:
        with estimator.observe():
            loss(model, x, Y).backward()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert text.startswith("DiagonalFisher"), text
        assert any(name in text for name in names), text
        assert "params=" in text or "loss=" in text, text
        assert estimator.examples == 0
        assert not any(bool(t.any()) for t in estimator.sums.values.values())
        assert_same_state(model, before)
        return False
    assert_exact(estimator.finalize("sum"), truth_of(model, x, loss=loss), 1e-9)
    return True


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


class Recurrent(nn.Module):
    """A text classifier from every step's output, or from the last state of a layer."""

    def __init__(self, kind: Any, state: bool, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.emb, self.wide = nn.Embedding(V, H), nn.Linear(H, 200)
        self.rnn = kind(H, 5, **options)
        self.state, self.given, self.first = state, given, options.get("batch_first", False)
        sides = 2 if options.get("bidirectional") else 1
        width = options.get("proj_size") or 5
        self.fc = nn.Linear(width if state else width * sides, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.wide(x).mean(-1, keepdim=True)
        if not self.first:
            x = x.transpose(0, 1)
        states: Any = None
        if self.given:
            layers = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
            states = x.new_full((layers, len(ids), 5), 0.3)
            if isinstance(self.rnn, nn.LSTM):
                states = (states, states)
        steps, last = self.rnn(x, states)
        if isinstance(last, tuple):
            last = last[0]
        if self.state:
            return self.fc(last[-1])
        return self.fc(steps.mean(1 if self.first else 0))


@pytest.mark.parametrize("tokens", [T, B])
@pytest.mark.parametrize("first", [False, True], ids=["batch second", "batch first"])
@pytest.mark.parametrize(
    "make",
    [
        lambda first: Recurrent(nn.LSTM, False, batch_first=first),
        lambda first: Recurrent(nn.LSTM, True, num_layers=2, batch_first=first),
        lambda first: Recurrent(nn.GRU, True, bidirectional=True, batch_first=first),
        lambda first: Recurrent(nn.RNN, False, True, num_layers=2, batch_first=first),
        lambda first: Recurrent(nn.LSTM, False, True, bidirectional=True, batch_first=first),
        lambda first: Recurrent(nn.LSTM, True, proj_size=3, batch_first=first),
    ],
)
def test_recurrent_layers(make: Any, first: bool, tokens: int) -> None:
    model, x = built(lambda: make(first)), torch.randint(0, V, (B, tokens))
    truth = truth_of(model, x)
    assert_exact(observed(model, x), truth, 1e-10)
    estimator = DiagonalFisher(model, labels="true")
    estimator.update({"ids": x, "labels": Y})
    assert_exact(estimator.finalize("sum"), truth, 1e-10)


def test_a_cell_step_by_step() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.cell, self.fc = nn.Embedding(V, H), nn.GRUCell(H, 5), nn.Linear(5, 3)
            self.wide = nn.Linear(H, 200)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            x = x + self.wide(x).mean(-1, keepdim=True)
            h = x.new_zeros(len(ids), 5)
            for t in range(ids.shape[1]):
                h = self.cell(x[:, t], h)
            return self.fc(h)

    assert right_or_refused(built(Steps), torch.randint(0, V, (B, T)))


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
    with pytest.raises(ValueError, match=r"Against: its output 0, of shape .4, 4."):
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


def test_fallback_loop_takes_the_loss() -> None:
    model, x = built(SequenceFirst), torch.randint(0, V, (B, B))
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
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
            flags.append(model.head.weight.requires_grad)
            class_loss(model, x, Y).backward()
    assert flags == [True, False]
    truth = truth_of(model, x)
    assert_exact(estimator.finalize("sum"), {n: 2 * t for n, t in truth.items()}, 1e-10)


# --- models that write into what they are given ---------------------------------------------------


class Writes(nn.Module):
    """Every layer's output is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(V, H), nn.Embedding(T, H)
        self.norm, self.one, self.two = nn.LayerNorm(H), nn.Linear(H, H), nn.Linear(H, H)
        self.conv, self.group = nn.Conv1d(H, H, 3, padding=1), nn.GroupNorm(4, H)
        self.grouped, self.fc = nn.Conv1d(H, H, 3, groups=2), nn.Linear(H, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x += self.pos(torch.arange(ids.shape[1]))
        h = self.norm(x).mul_(2.0)
        h = self.one(h).relu_()
        y = self.two(h)
        y.add_(x)
        y = self.conv(y.transpose(1, 2)).clamp_(-3, 3)
        y = F.silu(self.group(y), inplace=True)
        z = self.grouped(y)
        z.mul_(0.5)
        logits = self.fc(z.mean(-1))
        logits -= logits.detach().mean(-1, keepdim=True)
        return logits


def test_outputs_that_the_model_writes_into() -> None:
    assert right_or_refused(built(Writes), torch.randint(0, V, (B, T)))
