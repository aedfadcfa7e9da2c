"""What masks and attention masks may hold: the same everywhere, with the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax import functional
from fasttax.integrations import rlhf
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.to_base import kl_to_base
from tests.tools import tiny_lm

X = torch.randn(2, 3, 7)
HIDDEN, HEAD = torch.randn(2, 3, 4), torch.randn(7, 4)
IDS = torch.zeros(2, 3, dtype=torch.int64)
LOGP = torch.log_softmax(X, -1)
ALL = torch.arange(7).expand(2, 3, 7)
ROWS = tiny_lm.ids(2, 3)

MASKS: dict[str, Callable[[Tensor], Any]] = {
    "token_kl": lambda m: fasttax.token_kl(X, X.flip(0), mask=m),
    "token_stats": lambda m: fasttax.token_stats(X, ids=IDS, mask=m).logp,
    "kl_estimate": lambda m: fasttax.kl_estimate(X[..., 0], X[..., 1], mask=m),
    "topk_kl": lambda m: fasttax.topk_kl(X, LOGP, ALL, mask=m),
    "linear_token_kl": lambda m: fasttax.linear_token_kl(HIDDEN, HEAD, HIDDEN, -HEAD, mask=m),
    "linear_token_logprobs": lambda m: (
        fasttax.linear_token_logprobs(HIDDEN, HEAD, IDS, mask=m).logp
    ),
    "lm_head_fisher": lambda m: functional.lm_head_fisher(HIDDEN, HEAD, mask=m),
    "response_kl": lambda m: rlhf.response_kl(X, X.flip(0), m),
}


def _batch(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ROWS, "attention_mask": mask}


ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "Fisher": lambda m: fasttax.estimate_fisher(tiny_lm.model(), [_batch(m)], progress=False),
    "kl_to_base": lambda m: kl_to_base(tiny_lm.model(), tiny_lm.model(1), [_batch(m)]),
    "cache": lambda m: TopKReference.make(tiny_lm.model(), ROWS.tolist(), k=2).rows(ROWS, m),
}
WRONG = {
    "labels": torch.tensor([[5, -100, 3], [-100, 4, 2]]),
    "fractions": torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]]),
    "scores": torch.tensor([[0.0, -1e4, 0.0], [0.0, 0.0, 0.0]]),
    "nan": torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]]),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, what: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"mask: expected bool, or 0 and 1, got a value of (-100|0.5|-10000|nan); of labels "
        "pass mask=labels != -100",
    ) as caught:
        MASKS[name](WRONG[what])
    factors = re.search(r"factors are (\w+)=", str(caught.value))
    if name == "lm_head_fisher":
        assert factors is None  # its weight= is the head
    else:
        assert factors is not None
        wanted = "token_weight" if name.startswith("linear") else "weight"
        assert factors[1] == wanted


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_masks(name: str, what: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"attention_mask'?\]?: expected bool, or 0 and 1, got a value of .*; pass 1 for "
        "tokens and 0 for padding",
    ):
        ATTENTION[name](WRONG[what])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("name", MASKS)
def test_which_tokens_count(name: str, dtype: torch.dtype) -> None:
    """Packed documents' numbers are in; 0 is out."""
    documents = torch.tensor([[0, 1, 2], [3, 0, 1]])
    found = MASKS[name](documents.to(dtype))
    assert torch.equal(found, MASKS[name](documents > 0))
    assert not torch.equal(found, MASKS[name](documents >= 0))
