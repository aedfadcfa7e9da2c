"""token_stats, kl_estimate and the top-k reference against float64 formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl.token_stats import OUTPUTS
from tests.tools.utils import assert_within, own_result

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("policy_ref", "ref_policy", "jsd")


def temper(z: Tensor, scale: float, cap: float | None, temperature: float) -> Tensor:
    z = z * scale
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


def oracle(
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    *,
    kind: str = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> dict[str, Tensor]:
    x = temper(x, logit_scale, softcap, temperature)
    y = temper(
        y, ref_logit_scale, ref_softcap, temperature if ref_temperature is None else ref_temperature
    )
    lp, lq = x.log_softmax(-1), y.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    lm = torch.log((1 - beta) * p + beta * q)
    logp, ref_logp = (z.gather(-1, ids[..., None])[..., 0] for z in (lp, lq))
    r = ref_logp - logp
    kl = {"policy_ref": (p * (lp - lq)).sum(-1), "ref_policy": (q * (lq - lp)).sum(-1)}
    kl["jsd"] = (beta * q * (lq - lm) + (1 - beta) * p * (lp - lm)).sum(-1)
    return {
        "logp": logp,
        "ref_logp": ref_logp,
        "entropy": -(p * lp).sum(-1),
        "lse": x.logsumexp(-1),
        "kl_policy_ref": kl["policy_ref"],
        "kl_ref_policy": kl["ref_policy"],
        "kl": kl[kind],
        "k1": -r,
        "k2": r * r / 2,
        "k3": r.exp() - 1 - r,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "all": {
        "kind": "ref_policy",
        "temperature": 0.7,
        "ref_temperature": 1.2,
        "softcap": 9.0,
        "ref_softcap": 8.0,
        "logit_scale": 1.5,
        "ref_logit_scale": 0.5,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# the smallest, blocks and a tail, beyond the first fold
@pytest.mark.parametrize("V", [2, 65, 2049])
def test_every_output(V: int, dtype: torch.dtype, option: str) -> None:
    options = OPTIONS[option]
    x, y, ids = (
        torch.randn(2, 3, V).to(dtype),
        torch.randn(2, 3, V).to(dtype),
        torch.randint(V, (2, 3)),
    )
    weights = torch.randn(len(OUTPUTS), 2, 3)  # of either sign, another for every output and token

    def sides(to: torch.dtype) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        a, b = x.to(to).requires_grad_(), y.to(to).requires_grad_()
        values = oracle(a, b, ids, **options)
        return values, torch.autograd.grad(
            sum((values[name] * w.to(to)).sum() for name, w in zip(OUTPUTS, weights, strict=True)),
            (a, b),
        )

    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    stats = fasttax.token_stats(a, b, ids, outputs=OUTPUTS, **options)
    got = torch.autograd.grad(
        sum((getattr(stats, name) * w).sum() for name, w in zip(OUTPUTS, weights, strict=True)),
        (a, b),
    )
    (truth, d_truth), (own, d_own) = sides(torch.float64), sides(torch.float32)
    pairs = [(getattr(stats, name), own[name], truth[name]) for name in OUTPUTS] + list(
        zip(got, d_own, d_truth, strict=True)
    )
    size = (
        max(1.0, float(x.abs().max()), float(y.abs().max()))
        * options.get("logit_scale", 1.0)
        / min(1.0, options.get("temperature", 1.0))
    )
    for (o, w, t), name in zip(pairs, (*OUTPUTS, "d_logits", "d_ref_logits"), strict=True):
        # logits of this size carry a rounding of eps * size
        assert_within(o, own_result(w, t, o.dtype), t, ulps=4 * size, name=name)
    assert all(
        getattr(stats, name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name in OUTPUTS
    )


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_alone_and_none_for_the_others(name: str) -> None:
    x, y, ids = torch.randn(4, 9), torch.randn(4, 9), torch.randint(9, (4,))
    alone, all_ = (
        fasttax.token_stats(x, y, ids, outputs=(name,)),
        fasttax.token_stats(x, y, ids, outputs=OUTPUTS),
    )
    # alone it may come from another sweep, with other roundings
    torch.testing.assert_close(
        getattr(alone, name),
        getattr(all_, name),
        rtol=0,
        atol=8 * torch.finfo(torch.float32).eps * float(x.abs().max()),
    )
    assert all(getattr(alone, other) is None for other in OUTPUTS if other != name)


def test_what_needs_no_reference_takes_none() -> None:
    x, ids = torch.randn(4, 9), torch.randint(9, (4,))
    stats = fasttax.token_stats(x, None, ids, outputs=("logp", "entropy", "lse"))
    torch.testing.assert_close(stats.logp, x.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    assert fasttax.token_stats(x, outputs="entropy").entropy.shape == (4,)
    assert fasttax.token_stats(x, outputs=iter(("entropy", "lse"))).entropy.shape == (4,)


def test_masked_tokens_are_not_read() -> None:
    x, y, ids, mask = (
        torch.randn(4, 9),
        torch.randn(4, 9),
        torch.randint(9, (4,)),
        torch.tensor([True, False, True, False]),
    )
    expected = fasttax.token_stats(x, y, ids, outputs=OUTPUTS)
    x[1], y[1], x[3], ids[3] = NAN, INF, -INF, -100
    a, b = x.requires_grad_(), y.requires_grad_()
    stats = fasttax.token_stats(a, b, ids, outputs=OUTPUTS, mask=mask)
    for name in OUTPUTS:
        out = getattr(stats, name)
        assert torch.equal(out[mask], getattr(expected, name)[mask]), name
        assert torch.equal(out[~mask], torch.zeros(2)), name
    sum(getattr(stats, name).sum() for name in OUTPUTS).backward()
    for d in (a.grad, b.grad):
        assert d.isfinite().all()
        assert torch.equal(d[~mask], torch.zeros(2, 9))


def test_suppressed_entries_cost_nothing() -> None:
    x = torch.randn(3, 9)
    x[:, 4] = -INF
    cut = torch.cat((x[:, :4], x[:, 5:]), -1)
    a = x.requires_grad_()
    entropy = fasttax.token_stats(a, outputs=("entropy",)).entropy
    torch.testing.assert_close(entropy, fasttax.token_stats(cut, outputs=("entropy",)).entropy)
    entropy.sum().backward()
    assert a.grad.isfinite().all()


def test_nan_rows_show() -> None:
    x, y, ids = torch.randn(2, 9), torch.randn(2, 9), torch.zeros(2, dtype=torch.long)
    x[0, 3], y[0, 5] = NAN, NAN
    stats = fasttax.token_stats(x, y, ids, outputs=OUTPUTS)
    for name in OUTPUTS:
        assert getattr(stats, name).isnan().tolist() == [True, False], name


def test_reductions() -> None:
    x, y, mask, weight = (
        torch.randn(3, 9),
        torch.randn(3, 9),
        torch.tensor([1, 0, 1]),
        torch.rand(3),
    )
    tokens = fasttax.token_stats(x, y, outputs=("kl", "entropy"), mask=mask)
    mean = fasttax.token_stats(
        x, y, outputs=("kl", "entropy"), mask=mask, weight=weight, reduction="mean"
    )
    for name in ("kl", "entropy"):
        torch.testing.assert_close(getattr(mean, name), (getattr(tokens, name) * weight).sum() / 2)


# kl_estimate


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators(kind: str, dtype: torch.dtype, old: bool) -> None:
    logp, ref, before = (torch.randn(3, 64) - 3).to(dtype)
    r = ref.double() - logp.double()
    # k3's expm1 and e^r, |r| from 1e-4 to 4: the branch changes at 1/2
    ref = (logp.double() + r * torch.logspace(-4, 0, 64, dtype=torch.float64)).to(dtype)

    def formula(to: torch.dtype) -> tuple[Tensor, Tensor]:
        a = logp.to(to).requires_grad_()
        r = ref.to(to) - a
        value = {"k1": -r, "k2": r * r / 2, "k3": r.exp() - 1 - r}[kind] * (
            (a - before.to(to)).exp() if old else 1
        )
        return value.detach(), torch.autograd.grad(value.sum(), a)[0]

    a = logp.clone().requires_grad_()
    value = fasttax.kl_estimate(a, ref, kind=kind, old_logp=before if old else None)
    (d,) = torch.autograd.grad(value.sum(), a)
    for o, w, t in zip(
        (value.detach(), d), formula(torch.float32), formula(torch.float64), strict=True
    ):
        assert_within(o, own_result(w, t, o.dtype), t)


def test_k3_is_never_negative_and_keeps_small_values() -> None:
    logp = torch.randn(200)
    assert (fasttax.kl_estimate(logp, logp + 1e-4 * torch.randn(200)) >= 0).all()
    r = torch.logspace(-6, -1, 50)
    k3 = fasttax.kl_estimate(torch.zeros(50), r)
    assert ((k3 / (torch.expm1(r.double()) - r.double()) - 1).abs() < 0.15)[
        r > 1e-6
    ].all()  # e^r - 1 - r is r^2/2: eps/r of it is lost


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("grad", ["estimator", "reverse_kl"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_large_ratios_stay_finite(kind: str, grad: str, old: bool) -> None:
    """A token that the policy has all but given up: e^1000 is inf, and clamping afterwards gives 0
    * inf = NaN in the gradient.
    """
    logp = torch.tensor([-1000.0, -90.0, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0, -1.0, -1000.0, -90.0])
    value = fasttax.kl_estimate(
        logp, ref, kind=kind, grad=grad, old_logp=torch.full((4,), -900.0) if old else None
    )
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()
    if kind == "k3" and grad == "estimator" and not old:
        assert (logp.grad[:2] < -1e6).all(), (
            "the gradient that pulls the policy back must not be clipped away"
        )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_reverse_kl_gradient(kind: str) -> None:
    """Its mean over the policy is the gradient of the exact KL; the value is the estimator's."""
    logits, ref = (
        torch.randn(6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64),
    )
    lp = logits.log_softmax(-1)
    value = fasttax.kl_estimate(lp, ref.log_softmax(-1), kind=kind, grad="reverse_kl")
    torch.testing.assert_close(value, fasttax.kl_estimate(lp, ref.log_softmax(-1), kind=kind))
    (got,) = torch.autograd.grad((value * lp.exp().detach()).sum(), logits)
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum()
    torch.testing.assert_close(got, torch.autograd.grad(exact, logits)[0])


