"""Which rule a module has, what rules refuse, and a rule that is added in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttax import DiagonalFisher
from fasttax.fisher import rules
from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece
from fasttax.fisher.tap import Tap
from tests.tools.models import assert_exact, loop

CE = nn.functional.cross_entropy


class OwnForward(nn.Linear):
    """A subclass may use the weight as it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sum()


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class T5LayerNorm(nn.Module):
    """transformers' norms are classes of their own, known by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class NormedBlock(nn.Module):
    """Has a norm's name and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)


MODULES: dict[str, tuple[nn.Module, str | None]] = {
    "linear": (nn.Linear(4, 4), "LinearTap"),
    "linear by another name": (Renamed(4, 4), "LinearTap"),
    "linear of its own forward": (OwnForward(4, 4), None),
    "embedding": (nn.Embedding(4, 4), "EmbeddingTap"),
    "embedding whose lookup rescales": (nn.Embedding(4, 4, max_norm=1.0), None),
    "embedding of sparse gradients": (nn.Embedding(4, 4, sparse=True), None),
    "conv": (nn.Conv1d(4, 4, 3), "ConvTap"),
    "conv in two dimensions": (nn.Conv2d(4, 4, 3), "ConvTap"),
    "grouped conv": (nn.Conv2d(4, 4, 3, groups=2), None),
    "transposed conv": (nn.ConvTranspose2d(4, 4, 3), None),
    "layer norm": (nn.LayerNorm(4), "ElementwiseTap"),
    "layer norm over two dimensions": (nn.LayerNorm((4, 4)), None),
    "RMS norm by name": (T5LayerNorm(), "ElementwiseTap"),
    "block called a norm": (NormedBlock(), None),
    "group norm": (nn.GroupNorm(2, 4), "GroupNormTap"),
    "batch norm": (nn.BatchNorm1d(4), None),
    "GRU": (nn.GRU(4, 4), "RecurrentTap"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_modules_rule(kind: str) -> None:
    module, expected = MODULES[kind]
    rule = rules.rule_of(module)
    assert (rule and rule.__name__) == expected


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    rule = rules.rule_of(Conv1D(4, 3))
    assert rule is not None
    assert rule.__name__ == "Conv1DTap"


def observed(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> DiagonalFisher:
    estimator = DiagonalFisher(model, labels="true", **options)
    with estimator.observe():
        CE(model(x), y, reduction="sum").backward()
    return estimator


class Pooled(nn.Module):
    """A module before a head, its positions averaged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.head = inner, nn.Linear(6, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).tanh()
        return self.head(y.flatten(2).mean(-1) if y.dim() > 2 else y)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("params", [None, ["inner.weight"], ["inner.bias"]], ids=str)
def test_group_norm(shape: tuple[int, ...], params: list[str] | None) -> None:
    model = Pooled(nn.GroupNorm(3, 6)).double()
    x, y = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 3, 4, 1])
    out = observed(model, x, y, params=params).finalize("sum")
    truth = loop(model, [({"x": x[n : n + 1]}, y[n : n + 1]) for n in range(4)], CE)
    assert_exact(out, {n: t for n, t in truth.items() if n in out}, 1e-11)


def test_a_conv_without_a_batch_is_refused() -> None:
    model = Pooled(nn.Conv1d(6, 6, 1))
    with pytest.raises(ValueError, match=r"inner \(Conv1d\).*batch of 3 dimensions.*\(6, 5\)"):
        observed(model, torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]))


class Gain(nn.Module):
    """A weight a feature, of a class that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class GainTap(Tap):
    """The whole of a rule whose gradient is one of the pieces."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, Gain)

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        width = d.shape[-1]
        piece = Piece("scale", bounds, d.reshape(-1, width), x.reshape(-1, width))
        self.give(current, "gain", piece)


@pytest.mark.parametrize("added", [False, True], ids=["runs again", "by its rule"])
def test_a_rule_is_added_in_one_place(added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if added:
        monkeypatch.setattr(rules, "RULES", (*rules.RULES, GainTap))
    model = Pooled(Gain()).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 3, 4, 1])
    estimator = observed(model, x, y)
    kinds = {tap.where: type(tap).__name__ for tap in estimator.view.taps}
    assert kinds["inner"] == ("GainTap" if added else "ModuleTap")
    truth = loop(model, [({"x": x[n : n + 1]}, y[n : n + 1]) for n in range(4)], CE)
    assert_exact(estimator.finalize("sum"), truth, 1e-11)
