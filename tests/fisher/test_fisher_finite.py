"""Losses and gradients that are not finite: named, and nothing of them in an estimate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fasttax
from fasttax import DiagonalFisher


def test_a_batch_that_is_not_finite_is_named_and_not_counted() -> None:
    """One such batch made every value of an estimate NaN, which nothing could load."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    odd = x.clone()
    odd[1, 0], odd[4, 2] = torch.nan, torch.inf
    estimator = DiagonalFisher(model, labels="true")
    estimator.update((x, labels))
    with pytest.raises(ValueError, match="logits are finite, got NaN or inf in rows 1, 4"):
        estimator.update((odd, labels))
    once = fasttax.estimate_fisher(model, [(x, labels)], labels="true", progress=False)
    for name, value in estimator.finalize().items():
        assert torch.equal(value, once[name])


def test_an_estimate_that_is_not_finite_is_not_given_out() -> None:
    """Of gradients that overflow under finite logits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).half()
    x = torch.randn(2, 4)
    estimator = DiagonalFisher(model, labels="true", verify=False)
    for scale in (1.0, 1e38):
        with estimator.observe():
            (model(x.half()).float() * scale).sum().backward()
    with pytest.raises(ValueError, match=r"finite squares, got NaN or infinite ones of 0\.weight"):
        estimator.finalize()
