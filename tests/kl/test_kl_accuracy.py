"""8192 rows of every kind of data: errors of value and gradient beside eager PyTorch's.

The median, the 90th and 99th percentile and the largest, against float64 on the same logits. What
is allowed beside PyTorch's own is a rounding of the result: equal rows, whose KL is 0, have none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fasttax

ROWS, PIECE, V = 8192, 1024, 2600  # more than a chunk of any instruction set
QUANTILES = torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps
KINDS = ("policy_ref", "ref_policy", "jsd")
DATA = ("equal", "moved .01", "moved .1", "moved .3", "confident", "far")


def divergence(x: Tensor, y: Tensor, kind: str) -> Tensor:
    lp, lq = x.log_softmax(-1), y.log_softmax(-1)
    if kind == "policy_ref":
        return (lp.exp() * (lp - lq)).sum(-1)
    if kind == "ref_policy":
        return (lq.exp() * (lq - lp)).sum(-1)
    m = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0, dtype=x.dtype))
    return ((lq.exp() * (lq - m)).sum(-1) + (lp.exp() * (lp - m)).sum(-1)) / 2


def composed(x: Tensor, y: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = x.to(dtype, copy=True).requires_grad_(), y.to(dtype)
    value = divergence(x, y, kind)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double(), gradient.double()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_no_larger_than_pytorchs(
    kind: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from bench import logits

    errors: dict[str, list[Tensor]] = {"ours": [], "eager": [], "size": []}
    slopes: dict[str, list[Tensor]] = {name: [] for name in errors}
    x, y = logits.pair(data, ROWS, V, torch.float32)
    for a, b in zip(x.split(PIECE), y.split(PIECE), strict=True):
        truth, slope = composed(a, b, kind, torch.float64)
        value, gradient = composed(a, b, kind, torch.float32)
        leaf = a.clone().requires_grad_()
        own = fasttax.token_kl(leaf, b, kind=kind)
        own.sum().backward()
        assert leaf.grad is not None
        for name, found in (("ours", own.detach()), ("eager", value)):
            errors[name].append((found.double() - truth).abs())
        errors["size"].append(truth.abs())
        for name, found in (("ours", leaf.grad), ("eager", gradient)):
            slopes[name].append((found.double() - slope).norm(dim=-1))
        slopes["size"].append(slope.norm(dim=-1))
    for of in (errors, slopes):
        ours, eager, size = (torch.cat(of[name]).quantile(QUANTILES) for name in of)
        assert (ours <= 2 * eager + 4 * EPS * size).all(), (ours, eager, size)
