"""Recurrent layers, norms, caches, dropout, and models that write into what layers give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, fisher_of
from tests.tools.observed import CLASSES, B, H, T, V, Y, built, observed, right_or_refused, truth_of

# --- recurrent layers ----------------------------------------------------------------------------


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


# --- dropout, caches ------------------------------------------------------------------------------


def test_train_mode_is_proven_in_eval_mode() -> None:
    """GPT-2's dropout is the estimate's own, not a fault of the method."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).train()
    x = torch.randint(3, V, (3, 6))
    with pytest.warns(UserWarning, match="dropout"):
        found = fisher_of(model, x, labels="sample")
    assert all(m.training for m in model.modules())
    assert all(bool(f.isfinite().all()) for f in found.values())

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = model(input_ids=x).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")

    with pytest.warns(UserWarning, match="dropout"):
        found = observed(model, x, x, loss)
    assert all(m.training for m in model.modules())
    assert all(bool(f.isfinite().all()) for f in found.values())


def test_a_module_with_dropout_cannot_run_again() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(H, H), nn.LSTM(H, 5, 2, batch_first=True, dropout=0.5))

    model, x = built(make).train(), torch.randn(B, T, H).double()
    with (
        pytest.warns(UserWarning, match="dropout"),
        pytest.raises(ValueError, match=r"1 \(LSTM\): its dropout .* call model.eval"),
    ):
        observed(model, x, loss=lambda m, x, y: m(x)[0].tanh().sum())


@pytest.mark.parametrize("name", ["GptOss", "Mamba"])
def test_no_cache_is_met_filled(name: str) -> None:
    """Modules that run again: with the config's cache none, with the user's own an error."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1}
    if name == "GptOss":
        options |= {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
        options |= {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    else:
        options |= {"state_size": 4}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options)
    )
    model = model.eval()
    x = torch.randint(3, V, (3, 6))

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = model(input_ids=x, **cache).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")

    cache: dict[str, Any] = {}
    names = [n for n, _ in model.named_parameters() if "sinks" in n or n.endswith("norm.weight")]
    truth = truth_of(model, x, x, loss)
    found = observed(model, x, x, loss, params=names)
    assert_exact(found, {n: truth[n] for n in names}, 1e-4)
    assert model.config.use_cache
    if name == "GptOss":
        cache = {"use_cache": True}
        with pytest.raises(ValueError, match=r"DynamicCache .* use_cache=False"):
            observed(model, x, x, loss, params=names)


# --- norms ----------------------------------------------------------------------------------------


class PermutingNorm(nn.LayerNorm):
    """Over the channels of (B, C, T), as SqueezeBERT's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Over the channels of (B, C, W, H)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        x = (x - u) / ((x - u) ** 2).mean(1, keepdim=True).add(1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GatedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Normed(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv1d(4, 8, 1)
        self.plane, self.fc = nn.Conv2d(4, 8, 1), nn.Linear(8, CLASSES)
        norms: dict[str, Callable[[], nn.Module]] = {
            "permuting": lambda: PermutingNorm(8),
            "channels": lambda: ChannelNorm(8),
            "gated": lambda: GatedNorm(8),
            "heads": lambda: nn.RMSNorm(4),
        }
        self.norm, self.width = norms[kind](), width

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, width)
        if self.kind == "channels":
            h = self.norm(self.plane(x[..., None].expand(*x.shape, self.width)).tanh()).mean(-1)
        elif self.kind == "permuting":
            h = self.norm(self.conv(x))
        elif self.kind == "gated":
            y = self.conv(x).transpose(1, 2)
            h = self.norm(y, y.flip(1)).transpose(1, 2)
        else:
            y = self.conv(x).transpose(1, 2)
            h = self.norm(y.reshape(-1, 4)).view(*y.shape).transpose(1, 2)
        return self.fc((h**3).mean(-1))


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("kind", ["permuting", "channels", "gated", "heads"])
def test_norms(kind: str, width: int) -> None:
    """Also where the width is the number of channels."""
    model, x = built(lambda: Normed(kind, width)), torch.randn(B, 4, width).double()
    params = [n for n, _ in model.named_parameters() if n != "plane.bias"]
    truth = {n: t for n, t in truth_of(model, x).items() if n in params}
    assert_exact(observed(model, x, params=params), truth, 1e-9)
    estimator = DiagonalFisher(model, labels="true", params=params)
    estimator.update((x, Y))
    assert_exact(estimator.finalize("sum"), truth, 1e-9)
