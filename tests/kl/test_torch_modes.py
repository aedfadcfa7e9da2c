"""Tensors of torch.inference_mode and FakeTensorMode, and results that carry no graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fasttax

N, V, H = 4, 9, 5
Call = Callable[[Tensor, Tensor, Tensor], Tensor]

KEEPS: dict[str, tuple[str, Call]] = {
    "token_kl": ("ref_logits", lambda x, y, ids: fasttax.token_kl(x, y)),
    "inplace": ("ref_logits", lambda x, y, ids: fasttax.token_kl(x * 1, y, inplace_backward=True)),
    "mask": ("mask", lambda x, y, ids: fasttax.token_kl(x, y.clone(), mask=ids.bool())),
    "weight": ("weight", lambda x, y, ids: fasttax.token_kl(x, y.clone(), weight=y[:, 0])),
    "stats": ("ref_logits", lambda x, y, ids: only(fasttax.token_stats(x, y, outputs=("kl",)).kl)),
    "ids": ("ids", lambda x, y, ids: only(fasttax.token_stats(x, None, ids).logp)),
    "linear": ("ref_hidden", lambda x, y, ids: fasttax.linear_token_kl(x, x[:3], y, y[:3])),
    "penalty": (
        "anchors[0]",
        lambda x, y, ids: fasttax.functional.ewc_penalty([x], [y], [y * y], 1.0),
    ),
}


def only(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@pytest.mark.parametrize("call", KEEPS)
def test_what_inference_mode_made_is_named_where_a_backward_wants_it(call: str) -> None:
    argument, fn = KEEPS[call]
    with torch.inference_mode():
        y, ids = torch.randn(N, V), torch.arange(N)
        mask = ids > 0
        assert torch.isfinite(fn(torch.randn(N, V), y, ids)).all()
    x = torch.randn(N, V, requires_grad=True)
    if call == "mask":
        fn = lambda x, y, ids: fasttax.token_kl(x, y.clone(), mask=mask)  # noqa: E731
    with pytest.raises(ValueError, match="inference_mode") as error:
        fn(x, y, ids)
    assert argument in str(error.value)
    with torch.no_grad():
        assert torch.isfinite(fn(x, y, ids)).all()
    assert torch.isfinite(fn(x.detach(), y, ids)).all()  # nothing is kept


def test_a_gradient_made_in_the_forward_keeps_no_reference() -> None:
    with torch.inference_mode():
        y = torch.randn(N, V)
    x = torch.randn(N, V, requires_grad=True)
    fasttax.token_kl(x, y, reduction="mean").backward()
    stats = fasttax.token_stats(x, y, torch.arange(N), outputs=("k3",))
    only(stats.k3).sum().backward()


def test_fake_tensors_have_no_values_to_look_at() -> None:
    with FakeTensorMode():
        x, y = torch.empty(N, V, requires_grad=True), torch.empty(N, V)
        ids, mask = torch.empty(N, dtype=torch.long), torch.empty(N)
        h, w = torch.empty(N, H, requires_grad=True), torch.empty(V, H, requires_grad=True)
        for reduction in ("none", "mean"):
            losses = [
                fasttax.token_kl(x, y, mask=mask, reduction=reduction),
                fasttax.linear_token_kl(h, w, h, w, mask=mask, reduction=reduction),
                only(fasttax.linear_token_logprobs(h, w, ids, mask=mask, reduction=reduction).logp),
                only(fasttax.token_stats(x, y, ids, outputs=("k3",), reduction=reduction).k3),
                fasttax.topk_kl(x, *fasttax.topk_logprobs(y, 3), reduction=reduction),
            ]
            assert {loss.shape for loss in losses} == {(N,) if reduction == "none" else ()}
            torch.stack([loss.sum() for loss in losses]).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        sums = fasttax.functional.embedding_sqgrad(ids, h.detach(), V)
        head = fasttax.functional.lm_head_fisher(h, w, mask=mask)
        assert sums.shape == head.shape == (V, H)


@pytest.mark.parametrize("trains", [False, True])
def test_log_probs_of_a_frozen_reference_hold_no_graph(trains: bool) -> None:
    x = torch.randn(N, V, requires_grad=True)
    y = torch.randn(N, V, requires_grad=trains)
    stats = fasttax.token_stats(x, y, torch.arange(N), outputs=("logp", "ref_logp", "kl"))
    assert only(stats.logp).requires_grad
    assert only(stats.ref_logp).requires_grad == trains
    weight = torch.rand(N, requires_grad=True)
    weighed = fasttax.token_stats(x, y, torch.arange(N), outputs=("ref_logp", "kl"), weight=weight)
    (of_weight,) = torch.autograd.grad(only(weighed.ref_logp).sum(), weight)
    torch.testing.assert_close(of_weight, only(stats.ref_logp).detach())
