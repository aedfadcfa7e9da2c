"""topk_kl and kl_estimate on lists and log-probs as servers and samplers give them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fasttax
from tests.tools.kl_cases import INF


def _rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 6, 50, dtype=torch.float64) * 2
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("offset", [0.0, 300.0, 1000.0, -1000.0])
def test_offsets_cost_no_digits(offset: float) -> None:
    y = torch.randn(256, 1000) * 2 + offset
    truth = y.double().log_softmax(-1).topk(8)[0]
    eager = (y.log_softmax(-1).topk(8)[0].double() - truth).abs().max()
    logp, ids = fasttax.topk_logprobs(y, 8)
    assert (logp.double() - truth).abs().max() <= 4 * eager
    x = torch.randn(256, 1000) * 2 + offset
    for options in ({}, {"temperature": 0.7}, {"logit_scale": 1.5}):
        want = fasttax.topk_kl(x.double(), truth, ids, **options)
        scale = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
        lp = ((x - x.amax(-1, keepdim=True)) * scale).double().log_softmax(-1)
        own = ((x * scale).log_softmax(-1).double() - lp).abs().max()
        got = fasttax.topk_kl(x, truth.float(), ids, **options)
        assert (got.double() - want).abs().max() <= 4 * own + 1e-5 * want.max()


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
def test_repeated_and_padded_entries_are_none(kind: str, tail: str) -> None:
    x, y = _rows()
    logp, ids = fasttax.topk_logprobs(y, 4)
    x.requires_grad_()

    def value(logp: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        kl = fasttax.topk_kl(x, logp, ids, kind=kind, tail=tail)
        return kl.detach(), torch.autograd.grad(kl.sum(), x)[0]

    want = value(logp, ids)
    none = torch.full((6, 1), -INF, dtype=logp.dtype)
    for again, more, fill in (
        ([1, 0, 1, 2, 3], None, 0),  # the sampled token in front
        ([0, 0, 0, 1, 2, 3, 3], None, 0),
        ([3, 2, 1, 0], None, 0),  # in any order
        ([0, 1, 2, 3], 1, 0),  # filled up with an id that may be another entry's, or none's
        ([0, 1, 2, 3], 3, 49),
        ([0, 1, 2, 3], 2, -1),
        ([0, 1, 2, 3], 2, 10**6),
    ):
        a, b = logp[:, again], ids[:, again]
        if more is not None:
            a = torch.cat((a, none.expand(6, more)), -1)
            b = torch.cat((b, torch.full((6, more), fill)), -1)
        for got, right in zip(value(a, b), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)
    # an entry and its padding under one id
    value(torch.cat((none, logp), -1), torch.cat((ids[:, 3:], ids), -1))


def test_lists_of_unequal_length() -> None:
    x, y = _rows()
    logp, ids = fasttax.topk_logprobs(y, 5)
    ragged, padded, lengths = logp.clone(), ids.clone(), (5, 1, 3, 2, 4, 5)
    for n, length in enumerate(lengths):
        ragged[n, length:], padded[n, length:] = -INF, 0
    got = fasttax.topk_kl(x, ragged, padded)
    for n, length in enumerate(lengths):
        want = fasttax.topk_kl(x[n], logp[n, :length], ids[n, :length])
        torch.testing.assert_close(got[n], want, rtol=1e-9, atol=0)
    nothing = fasttax.topk_kl(x, torch.full_like(logp, -INF), ids)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_a_complete_list_keeps_its_infinities() -> None:
    """At k = V an entry of -inf is a token that the reference rules out."""
    x, y = _rows()
    y[:, 7] = -INF
    full = fasttax.topk_logprobs(y, 50)
    for kind in ("policy_ref", "ref_policy", "jsd"):
        torch.testing.assert_close(
            fasttax.topk_kl(x, *full, kind=kind), fasttax.token_kl(x, y, kind=kind)
        )
    assert (fasttax.topk_kl(x, *full, kind="policy_ref") == INF).all()


def test_ids_of_a_larger_vocabulary() -> None:
    """The message speaks of the vocabulary, not of tokens without a label."""
    x, y = _rows()
    logp, ids = fasttax.topk_logprobs(torch.cat((y, y + 3), -1), 4)
    with pytest.raises(IndexError, match=r"vocabulary of logits has 50.*tokenizer") as raised:
        fasttax.topk_kl(x, logp, ids)
    assert "mask=" not in str(raised.value)
    with pytest.raises(IndexError, match=r"mask="):
        fasttax.token_stats(x, None, torch.full((6,), -100))
    label = torch.full((6,), -100)
    out = fasttax.token_stats(x, None, label, mask=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(out.logp, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize(
    "shapes", [((), (), ()), ((5,), (), ()), ((2, 5), (2, 0), (2, 0)), ((2, 5), (2, 6), (2, 6))]
)
def test_lists_without_a_place(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, logp, ids = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="topk_kl: "):
        fasttax.topk_kl(x, logp, ids.long())
    with pytest.raises(ValueError, match="token_kl: ref_logits"):
        fasttax.token_kl(torch.zeros(5), torch.tensor(0.0))


# estimates from log-probs


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("grad", ["estimator", "reverse_kl"])
def test_impossible_tokens_are_no_nan(kind: str, grad: str) -> None:
    lows = torch.tensor([-INF, -INF, -2.0, -INF])
    refs = torch.tensor([-3.0, -0.1, -INF, -INF])
    for old in (None, torch.tensor([-1.0, -5.0, -2.0, -1.0])):
        logp = lows.clone().requires_grad_()
        value = fasttax.kl_estimate(logp, refs, kind=kind, grad=grad, old_logp=old)
        assert not value.isnan().any()
        assert not torch.autograd.grad(value.sum(), logp)[0].isnan().any()
        if old is None and kind == "k3":
            assert (value[:3] == INF).all()
            assert value[3] == 0


@pytest.mark.parametrize("clip", [0.3, 5.0, 20.0])
def test_the_clip_itself_counts_one_gradient(clip: float) -> None:
    clip = float(torch.tensor(clip))
    for r, slope in ((clip, math.exp(clip) - 1), (-clip, math.exp(-clip) - 1)):
        logp = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
        ref = torch.tensor([r], dtype=torch.float64)
        value = fasttax.kl_estimate(logp, ref, kind="k3", clip=clip)
        torch.testing.assert_close(float(value), math.exp(r) - 1 - r)
        torch.testing.assert_close(float(torch.autograd.grad(value, logp)[0]), -slope)
        weighed = fasttax.kl_estimate(
            logp, torch.ones_like(ref), kind="k1", clip=clip, old_logp=-ref
        )
        (d,) = torch.autograd.grad(weighed, logp)
        # (logp - 1) e^(logp + r) at logp = 0; the ratio counted twice would leave -e^r
        assert abs(float(d)) < 1e-9 * math.exp(clip)
    beyond = torch.tensor([clip + 1.0, clip + 2.0, clip + 3.0], dtype=torch.float64)
    steps = fasttax.kl_estimate(torch.zeros(3, dtype=torch.float64), beyond, clip=clip).diff()
    if clip > 0.5:
        torch.testing.assert_close(steps, torch.full_like(steps, math.exp(clip) - 1))


@pytest.mark.parametrize("wrong", ["probabilities", "logits", "tempered"])
def test_lists_that_are_no_log_probs(wrong: str) -> None:
    """Refused on a CPU; NaN where a look would be a sync, and no values are there to look at."""
    x, y = _rows()
    logp, ids = fasttax.topk_logprobs(y, 8)
    lists = {
        "probabilities": logp.exp(),
        "logits": y.gather(-1, ids) + 3,
        "tempered": logp / 4,
    }[wrong]
    with pytest.raises(ValueError, match=r"topk_kl: ref_topk_logp: expected log-probs.*sum to"):
        fasttax.topk_kl(x, lists, ids)
    there = torch.func.vmap(fasttax.topk_kl)(x, lists, ids)
    assert bool(there.isnan().all())
    masked = fasttax.topk_kl(x, lists, ids, mask=torch.zeros(len(x)))
    assert torch.equal(masked, torch.zeros_like(masked))


def test_log_probs_in_bfloat16_are_log_probs() -> None:
    """Their mass is off by some percent, whatever the distribution."""
    for scale in (0.0, 1.0, 30.0):
        logp, ids = fasttax.topk_logprobs(scale * torch.randn(64, 5000), 5000)
        assert bool(fasttax.topk_kl(torch.randn(64, 5000), logp.bfloat16(), ids).isfinite().all())