def test_importance_ratio_makes_the_estimator_and_its_gradient_unbiased() -> None:
    """sum_v old_v * estimate_v is KL(policy || ref) and its gradient, for k1 and k3."""
    logits, ref, old = torch.randn(3, 6, dtype=torch.float64).unbind()
    logits = logits.requires_grad_()
    old = old.log_softmax(-1)
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum()
    for kind in ("k1", "k3"):
        mean = (
            old.exp()
            * fasttax.kl_estimate(
                logits.log_softmax(-1), ref.log_softmax(-1), kind=kind, old_logp=old
            )
        ).sum()
        torch.testing.assert_close(mean, exact)
        torch.testing.assert_close(
            torch.autograd.grad(mean, logits)[0],
            torch.autograd.grad(exact, logits, retain_graph=True)[0],
        )


def test_estimates_under_the_mask_may_be_anything() -> None:
    logp, ref = torch.tensor([NAN, -1.0, -INF], requires_grad=True), torch.tensor([-1.0, -2.0, NAN])
    for kind in ("k1", "k2", "k3"):
        for grad in ("estimator", "reverse_kl"):
            value = fasttax.kl_estimate(
                logp,
                ref,
                kind=kind,
                grad=grad,
                old_logp=logp.detach(),
                mask=torch.tensor([0, 1, 0]),
            )
            (d,) = torch.autograd.grad(value.sum(), logp)
            assert value[[0, 2]].tolist() == [0, 0]
            assert d[[0, 2]].tolist() == [0, 0]
            assert value.isfinite().all()


