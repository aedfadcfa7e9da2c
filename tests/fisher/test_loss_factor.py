"""A cross-entropy inside observe() that is a multiple of its sum is refused; nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, causal_lm, fisher_of, ids, loop, rows_of

Losses = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), labels (N,) -> a loss
X = ids(3, 9)
PADDED = X.masked_fill(torch.arange(9) > torch.tensor([[8], [5], [3]]), -100)


def nll(reduction: str, **options: Any) -> Losses:
    return lambda logits, y: F.cross_entropy(
        logits, y, reduction=reduction, ignore_index=-100, **options
    )


def observed(model: Any, loss: Losses, x: Tensor = X, **options: Any) -> Any:
    estimator = DiagonalFisher(model, labels="true", **options)
    with estimator.observe():
        loss(model(x).logits[:, :-1].flatten(0, 1), PADDED[:, 1:].flatten()).backward()
    assert estimator.examples == 3
    return estimator.finalize("sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (nll("mean"), "0.0625"),  # 16 tokens
        (lambda logits, y: nll("sum")(logits, y) / 8, "0.125"),
        (lambda logits, y: nll("sum")(logits.float(), y) * 1024, "1.02e\\+03"),
    ],
)
def test_a_mean_or_a_factor_is_refused(loss: Losses, factor: str, dtype: torch.dtype) -> None:
    model = causal_lm("llama", dtype)
    words = rf"got a cross-entropy of {factor} times its sum.*reduction='sum'.*loss="
    with pytest.raises(ValueError, match=words):
        observed(model, loss)
    observed(model, loss, verify=False)  # where it is meant


def test_transformers_own_loss_is_a_mean() -> None:
    model = causal_lm("gpt2")
    estimator = DiagonalFisher(model, labels="true")
    with (
        pytest.raises(ValueError, match=r"times its sum, whose squares are 0\.00"),
        estimator.observe(),
    ):
        model(input_ids=X, labels=PADDED).loss.backward()
    assert estimator.examples == 0
    with estimator.observe():
        nll("sum")(model(X).logits[:, :-1].flatten(0, 1), X[:, 1:].flatten()).backward()
    assert_exact(estimator.finalize("sum"), loop(model, rows_of(X)))


@pytest.mark.parametrize(
    "loss",
    [
        nll("sum"),
        nll("sum", label_smoothing=0.1),
        lambda logits, y: (nll("none")(logits, y) * torch.linspace(-1, 2, len(y))).sum(),
        lambda logits, y: logits.square().mean(),
        lambda logits, y: torch.logsumexp(logits, -1).mean(),
    ],
)
def test_sums_weights_and_other_losses_are_taken(loss: Losses) -> None:
    """Weights of tokens are a policy gradient's; what is no cross-entropy shows no factor."""
    found, blind = (observed(causal_lm("llama"), loss, verify=v) for v in (True, False))
    assert_exact(found, dict(blind))


def test_parts_of_a_loss_in_several_backwards_are_taken() -> None:
    model = causal_lm("llama")
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        value = nll("sum")(model(X).logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())
        (value / 4).backward(retain_graph=True)
        (value * 3 / 4).backward()
    assert_exact(estimator.finalize("sum"), fisher_of(model, X))
