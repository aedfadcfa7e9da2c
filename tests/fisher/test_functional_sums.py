"""Sums of squares over many examples, and tensors that the ops can't take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax import functional
from fasttax._base import library

INTERPRETED = ("bias_sqgrad_", "CPU") in library.on_triton
MANY = 3000 if INTERPRETED else 200_000


def _ids(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias": functional.bias_sqgrad,
    "norm": lambda d: functional.norm_sqgrad(torch.ones_like(d), d),
    "embedding": lambda d: functional.embedding_sqgrad(_ids(len(d)), d, 2)[0],
    "linear": lambda d: functional.linear_sqgrad(torch.ones(len(d), 1), d)[:, 0],
    # of examples of two tokens, and of 20, of which all but one are 0
    "linear of 2": lambda d: functional.linear_sqgrad(*_tokens(d, 2))[:, 0],
    "linear of 20": lambda d: functional.linear_sqgrad(*_tokens(d, 20))[:, 0],
}


def _tokens(d: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of examples whose first token has all that there is."""
    rows = torch.zeros(len(d), count, d.shape[1])
    rows[:, 0] = d
    return torch.ones(len(d), count, 1), rows


@pytest.mark.parametrize("width", [2, 70])  # vectors and what is left of them
@pytest.mark.parametrize("op", SUMS)
def test_many_examples_keep_their_digits(op: str, width: int) -> None:
    """Equal examples round one way: one by one in float32, 2e5 of them are 1.5e-3 off."""
    n = MANY if width == 2 and op != "linear of 20" else MANY // 10
    d = torch.full((1, width), 0.3).expand(n, width)
    truth = n * float(torch.tensor(0.3)) ** 2
    error = (SUMS[op](d.contiguous()).double() / truth - 1).abs().max()
    assert error < 3e-6


@pytest.mark.parametrize("op", ["bias", "norm"])
def test_long_examples_keep_their_digits(op: str) -> None:
    n = MANY // 10
    d = torch.full((1, n, 70), 0.3)
    truth = (n * float(torch.tensor(0.3))) ** 2
    assert (SUMS[op](d).double() / truth - 1).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("V", [3, 5000])
def test_words_of_many_examples(V: int, dtype: torch.dtype) -> None:
    """Every order of words and examples, weights, and a row that takes none."""
    n, t, width = 70, 5, 67
    ids = torch.randint(0, V, (n, t))
    ids[:, 0] = V - 1
    d, weight = torch.randn(n, t, width).to(dtype), torch.rand(n)
    truth = torch.zeros(V, width, dtype=torch.float64)
    for i in range(n):
        rows = torch.zeros(V, width, dtype=torch.float64)
        rows.index_add_(0, ids[i], d[i].double())
        truth += float(weight[i]) * rows.square()
    truth[1] = 0
    got = functional.embedding_sqgrad(ids, d, V, example_weight=weight, padding_idx=1)
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=2e-6 * float(truth.max()))
    out = torch.ones_like(got)
    functional.embedding_sqgrad(ids, d, V, example_weight=weight, padding_idx=1, out=out)
    torch.testing.assert_close(out, got + 1)


# tensors that are not laid out by strides

