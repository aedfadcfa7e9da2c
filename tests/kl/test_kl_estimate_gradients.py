"""What the docstring of kl_estimate says of gradients, by the sum over a small vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fasttax

V = 7


def logits(seed: int, trains: bool = False) -> Tensor:
    x = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(trains)


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def kl(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def expected(kind: str, x: Tensor, y: Tensor, old: Tensor | None, grad: str) -> Tensor:
    """The mean of the estimate over every token, weighed by the weights that sample."""
    logp = x.log_softmax(-1)
    sampler = logp.detach() if old is None else old.log_softmax(-1)
    estimate = fasttax.kl_estimate(
        logp,
        y.log_softmax(-1),
        kind=kind,
        old_logp=None if old is None else sampler,
        grad=grad,
    )
    return (sampler.exp() * estimate).sum()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("sampled", ["", "present", "older"])
def test_the_gradient_is_what_the_docstring_says(kind: str, sampled: str) -> None:
    x, y = logits(0, True), logits(1)
    old = {"": None, "present": x.detach(), "older": logits(2)}[sampled]
    reverse, forward = gradient_of(kl(x, y), x), gradient_of(kl(y, x), x)
    r = y.log_softmax(-1) - x.log_softmax(-1)
    square = gradient_of((x.log_softmax(-1).exp() * r * r / 2).sum(), x)
    zero = torch.zeros_like(reverse)
    wanted = {"k1": reverse, "k2": square, "k3": reverse}
    if not sampled:
        wanted = {"k1": zero, "k2": reverse, "k3": forward}
    found = gradient_of(expected(kind, x, y, old, "estimator"), x)
    assert torch.allclose(found, wanted[kind], rtol=0, atol=1e-12)
    assert float((square - reverse).norm() / reverse.norm()) > 0.1
    found = gradient_of(expected(kind, x, y, old, "reverse_kl"), x)
    assert torch.allclose(found, reverse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_value_is_the_kl(kind: str) -> None:
    x, y = logits(0), logits(1)
    for old in (None, logits(2)):
        found = expected(kind, x, y, old, "estimator")
        assert float(found) == pytest.approx(float(kl(x, y)), rel=1e-12)
