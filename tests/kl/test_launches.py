"""How many device operations the functions of tokens are, forward and backward, and that none is a
host sync: a number each, that a change must hold.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl.token_stats import OUTPUTS
from tests.tools.launches import META, SYNCS, Launches, launches, logits, numbers
from tests.tools.launches import on_nvidia as on_nvidia

REDUCED = ("sum", "mean")
TOKENS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": numbers(dtype=torch.bool)},
    "weight": {"weight": numbers()},
    "scale": {"scale": 0.3},
    "all": {"mask": numbers(dtype=torch.bool), "weight": numbers(), "scale": 0.3},
}
# the tokens' weights, values and gradients by one sweep, their sum; and a kernel that goes over
# nothing where the factor from above is 1
TOTAL = ["token_weights", "token_kl_grad", "weigh_tokens", "scale_held_"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("reduction", REDUCED)
def test_token_kl_reduced(reduction: str, tokens: str) -> None:
    x, y, options = logits(), logits(requires_grad=False), TOKENS[tokens]
    assert launches(lambda: fasttax.token_kl(x, y, reduction=reduction, **options)) == TOTAL


@pytest.mark.parametrize("tokens", TOKENS)
def test_token_kl(tokens: str) -> None:
    x, y, options = logits(), logits(requires_grad=False), TOKENS[tokens]
    seen = launches(lambda: fasttax.token_kl(x, y, **options))
    if tokens in ("plain", "mask"):
        assert seen == ["token_kl", "token_kl_backward"]
    else:
        assert seen == ["token_kl", "weigh_tokens", "weigh_tokens_backward", "token_kl_backward"]


STATS = ["token_stats", "weigh_tokens", "weigh_tokens_backward", "token_stats_backward"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("reduction", ["none", *REDUCED])
@pytest.mark.parametrize(
    "outputs", [("logp", "entropy", "kl", "k3"), ("logp", "ref_logp", "entropy", "lse", "kl", "k1")]
)
def test_token_stats(outputs: tuple[str, ...], reduction: str, tokens: str) -> None:
    """Of bfloat16 logits each sweep reads 4 bytes an entry, and the second writes 2: 10 in all."""
    x, y, options = logits(), logits(requires_grad=False), TOKENS[tokens]
    ids = numbers(dtype=torch.int64)

    def call() -> list[Tensor]:
        stats = fasttax.token_stats(x, y, ids, outputs=outputs, reduction=reduction, **options)
        return [getattr(stats, name) for name in outputs]

    assert launches(call) == STATS


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_of_token_stats(name: str) -> None:
    x, y, ids = logits(), logits(), numbers(dtype=torch.int64)

    def call() -> Tensor:
        value: Tensor = getattr(
            fasttax.token_stats(x, y, ids, outputs=name, scale=0.3, reduction="mean"), name
        )
        return value

    seen = launches(call)
    if name.startswith("kl"):  # token_kl's cheaper sweep
        assert seen == ["token_kl", "weigh_tokens", "weigh_tokens_backward", "token_kl_backward"]
    elif name in ("k1", "k2", "k3"):  # each model's rows alone
        assert seen == ["token_stats", *STATS, "token_stats_backward"]
    else:
        assert seen == STATS


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("grad", ["estimator", "reverse_kl"])
@pytest.mark.parametrize("reduction", ["none", *REDUCED])
def test_kl_estimate(reduction: str, grad: str, kind: str) -> None:
    for options, has_old in itertools.product(TOKENS.values(), (False, True)):
        logp, ref, old = (numbers(requires_grad=True) for _ in range(3))
        old_logp = old if has_old else None
        call = partial(fasttax.kl_estimate, kind=kind, grad=grad, reduction=reduction, **options)
        seen = launches(partial(call, logp, ref, old_logp=old_logp))
        assert seen == ["weigh_tokens", "weigh_tokens_backward"]


TOP_K = {"ghost": 70, "renormalize": 44}  # some of V entries a token, most of k


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_topk_kl(tail: str) -> None:
    x = logits()
    logp = torch.empty(64, 20, device=META)
    ids = torch.empty(64, 20, device=META, dtype=torch.int64)
    mask = numbers(dtype=torch.bool)
    seen = launches(
        lambda: fasttax.topk_kl(x, logp, ids, tail=tail, mask=mask, reduction="mean", scale=0.3)
    )
    assert len(seen) == TOP_K[tail]


def operands(trains: bool) -> list[Tensor]:
    def of(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=requires_grad)

    head = of(1000, 32, requires_grad=trains)
    return [of(64, 32, requires_grad=True), head, of(64, 32), of(1000, 32)]


LINEAR = {  # (the head trains, reduction, grad_mode) -> launches
    (True, "mean", "auto"): 13,
    (True, "none", "auto"): 14,
    (False, "mean", "auto"): 11,
    (False, "none", "auto"): 11,
    (True, "mean", "recompute"): 14,
}


@pytest.mark.usefixtures("on_nvidia")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_token_kl(case: tuple[bool, str, str], masked: bool) -> None:
    trains, reduction, grad_mode = case
    tensors, mask = operands(trains), numbers(dtype=torch.bool) if masked else None

    def call() -> Tensor:
        value: Tensor = fasttax.linear_token_kl(
            *tensors, reduction=reduction, grad_mode=grad_mode, mask=mask, scale=0.3
        )
        return value

    # where the head trains, hidden states get 0 under the mask, and their gradient
    assert len(launches(call)) == LINEAR[case] + 3 * (masked and trains)


LOGPROBS = {
    (True, "mean", "auto"): 14,
    (True, "none", "auto"): 12,
    (False, "mean", "auto"): 12,
    (False, "none", "auto"): 12,
}


@pytest.mark.usefixtures("on_nvidia")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", LOGPROBS, ids=str)
def test_linear_token_logprobs(case: tuple[bool, str, str], masked: bool) -> None:
    trains, reduction, grad_mode = case
    hidden, head, *_ = operands(trains)
    ids, mask = numbers(dtype=torch.int64), numbers(dtype=torch.bool) if masked else None

    def call() -> Tensor:
        stats = fasttax.linear_token_logprobs(
            hidden, head, ids, reduction=reduction, grad_mode=grad_mode, mask=mask, scale=0.3
        )
        assert stats.logp is not None
        return stats.logp

    assert len(launches(call)) == LOGPROBS[case] + 3 * (masked and trains)


def test_a_sync_is_seen() -> None:
    x = numbers()
    for sync in (lambda: x.float() * float(x[0]), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Launches():
            sync()
    assert "nonzero" in SYNCS