X = torch.randn(4, 8)
DENSE = {
    "linear_sqgrad": lambda t: functional.linear_sqgrad(t, X),
    "linear_sqgrad_gradient": lambda t: functional.linear_sqgrad(X, t),
    "bias_sqgrad": functional.bias_sqgrad,
    "norm_sqgrad": lambda t: functional.norm_sqgrad(t, X),
    "embedding_sqgrad": lambda t: functional.embedding_sqgrad(_ids(4), t, 9),
    "lm_head_fisher": lambda t: functional.lm_head_fisher(t, torch.randn(9, 8)),
    "lm_head_fisher_weight": lambda t: functional.lm_head_fisher(torch.randn(3, 8), t),
    "accumulate_sqgrad_": lambda t: functional.accumulate_sqgrad_([torch.zeros(4, 8)], [t]),
    "accumulate_sqgrad_sum": lambda t: functional.accumulate_sqgrad_([t], [X]),
    "token_kl": lambda t: fasttax.token_kl(t, X),
    "token_kl_of_the_reference": lambda t: fasttax.token_kl(X, t),
    "token_stats": lambda t: fasttax.token_stats(t, None, _ids(4)),
    "topk_logprobs": lambda t: fasttax.topk_logprobs(t, 2),
    "topk_kl": lambda t: fasttax.topk_kl(t, X[:, :2], _ids(8).view(4, 2)),
    "linear_token_kl": lambda t: fasttax.linear_token_kl(t, X, X, X),
    "linear_token_logprobs": lambda t: fasttax.linear_token_logprobs(X, t, _ids(4)),
    "kl_estimate": lambda t: fasttax.kl_estimate(t, X),
    "ewc_penalty": lambda t: functional.ewc_penalty([t], [X], [X.abs()], 1.0),
    "ewc_add_grad_": lambda t: functional.ewc_add_grad_([X], [t], [X], [X.abs()], 1.0),
    "ewc_prox_": lambda t: functional.ewc_prox_([X.clone()], [t], [X.abs()], 1.0),
    "lora_ewc_penalty": lambda t: functional.lora_ewc_penalty(t, X.T, torch.rand(8, 8), 1.0, 1.0),
    "example_weight": lambda t: functional.bias_sqgrad(torch.ones(32, 2), example_weight=t),
    "mask": lambda t: fasttax.token_kl(X[None], X[None], mask=t),
}


def _layouts(x: Tensor) -> list[Tensor]:
    layouts = [x.to_sparse(), x.to_sparse_csr()]
    if torch.backends.mkldnn.is_available():
        layouts.append(x.to_mkldnn())
    return layouts


@pytest.mark.parametrize("op", DENSE)
def test_other_layouts_are_refused(op: str) -> None:
    """Read as if they lay by strides, they end the process."""
    for t in _layouts(X):
        with pytest.raises((TypeError, ValueError), match="expected") as raised:
            DENSE[op](t)
        if isinstance(raised.value, TypeError):
            assert "to_dense()" in str(raised.value)
            assert torch.equal(t.to_dense(), X)
    quantised = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    with pytest.raises((TypeError, ValueError), match="expected"):
        DENSE[op](quantised)


@pytest.mark.parametrize("op", ["bias_sqgrad", "norm_sqgrad", "linear_sqgrad", "embedding_sqgrad"])
def test_no_dimensions(op: str) -> None:
    none = torch.tensor(1.0)
    calls = {
        "bias_sqgrad": lambda: functional.bias_sqgrad(none),
        "norm_sqgrad": lambda: functional.norm_sqgrad(none, none),
        "linear_sqgrad": lambda: functional.linear_sqgrad(none, none),
        "embedding_sqgrad": lambda: functional.embedding_sqgrad(torch.tensor(0), none, 3),
    }
    with pytest.raises(ValueError, match=f"{op}: "):
        calls[op]()


def test_one_sum_is_written_once() -> None:
    total, grad = torch.zeros(6), torch.ones(3)
    for sums in ([total[:3], total[:3]], [total[:3], total[2:5]], [total[3:], total[1:4]]):
        with pytest.raises(ValueError, match=r"accumulate_sqgrad_: sums\[1\].*once"):
            functional.accumulate_sqgrad_(sums, [grad, grad])
    functional.accumulate_sqgrad_([total[:3], total[3:]], [grad, grad])
    assert torch.equal(total, torch.ones(6))
    with pytest.raises(ValueError, match=r"ewc_add_grad_: grads\[1\]"):
        functional.ewc_add_grad_([grad, grad], [total[:3]] * 2, [grad] * 2, [grad] * 2, 1.0)
    with pytest.raises(ValueError, match=r"ewc_prox_: params\[1\]"):
        functional.ewc_prox_([total[:3]] * 2, [grad] * 2, [grad] * 2, 1.0)