# top-k


def exact(x: Tensor, y: Tensor, kind: str) -> Tensor:
    return oracle(x.double(), y.double(), torch.zeros(x.shape[:-1], dtype=torch.long), kind=kind)[
        "kl"
    ]


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_everything_is_the_full_kl(kind: str, tail: str) -> None:
    x, y = torch.randn(4, 33), torch.randn(4, 33)
    logp, ids = fasttax.topk_logprobs(y, 33)
    torch.testing.assert_close(
        fasttax.topk_kl(x, logp, ids, kind=kind, tail=tail).double(),
        exact(x, y, kind),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
# at 40 the reference's tail is below float32's 1 - eps
@pytest.mark.parametrize("peak", [0.0, 10.0, 40.0])
def test_ghost_is_a_lower_bound_that_grows_with_k(peak: float, kind: str) -> None:
    x, y = torch.randn(8, 33), torch.randn(8, 33)
    y[:, 5] += peak
    full, last = exact(x, y, kind), torch.zeros(8, dtype=torch.float64)
    for k in (1, 4, 16, 32):
        bound = fasttax.topk_kl(x, *fasttax.topk_logprobs(y, k), kind=kind).double()
        assert (bound <= full * (1 + 1e-5)).all()
        assert (bound >= last * (1 - 1e-4) - 1e-6).all()
        last = bound


def test_renormalize_is_the_kl_of_the_restrictions() -> None:
    x, y = torch.randn(4, 33), torch.randn(4, 33)
    logp, ids = fasttax.topk_logprobs(y, 6)
    truth = exact(x.gather(-1, ids), y.gather(-1, ids), "ref_policy")
    torch.testing.assert_close(
        fasttax.topk_kl(x, logp, ids, tail="renormalize").double(), truth, rtol=1e-5, atol=0
    )


def test_topk_gradient_and_mask() -> None:
    x, y = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    logp, ids = fasttax.topk_logprobs(y, 4)
    for tail in ("ghost", "renormalize"):
        for kind in KINDS:
            assert torch.autograd.gradcheck(
                lambda a, k=kind, t=tail: fasttax.topk_kl(a, logp, ids, kind=k, tail=t),
                x.requires_grad_(),
            )
    bad = x.detach().clone()
    bad[1], logp[1], ids[1] = NAN, NAN, -1
    bad.requires_grad_()
    kl = fasttax.topk_kl(bad, logp, ids, mask=torch.tensor([1, 0, 1]))
    kl.sum().backward()
    assert kl[1] == 0
    assert torch.equal(bad.grad[1], torch.zeros(12, dtype=torch.float64))
    assert bad.grad.isfinite().all()


def test_topk_logprobs() -> None:
    y = torch.randn(2, 3, 40).bfloat16()
    logp, ids = fasttax.topk_logprobs(y, 5)
    assert (logp.dtype, ids.dtype, logp.shape) == (torch.float32, torch.int64, (2, 3, 5))
    torch.testing.assert_close(logp, y.float().log_softmax(-1).gather(-1, ids))
    assert (logp.diff() <= 0).all()


# wrong calls

X, IDS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
L = torch.zeros(2)
WRONG: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "output": (
        "token_stats",
        (X, X, IDS),
        {"outputs": ("logprob",)},
        ValueError,
        ["outputs", "'logp'", "'logprob'"],
    ),
    "kinds": ("token_kl", (X, X), {"kind": ["jsd"]}, ValueError, ["token_kl", "kind", "['jsd']"]),
    "no_ids": ("token_stats", (X, X), {"outputs": ("k3",)}, ValueError, ["ids", "'k3'", "None"]),
    "no_ref": (
        "token_stats",
        (X, None, IDS),
        {"outputs": ("kl",)},
        ValueError,
        ["ref_logits", "'kl'", "None"],
    ),
    "ids_shape": ("token_stats", (X, X, IDS[:1]), {}, ValueError, ["ids", "(2,)", "(1,)"]),
    "ids_dtype": ("token_stats", (X, X, L), {}, TypeError, ["ids", "int64", "float32"]),
    "ids_high": ("token_stats", (X, X, IDS + 5), {}, IndexError, ["ids", "[0, 5)", "5 to 5"]),
    "ids_label": ("token_stats", (X, X, IDS - 100), {}, IndexError, ["ids", "[0, 5)", "mask="]),
    "ids_device": ("token_stats", (X, X, IDS.to("meta")), {}, ValueError, ["ids", "cpu", "meta"]),
    "stats_kind": (
        "token_stats",
        (X, X),
        {"outputs": ("kl",), "kind": "kl"},
        ValueError,
        ["kind", "'jsd'", "'kl'"],
    ),
    "estimator": ("kl_estimate", (L, L), {"kind": "k4"}, ValueError, ["kind", "'k3'", "'k4'"]),
    "estimate_grad": (
        "kl_estimate",
        (L, L),
        {"grad": "forward"},
        ValueError,
        ["grad", "'reverse_kl'", "'forward'"],
    ),
    "estimate_clip": ("kl_estimate", (L, L), {"clip": 0.0}, ValueError, ["clip", "> 0", "0.0"]),
    "estimate_shape": ("kl_estimate", (L, X), {}, ValueError, ["ref_logp", "(2,)", "(2, 5)"]),
    "estimate_old": (
        "kl_estimate",
        (L, L),
        {"old_logp": torch.zeros(3)},
        ValueError,
        ["old_logp", "(2,)", "(3,)"],
    ),
    "complex_mask": (
        "kl_estimate",
        (L, L),
        {"mask": L.to(torch.complex64)},
        TypeError,
        ["mask", "complex64"],
    ),
    "complex_weight": (
        "kl_estimate",
        (L, L),
        {"weight": L.to(torch.complex64)},
        TypeError,
        ["weight", "real numbers", "complex64"],
    ),
    "number_as_text": ("kl_estimate", (L, L), {"clip": "20"}, TypeError, ["clip", "'20'"]),
    "estimate_type": ("kl_estimate", (L, 0.0), {}, TypeError, ["ref_logp", "torch.Tensor", "0.0"]),
    "topk_zero": ("topk_logprobs", (X, 0), {}, ValueError, ["k", "1 to V = 5", "0"]),
    "topk_many": ("topk_logprobs", (X, 6), {}, ValueError, ["k", "1 to V = 5", "6"]),
    "topk_shape": (
        "topk_kl",
        (X, X[:, :3], IDS[:, None]),
        {},
        ValueError,
        ["ref_topk_logp", "(2, 3)"],
    ),
    "topk_tail": (
        "topk_kl",
        (X, X[:, :1], IDS[:, None]),
        {"tail": "drop"},
        ValueError,
        ["tail", "'ghost'", "'drop'"],
    ),
    "topk_ids": (
        "topk_kl",
        (X, X[:, :1], IDS[:, None] + 5),
        {},
        IndexError,
        ["ref_topk_ids", "[0, 5)", "5 to 5"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    op, tensors, options, error, texts = WRONG[case]
    with pytest.raises(error) as raised:
        getattr(fasttax, op)(*tensors, **options)
    for text in (f"{op}: ", "expected", "got", *texts):
        assert text in str(raised.value), str(raised.value)
