"""lm_head_fisher and label_variance_, which it is made of: every label enumerated in float64, on
every kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fasttax import functional as F
from fasttax import reference
from tests.tools.utils import assert_says, assert_within

NAN, INF = float("nan"), float("inf")


def variances(logits: Tensor) -> Tensor:
    """p (1 - p), 1 - p being summed over the other labels: exact where p is nearly 1."""
    p = logits.double().softmax(-1)
    return p * torch.stack(
        [torch.cat((p[:, :j], p[:, j + 1 :]), 1).sum(1) for j in range(p.shape[1])], 1
    )


def run(backend: str | int, logits: Tensor) -> Tensor:
    out = logits.clone()
    op: Any = (
        torch.ops.fasttax._reference_label_variance_
        if backend == "reference"
        else torch.ops.fasttax.label_variance_
    )
    op(out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 200])
def test_label_variance(V: int, dtype: torch.dtype, backend: str | int) -> None:
    logits = 3 * torch.randn(5, V, dtype=dtype)
    p = logits.softmax(-1)
    assert_within(run(backend, logits), p * (1 - p), variances(logits))


def test_a_row_longer_than_any_block(backend: str | int) -> None:
    """The kernels take 2048 and 4096 logits at a time."""
    logits = 3 * torch.randn(2, 2 * 4096 + 37)
    p, wide = logits.softmax(-1), logits.double().softmax(-1)
    assert_within(run(backend, logits), p * (1 - p), wide * (1 - wide))


@pytest.mark.parametrize("gap", [20.0, 60.0, 85.0])
def test_a_collapsed_row_keeps_its_digits(gap: float, backend: str | int) -> None:
    """p = 1 - 2 e^-gap: 1 - p is 0 in float32, p (1 - p) is not. (Below e^-87 float32 has no normal
    numbers.)
    """
    logits = torch.full((1, 40), -INF)
    logits[0, [3, 7, 30]] = torch.tensor([5.0 - gap, 5.0, 5.0 - gap])
    got = run(backend, logits)[0]
    want = torch.tensor([math.exp(-gap), 2 * math.exp(-gap), math.exp(-gap)], dtype=torch.float64)
    torch.testing.assert_close(
        got[[3, 7, 30]].double(), want / (1 + 2 * math.exp(-gap)) ** 2, rtol=3e-6, atol=0
    )
    assert int((got != 0).sum()) == 3


def test_ties_offsets_and_what_is_no_number(backend: str | int) -> None:
    equal = run(backend, torch.full((1, 7), 1000.0))
    torch.testing.assert_close(equal, torch.full((1, 7), 6 / 49))
    assert torch.equal(
        run(backend, torch.tensor([[1.0, 2.0, -INF]]) + 512),
        run(backend, torch.tensor([[1.0, 2.0, -INF]])),
    )
    for bad in (NAN, INF):
        assert run(backend, torch.tensor([[0.0, bad, 1.0]])).isnan().any()
    assert run(backend, torch.full((1, 3), -INF)).isnan().all()
    assert run(backend, torch.zeros(1, 1)).item() == 0  # the only label is certain


def test_strided_rows_and_none(backend: str | int) -> None:
    whole = torch.randn(4, 50)
    part = whole[:, 10:30]
    want = run("reference", part)
    op: Any = (
        torch.ops.fasttax._reference_label_variance_
        if backend == "reference"
        else torch.ops.fasttax.label_variance_
    )
    kept = whole.clone()
    op(part)
    torch.testing.assert_close(part, want)
    assert torch.equal(whole[:, :10], kept[:, :10])
    assert torch.equal(whole[:, 30:], kept[:, 30:])
    assert run(backend, torch.zeros(0, 9)).shape == (0, 9)


@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=70), st.floats(-500, 500, width=32)
)
def test_any_row(values: list[float], offset: float) -> None:
    """Never negative, at most 1/4, and what float64 says of the logits as they are."""
    logits = torch.tensor([values]) + offset
    got = run("native", logits)
    assert bool(((got >= 0) & (got <= 0.25 + 1e-6)).all())
    torch.testing.assert_close(got.double(), variances(logits), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(2, 3).T, torch.zeros(2, 3).bfloat16()]
)
def test_direct_op_call_refuses(logits: Tensor, simd: str | int) -> None:
    with pytest.raises(RuntimeError, match="label_variance_"):
        torch.ops.fasttax.label_variance_(logits)


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_lm_head_fisher_is_the_mean_over_all_labels(with_bias: bool, simd: str | int) -> None:
    """E_y[(d log p(y) / d W)^2] token by token, every label enumerated with autograd in float64."""
    a, w = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
    )
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    mask = torch.tensor([[True, True, False], [True, False, True]])
    truth = torch.zeros_like(w)
    for token in a[mask]:
        logp = torch.nn.functional.linear(token, w, bias).log_softmax(-1)
        for y in range(5):
            truth = (
                truth
                + logp[y].exp().detach()
                * torch.autograd.grad(logp[y], w, retain_graph=True)[0] ** 2
            )
    for chunk in (1, 2, 256):
        torch.testing.assert_close(
            F.lm_head_fisher(a, w, bias=bias, mask=mask, token_chunk=chunk),
            truth.detach(),
            rtol=1e-12,
            atol=0,
        )
    single = F.lm_head_fisher(
        a.float(),
        w.detach().float(),
        bias=None if bias is None else bias.float(),
        mask=mask,
        out=torch.ones(5, 4),
    )
    torch.testing.assert_close(single.double(), truth.detach() + 1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_lm_head_fisher_is_its_specification(with_bias: bool, dtype: torch.dtype) -> None:
    """Chunks of tokens around label_variance_ against the whole in plain PyTorch, in float64."""
    a, w, bias = (torch.randn(shape).to(dtype) for shape in ((7, 16), (40, 16), (40,)))
    given = bias if with_bias else None
    wide = bias.double() if with_bias else None
    truth = torch.zeros(40, 16, dtype=torch.float64)
    reference.lm_head_fisher_(truth, a.double(), w.double(), wide, 3)
    got = F.lm_head_fisher(a, w, bias=given, token_chunk=3)
    exact = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.double(), truth, rtol=exact, atol=exact * 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_heads_have_float32_logits(dtype: torch.dtype, simd: str | int) -> None:
    """Logits rounded to bfloat16 would be off by 2^-9 of themselves, which is more than this
    allows.
    """
    a, w, bias = (
        (4 * torch.randn(6, 16)).to(dtype),
        torch.randn(90, 16).to(dtype),
        torch.randn(90).to(dtype),
    )
    got = F.lm_head_fisher(a, w, bias=bias)
    p = torch.nn.functional.linear(a.double(), w.double(), bias.double()).softmax(-1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), (p * (1 - p)).T @ a.double().square(), rtol=1e-4, atol=1e-6
    )


def test_no_tokens_and_no_words() -> None:
    assert torch.equal(F.lm_head_fisher(torch.zeros(0, 4), torch.zeros(3, 4)), torch.zeros(3, 4))
    assert F.lm_head_fisher(torch.zeros(2, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        a, w = torch.randn(9, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
        torch.library.opcheck(
            torch.ops.fasttax.lm_head_fisher_.default,
            (torch.zeros(7, 5, dtype=dtype), a, w, None, 4),
        )
        torch.library.opcheck(torch.ops.fasttax.label_variance_.default, (a,))


A = torch.randn(2, 3, 4)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "head width": (
        lambda: F.lm_head_fisher(A, torch.randn(7, 3)),
        ValueError,
        ("lm_head_fisher", "weight", "(V, 4)", "(7, 3)"),
    ),
    "head bias": (
        lambda: F.lm_head_fisher(A, torch.randn(7, 4), bias=torch.randn(4)),
        ValueError,
        ("lm_head_fisher", "bias", "(7,)"),
    ),
    "head mask": (
        lambda: F.lm_head_fisher(A, torch.randn(7, 4), mask=torch.ones(5)),
        ValueError,
        ("lm_head_fisher", "mask", "(2, 3)"),
    ),
    "head dtypes": (
        lambda: F.lm_head_fisher(A, torch.randn(7, 4).double()),
        TypeError,
        ("lm_head_fisher", "weight", "float64"),
    ),
    "head chunk": (
        lambda: F.lm_head_fisher(A, torch.randn(7, 4), token_chunk=0),
        ValueError,
        ("lm_head_fisher", "token_chunk", ">= 1", "0"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(call, error, words)
