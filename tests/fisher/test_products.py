"""Linear layers' products by fasttax's kernel under update's taps, and when they are chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fasttax import DiagonalFisher
from fasttax._base.gemm import mixed_gemm
from fasttax.fisher import products
from tests.tools.models import EXACT, TokenModel, assert_exact, fisher_of, loop, rows_of

needs_kernel = pytest.mark.skipif(
    not mixed_gemm(products.CPU), reason="fasttax's products need its CPU library"
)
HIDDEN = 300  # 300 x 300 entries are worth a product of fasttax's own, and no multiple of a tile


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, HIDDEN)  # too small: torch's
        self.wide = nn.Linear(HIDDEN, HIDDEN)
        self.plain = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.plain(torch.tanh(self.wide(self.first(x))))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that fasttax's products were asked for, which win every race."""
    found: list[tuple[int, ...]] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(tuple(x.shape))
        return own(x, weight, bias)

    own = products.linear
    monkeypatch.setattr(products, "own_is_faster", lambda threads: True)
    monkeypatch.setattr(products, "linear", linear)
    return found


def batch(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    dtype = next(model.parameters()).dtype
    return {"x": torch.randn(7, 12).to(dtype), "labels": torch.arange(7) % 5}


def values(model: nn.Module) -> dict[str, Tensor]:
    fisher = DiagonalFisher(model, labels="true", likelihood="softmax")
    fisher.update(batch(model))
    return dict(fisher.finalize().items())


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return float((got.double() - truth).detach().norm())


@needs_kernel
def test_equals_float64(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = Layers()
    truth = values(copy.deepcopy(model).double())
    assert not calls, "float64 products are torch's"
    mine = values(model)
    # verify's passes over a part of the batch come first
    assert calls[-2:] == [(7, HIDDEN)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "own_is_faster", lambda threads: False)
        torchs = values(model)
    for name, expected in truth.items():
        assert error(mine[name], expected) <= 4 * error(torchs[name], expected), name


@needs_kernel
def test_layers_are_as_before(calls: list[tuple[int, ...]]) -> None:
    model = Layers()
    replaced = model.plain.forward
    model.plain.forward = replaced  # type: ignore[method-assign]  # as accelerate's hooks do
    values(model)
    assert len(calls) > 0
    assert all("forward" not in vars(m) for m in model.modules() if m is not model.plain)
    assert vars(model.plain)["forward"] is replaced


@needs_kernel
def test_layers_are_as_before_an_error(calls: list[tuple[int, ...]]) -> None:
    model = Layers()

    def broken() -> None:
        with products.fast_linear(model):
            assert "forward" in vars(model.wide)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        broken()
    assert "forward" not in vars(model.wide)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, HIDDEN), (HIDDEN,), (2, 3, HIDDEN), (513, HIDDEN)])
def test_products(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(HIDDEN, HIDDEN + 1)
    x, d = torch.randn(shape), torch.randn(*shape[:-1], HIDDEN + 1)
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    d_truth = d.double() @ layer.weight.double()
    with torch.no_grad():
        mine = products.linear(x, layer.weight, layer.bias)
        d_mine = products.d_input(d, layer.weight)
        torchs, d_torchs = layer(x), d @ layer.weight
    assert error(mine, truth) <= 4 * error(torchs, truth)
    assert error(d_mine, d_truth) <= 4 * error(d_torchs, d_truth)


@needs_kernel
def test_what_is_no_plain_product_is_torchs(calls: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
    x = torch.randn(2, HIDDEN)
    with products.fast_linear(layer):
        layer(x)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.func.vmap(layer)(x)
        with pytest.raises(RuntimeError):
            layer(x[:, 1:])
        layer.weight.requires_grad_()
        assert layer(x).requires_grad
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("ours", "chosen"), [(0.5, True), (0.85, True), (0.95, False), (1.5, False)]
)
def test_chosen_where_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, ours: float, chosen: bool
) -> None:
    """Of the rounds the least counts: one slow round, as of a busy machine, chooses nothing.

    Of float32 on the CPU, whatever the default device and dtype are.
    """
    times = iter([9.0, 9 * ours, *[1.0, ours] * (products.ROUNDS - 2), 1.0, 9.0])

    def seconds(run: Callable[[], Tensor]) -> float:
        assert (run().dtype, run().device) == (torch.float32, products.CPU)
        return next(times)

    monkeypatch.setattr(products, "_seconds", seconds)
    products.own_is_faster.cache_clear()
    try:
        before = torch.get_rng_state()
        with torch.device("meta"):
            assert products.own_is_faster(1) is chosen
        assert products.own_is_faster(1) is chosen, "measured once a process"
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        products.own_is_faster.cache_clear()


@needs_kernel
def test_language_models(calls: list[tuple[int, ...]]) -> None:
    model = TokenModel(width=4096)
    ids = torch.randint(1, 61, (3, 9))
    mine = fisher_of(model, ids)
    assert calls
    assert_exact(mine, loop(model.double(), rows_of(ids)), EXACT)
