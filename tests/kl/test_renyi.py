"""Renyi's divergence of several orders against the textbook sum in float64."""

from __future__ import annotations

import re

import pytest
import torch

import fasttax
from tests.tools.kl_cases import INF, NAN, check, oracle, run

ORDERS = (
    0.05,  # nearly a count of the support
    0.5,  # the Bhattacharyya distance, twice
    0.999,  # next to the limit, where 1 - order is small
    1.001,
    2.0,  # log of the chi-square divergence plus 1
    7.5,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: float, dtype: torch.dtype, backend: str | int) -> None:
    x, y, noise = torch.randn(3, 4, 203)
    check(backend, x.to(dtype), y.to(dtype), kind="renyi", beta=order)
    check(backend, x.to(dtype), (x + 0.1 * noise).to(dtype), kind="renyi", beta=order)
    options = {"temperature": 0.8, "ref_temperature": 1.3, "softcap": 9.0, "ref_softcap": 8.0}
    check(backend, x.to(dtype), y.to(dtype), kind="renyi", beta=order, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_small_values_keep_their_digits(order: float, backend: str | int) -> None:
    """Of about 5e-7, and of 5e-3 with logits 1000 above."""
    for step, offset, bound in ((1e-3, 0.0, 1e-3), (1e-1, 1000.0, 1e-5)):
        size = step / order**0.5  # the value is order / 2 times the step's variance
        y = torch.randn(8, 1003)
        x = (y + size * torch.randn(8, 1003)) + offset
        value = run(backend, x, y, kind="renyi", beta=order)[0]
        truth = oracle(x.double(), y.double(), kind="renyi", beta=order)
        assert ((value - truth).abs() / truth).max() <= bound


@pytest.mark.parametrize("order", ORDERS)
def test_equal_rows_are_exactly_zero(order: float, backend: str | int) -> None:
    x = 5 * torch.randn(3, 1003)
    x[1, 7] = -INF
    for out in run(backend, x, x.clone(), kind="renyi", beta=order):
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("order", ORDERS)
def test_minus_infinity(order: float, backend: str | int) -> None:
    """Policy mass without the reference's: inf above order 1, below it only if none is shared."""
    x, y = torch.randn(2, 3, 130)
    y[0, 3] = -INF
    x[1, 5] = -INF
    x[2, :65] = y[2, 65:] = -INF
    value = run(backend, x, y, kind="renyi", beta=order)[0]
    truth = oracle(x.double(), y.double(), kind="renyi", beta=order).float()
    torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)
    assert value.isinf().tolist() == [order > 1, False, True]


@pytest.mark.parametrize("order", [0.5, 2.0, 7.5])
def test_rows_far_apart(order: float, backend: str | int) -> None:
    """The sum itself leaves float32; its logarithm does not."""
    x, y = torch.randn(2, 4, 300)
    x[:, 9] += 90
    y[:, 200] += 90
    value, d_x, d_y = run(backend, x, y, kind="renyi", beta=order)
    truth = oracle(x.double(), y.double(), kind="renyi", beta=order)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    assert d_x.isfinite().all()
    assert d_y.isfinite().all()


def test_masked_and_nan_rows(backend: str | int) -> None:
    x, y = torch.randn(2, 3, 40)
    x[0, 2], x[1, 2] = NAN, NAN
    mask = torch.tensor([False, True, True])
    value, d_x, d_y = run(backend, x, y, mask=mask, kind="renyi", beta=2.0)
    assert value[0] == 0
    assert value[1].isnan()
    assert value[2] > 0
    for d in (d_x, d_y):
        assert torch.equal(d[0], torch.zeros(40))
        assert d[2].isfinite().all()


def test_the_limit_at_order_one_is_the_kl(backend: str | int) -> None:
    x, y = torch.randn(2, 4, 130, dtype=torch.float64)
    kl = run(backend, x, y)
    for order in (1 - 1e-5, 1 + 1e-5):
        for near, limit in zip(run(backend, x, y, kind="renyi", beta=order), kl, strict=True):
            torch.testing.assert_close(near, limit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [0.0, -1.0, 1.0, 1 + 1e-8, INF])
def test_an_order_that_has_none(order: float) -> None:
    with pytest.raises(ValueError, match="token_kl: beta: expected"):
        fasttax.token_kl(torch.zeros(2, 3), torch.zeros(2, 3), kind="renyi", beta=order)


def test_ranks_are_refused_with_the_reason() -> None:
    x, head = torch.zeros(2, 3), torch.zeros(3, 4)
    reason = re.escape("the logarithm is of a whole row's sum")
    with pytest.raises(ValueError, match=f"^token_kl: tp_group: expected None.*{reason}"):
        fasttax.token_kl(x, x, kind="renyi", tp_group=object())
    with pytest.raises(ValueError, match=f"^token_stats: tp_group: expected None.*{reason}"):
        fasttax.token_stats(x, x, outputs=("kl",), kind="renyi", tp_group=object())
    hidden = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=f"^linear_token_kl: tp_group: expected None.*{reason}"):
        fasttax.linear_token_kl(hidden, head, hidden, head, kind="renyi", tp_group=object())


@pytest.mark.parametrize("vocab_chunk", [None, 5])
def test_from_hidden_states(vocab_chunk: int | None, backend: str | int) -> None:
    h, r = torch.randn(2, 6, 4, dtype=torch.float64)
    w, v = torch.randn(2, 17, 4, dtype=torch.float64)
    options = {"kind": "renyi", "beta": 2.0}
    for leaf in (h, w, r, v):
        leaf.requires_grad_()
    found = fasttax.linear_token_kl(h, w, r, v, vocab_chunk=vocab_chunk, **options)
    whole = oracle(h @ w.T, r @ v.T, **options)
    torch.testing.assert_close(found, whole)
    d = torch.autograd.grad(found.sum(), (h, w, r, v))
    torch.testing.assert_close(d, torch.autograd.grad(whole.sum(), (h, w, r, v)))


def test_beside_other_outputs() -> None:
    x, y = torch.randn(2, 4, 30, dtype=torch.float64)
    stats = fasttax.token_stats(x, y, outputs=("kl", "entropy"), kind="renyi", beta=2.0)
    torch.testing.assert_close(stats.kl, oracle(x, y, kind="renyi", beta=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", [0.001, 0.01, 0.2, 3.0])
def test_entries_far_below(order: float, dtype: torch.dtype, backend: str | int) -> None:
    """Of one row e^-60 to e^-800: a weight p^a q^(1-a) is of the sum where p itself is not."""
    for gap in (60.0, 86.0, 90.0, 104.0, 130.0, 400.0, 800.0):
        x, y = torch.randn(2, 4, 67, dtype=dtype)
        x[:2, 1::3] -= gap
        x[2:, :64] -= gap
        check(backend, x, y, kind="renyi", beta=order)
        check(backend, y, x, kind="renyi", beta=order)
