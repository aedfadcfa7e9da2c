"""Every public op over shapes, strides, dtypes and values that hypothesis draws: logits' ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fasttax
from tests.faults.drawn import (
    DTYPES,
    LAYOUTS,
    WIDTHS,
    laid_out,
    largest,
    rows,
    seeds,
    shapes,
    suppressed,
    trials,
)
from tests.tools.kl_cases import KINDS, ORACLES, log_probs, oracle, run, run_oracle
from tests.tools.utils import assert_within, own_result


def _options(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(KINDS))
    options: dict[str, Any] = {"kind": kind, "beta": draw(st.sampled_from([0.2, 0.5, 0.9]))}
    if draw(st.booleans()):
        options["temperature"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([5.0, 30.0]))
        options["ref_softcap"] = options["softcap"]
    if draw(st.booleans()):
        options["logit_scale"] = draw(st.sampled_from([0.25, 1.5]))
    return options


def test_token_kl(request: pytest.FixtureRequest, backend: str | int) -> None:
    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = (data.draw(st.integers(1, 4)), data.draw(st.sampled_from(WIDTHS)))
        seed = data.draw(seeds)
        x = data.draw(rows(dtype, shape, seed))
        y = data.draw(rows(dtype, shape, seed + 1))
        x, y = suppressed(data.draw, x, y)
        judged(backend, x, y, _options(data.draw))

    tried()


def judged(backend: str | int, x: Tensor, y: Tensor, options: dict[str, Any]) -> None:
    """As `kl_cases.check`, for rows of two sorts, whose terms may all but cancel."""
    upstream = torch.linspace(-1.5, 2.0, x.shape[0])
    out = run(backend, x, y, upstream, **options)
    truth = run_oracle(x, y, upstream, torch.float64, **options)
    own = run_oracle(x, y, upstream, torch.float32, **options)
    size = largest(x, y)
    size *= options.get("logit_scale", 1.0) / min(1.0, options.get("temperature", 1.0))
    names, least = ("value", "d_logits", "d_ref"), roundings(x, y, upstream, **options)
    for o, w, t, name, rounding in zip(out, own, truth, names, least, strict=True):
        baseline = t + (own_result(w, t, o.dtype).double() - t).abs().maximum(rounding)
        assert_within(o, baseline, t, ulps=max(4.0, 4 * min(size, 64.0)), name=name)


def roundings(
    x: Tensor,
    y: Tensor,
    upstream: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    **caps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What of a KL and its gradients is rounding, however small they are.

    A KL is a mean of log-ratios u, of which each has a rounding: eps E|u|, and eps^2 where they are
    0; JSD is of two. A gradient is a difference of probabilities or one times u - KL:
    eps p (1 + |u| + E|u|). Renyi's are divided by 1 - alpha, as the rounding of its logarithm is.
    float64's truth has all of them, too, and capped logits are rounded once more.
    """
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    logs = log_probs(
        x.double(), y.double(), temperature=temperature, logit_scale=logit_scale, **caps
    )
    p, ratio = logs[0].exp() + logs[1].exp(), (logs[0] - logs[1]).abs().nan_to_num(nan=0.0)
    value = (p * ratio).sum(-1).clamp_min(eps)
    terms = upstream.double().abs()[:, None] / temperature * p * (1 + ratio + value[:, None])
    eps *= (1 + (x.dtype == torch.float64)) * (1 + bool(caps)) * (1 + (kind == "jsd"))
    if kind == "renyi":
        eps /= 1 - beta
        value = value + float(x.dtype == torch.float64)
    return eps * value, eps * logit_scale * terms, eps * terms


def test_token_kl_of_any_shape(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Leading dimensions, masks and weights that broadcast, reductions: as of plain rows."""

    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        lead = data.draw(shapes)
        V, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(seeds)
        x, y = (data.draw(rows(dtype, (*lead, V), seed + k)) for k in range(2))
        g = torch.Generator().manual_seed(seed)
        part = lead[data.draw(st.integers(0, len(lead))) :]
        mask = torch.rand(part, generator=g) < 0.7 if data.draw(st.booleans()) else None
        weight = torch.rand(part, generator=g) if data.draw(st.booleans()) else None
        got = fasttax.token_kl(x, y, mask=mask, weight=weight)
        assert got.shape == lead
        flat = fasttax.token_kl(x.reshape(-1, V).contiguous(), y.reshape(-1, V).contiguous())
        want = flat.view(lead)
        if mask is not None:
            want = torch.where(mask, want, 0.0)
        if weight is not None:
            want = want * weight
        assert torch.allclose(got, want, rtol=1e-6, atol=0)
        total = fasttax.token_kl(x, y, mask=mask, weight=weight, reduction="sum")
        assert torch.allclose(total.double(), got.double().sum(), rtol=1e-5, atol=1e-6)

    tried()


def test_masked_tokens_are_not_read(request: pytest.FixtureRequest, simd: str | int) -> None:
    @trials(request, 20, 2000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        V, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(seeds)
        x, y = (data.draw(rows(dtype, (5, V), seed + k)).clone() for k in range(2))
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(5, generator=g) < 0.5
        bad = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        ids = torch.randint(V, (5,), generator=g)
        want = _masked_results(x, y, ids, mask)
        x[~mask], y[~mask] = bad, bad
        for one, other in zip(_masked_results(x, y, ids, mask), want, strict=True):
            assert torch.equal(one, other)

    tried()


def _masked_results(x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    kl = fasttax.token_kl(x, y, mask=mask)
    stats = fasttax.token_stats(x, y, ids, mask=mask, outputs=("logp", "entropy", "kl"))
    total = kl.sum() + stats.logp.sum() + stats.entropy.sum()
    (d,) = torch.autograd.grad(total, x)
    return [kl.detach(), stats.logp.detach(), stats.entropy.detach(), d]


KLS = ("kl_policy_ref", "kl_ref_policy", "kl", "k1", "k2", "k3")
STATS = ("logp", "ref_logp", "entropy", "lse", *KLS)


def test_token_stats(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Values, and the gradient of some of them together."""

    @trials(request, 30, 3000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        V, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(seeds)
        x, y = (data.draw(rows(dtype, (4, V), seed + k)) for k in range(2))
        ids = torch.randint(V, (4,), generator=torch.Generator().manual_seed(seed))
        options = _options(data.draw)
        some = data.draw(st.lists(st.sampled_from(STATS), min_size=1, unique=True))
        x = x.detach().requires_grad_()
        got = fasttax.token_stats(x, y, ids, outputs=STATS, **options)
        asked = fasttax.token_stats(x, y, ids, outputs=some, **options)
        total = torch.stack([getattr(asked, name).sum() for name in some]).sum()
        total = total + 0 * got.lse.sum()  # of ref_logp alone there is no gradient
        (d,) = torch.autograd.grad(total, x)
        truth, own = (
            _stats(x.to(t), y.to(t), ids, some, options) for t in (torch.float64, torch.float32)
        )
        # of the largest logit, and of a log-prob near -log V, which all of them are made of
        size = largest(x, y) * options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
        size = max(size, 1 + math.log(V))
        for name, o in {**{n: getattr(got, n) for n in STATS}, "gradient": d}.items():
            t = truth[name]
            w, error, scale = own_result(own[name], t, o.dtype), (o.double() - t).abs(), size
            if name == "kl" and options["kind"] == "renyi":  # float64's truth is divided by it, too
                scale = size / (1 - options["beta"])
            if name == "gradient":
                scale = max(float(t.abs().max()), 1.0) * size
            allowed = 2 * (w.double() - t).abs().max() + 8 * torch.finfo(o.dtype).eps * scale
            if name in ("k2", "k3"):
                allowed = allowed + 1e-5 * t.abs()
            assert bool((error <= allowed).all()), (name, error.max(), allowed.max())

    tried()


def test_k3_far_apart(simd: str | int) -> None:
    """The long form's: a log-ratio of 56, beyond 20, where it goes on along its tangent."""
    x, y = torch.tensor([[-45.7, 11.5]]), torch.tensor([[0.6, 0.5]])
    ids = torch.tensor([0])
    want = _stats(x.double(), y.double(), ids, ["k3"], {"kind": "jsd", "beta": 0.5})["k3"]
    got = fasttax.token_stats(x, y, ids, outputs=("k3",)).k3
    assert float(want) > 1e10
    assert torch.allclose(got.double(), want, rtol=1e-5)


def _stats(
    x: Tensor, y: Tensor, ids: Tensor, some: list[str], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Every output, and the "gradient" of the sum of some by the policy's logits."""
    x = x.detach().requires_grad_()
    scaled = {name: value for name, value in options.items() if name not in ("kind", "beta")}
    lp, lq = log_probs(x, y, **scaled)
    p, q = lp.exp(), lq.exp()
    at, ref_at = (t.gather(-1, ids[:, None]).squeeze(-1) for t in (lp, lq))
    ratio = ref_at - at
    found = {
        "logp": at,
        "ref_logp": ref_at,
        "entropy": -(p * lp).sum(-1),
        "lse": tempered(x, **_of_policy(options)).logsumexp(-1),
        "kl_policy_ref": (p * (lp - lq)).sum(-1),
        "kl_ref_policy": (q * (lq - lp)).sum(-1),
        "kl": ORACLES[options["kind"]](lp, lq, options["beta"]),
        "k1": -ratio,
        "k2": ratio.square() / 2,
        "k3": k3(ratio, 20.0),
    }
    total = torch.stack([found[name].sum() for name in some]).sum() + 0 * at.sum()
    (d,) = torch.autograd.grad(total, x)
    return {name: value.detach() for name, value in found.items()} | {"gradient": d}


def k3(ratio: Tensor, clip: float) -> Tensor:
    """e^r - 1 - r, whose exponential goes on along its tangent beyond the clip."""
    near = ratio.clamp(max=clip)
    return torch.expm1(near) - near + torch.expm1(near) * (ratio - near)


def _of_policy(options: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in options.items() if n in ("temperature", "softcap", "logit_scale")}


def tempered(
    x: Tensor, *, temperature: float = 1.0, softcap: float = 0.0, logit_scale: float = 1.0
) -> Tensor:
    """The logits that a softmax is taken of."""
    x = x * logit_scale
    return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature


def test_linear_token_kl(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Of any chunks: values and gradients are the logits' own."""

    @trials(request, 20, 1500)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
        tokens, V, H = (data.draw(st.sampled_from([1, 3, 8, 17, 40])) for _ in range(3))
        g = torch.Generator().manual_seed(data.draw(seeds))
        layout = data.draw(st.sampled_from(LAYOUTS[:5]))
        h, w, h2, w2 = (
            laid_out(torch.randn(n, H, generator=g, dtype=torch.float64).to(dtype), layout)
            for n in (tokens, V, tokens, V)
        )
        options = _options(data.draw)
        options.pop("logit_scale", None)
        h.requires_grad_(), w.requires_grad_()
        chunk = data.draw(st.sampled_from([None, 1, 5, 16]))
        tile = data.draw(st.sampled_from([None, 2, 16]))
        kl = fasttax.linear_token_kl(h, w, h2, w2, token_chunk=chunk, vocab_chunk=tile, **options)
        upstream = torch.linspace(-1, 2, tokens, dtype=kl.dtype)
        out = (kl.detach(), *torch.autograd.grad(kl, (h, w), upstream))
        truth, own = (
            _composed(h, w, h2, w2, upstream, t, options) for t in (torch.float64, torch.float32)
        )
        for o, t, w_ in zip(out, truth, own, strict=True):
            of_linear(o, t, w_, tokens)

    tried()


def of_linear(out: Tensor, truth: Tensor, own: Tensor, tokens: int) -> None:
    """Within four times PyTorch's own error; where a token's is 0 float32 has a rounding of it."""
    least = 4 * tokens * torch.finfo(out.dtype).eps ** 2
    error = (own_result(own, truth, out.dtype).double() - truth).abs().clamp_min(least)
    assert_within(out.detach(), truth + error, truth, factor=4.0, ulps=64.0)


def _composed(
    h: Tensor,
    w: Tensor,
    h2: Tensor,
    w2: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    h, w = (t.detach().to(dtype).requires_grad_() for t in (h, w))
    kl = oracle(h @ w.T, h2.to(dtype) @ w2.to(dtype).T, **options)
    return kl.detach(), *torch.autograd.grad(kl, (h, w), upstream.to(dtype))


def test_topk_logprobs_and_kl(request: pytest.FixtureRequest, simd: str | int) -> None:
    """The k largest log-probs; of all tokens the KL is the full one, of fewer it is below it."""

    @trials(request, 30, 2000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        V, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(seeds)
        x, y = (data.draw(rows(dtype, (3, V), seed + k)) for k in range(2))
        kind = data.draw(st.sampled_from(["ref_policy", "policy_ref"]))
        full = fasttax.token_kl(x.double(), y.double(), kind=kind)
        logp, ids = fasttax.topk_logprobs(y, V)
        got = fasttax.topk_kl(x, logp, ids, kind=kind)
        scale = 1 + float(x.double().abs().max()) + float(y.double().abs().max())
        assert torch.allclose(got.double(), full, rtol=1e-4, atol=1e-5 * scale)
        logp, ids = fasttax.topk_logprobs(y, max(1, V // 2))
        every = y.double().log_softmax(-1)
        assert torch.allclose(logp.double(), every.topk(max(1, V // 2)).values, atol=1e-6 * scale)
        assert torch.allclose(logp.double(), every.gather(-1, ids), atol=1e-6 * scale)
        part = fasttax.topk_kl(x, logp, ids, kind=kind)
        assert bool((part.double() <= full * (1 + 1e-4) + 1e-5 * scale).all())
        assert bool((part >= 0).all())

    tried()


def test_linear_token_logprobs(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Of any chunks and outputs: values and gradients are the logits' own."""

    @trials(request, 20, 1500)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
        tokens, V, H = (data.draw(st.sampled_from([1, 3, 8, 17, 40])) for _ in range(3))
        g = torch.Generator().manual_seed(data.draw(seeds))
        layout = data.draw(st.sampled_from(LAYOUTS[:5]))
        leaves = [
            laid_out(torch.randn(n, H, generator=g, dtype=torch.float64).to(dtype), layout)
            for n in (tokens, V)
        ]
        if data.draw(st.booleans()):
            leaves.append(torch.randn(V, generator=g, dtype=torch.float64).to(dtype))
        leaves = [x.requires_grad_() for x in leaves]
        ids = torch.randint(V, (tokens,), generator=g)
        outputs = ("logp", "entropy", "lse")
        names = data.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
        options = _of_policy(_options(data.draw))
        found = fasttax.linear_token_logprobs(
            leaves[0],
            leaves[1],
            ids,
            bias=leaves[2] if len(leaves) > 2 else None,
            outputs=names,
            token_chunk=data.draw(st.sampled_from([None, 1, 5, 16])),
            vocab_chunk=data.draw(st.sampled_from([None, 2, 16])),
            **options,
        )
        upstream = torch.linspace(-1, 2, tokens, dtype=dtype)
        values = [getattr(found, name) for name in names]
        out = (*values, *torch.autograd.grad(values, leaves, [upstream] * len(values)))
        truth, own = (
            _logprobs(leaves, ids, names, upstream, t, options)
            for t in (torch.float64, torch.float32)
        )
        for o, t, w in zip(out, truth, own, strict=True):
            of_linear(o, t, w, tokens)

    tried()


def _logprobs(
    leaves: list[Tensor],
    ids: Tensor,
    names: list[str],
    upstream: Tensor,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
    x = tempered(logits, **options)
    lp = x.log_softmax(-1)
    found = {
        "logp": lp.gather(-1, ids[:, None]).squeeze(-1),
        "entropy": -(lp.exp() * lp).sum(-1),
        "lse": x.logsumexp(-1),
    }
    values = [found[name] for name in names]
    d = torch.autograd.grad(values, leaves, [upstream.to(dtype)] * len(values))
    return (*(v.detach() for v in values), *d)


def test_kl_estimate(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Values and gradients of any shape, importance ratio, clip, mask, weight and reduction."""

    @trials(request, 60, 6000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype, lead = data.draw(st.sampled_from(DTYPES)), data.draw(shapes)
        seed = data.draw(seeds)
        g = torch.Generator().manual_seed(seed)
        count = data.draw(st.integers(2, 3))
        logps = [data.draw(rows(dtype, lead, seed + k)).detach() for k in range(count)]
        part = lead[data.draw(st.integers(0, len(lead))) :]
        mask = torch.rand(part, generator=g) < 0.7 if data.draw(st.booleans()) else None
        weight = torch.rand(part, generator=g) if data.draw(st.booleans()) else None
        options: dict[str, Any] = {
            "kind": data.draw(st.sampled_from(["k1", "k2", "k3"])),
            "grad": data.draw(st.sampled_from(["estimator", "reverse_kl"])),
            "clip": data.draw(st.sampled_from([0.5, 20.0])),
            "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
            "scale": data.draw(st.sampled_from([1.0, 0.3])),
        }
        leaves = [x.requires_grad_() for x in logps]
        old = leaves[2] if count > 2 else None
        got = fasttax.kl_estimate(
            leaves[0], leaves[1], old_logp=old, mask=mask, weight=weight, **options
        )
        d = torch.autograd.grad(got.sum(), leaves, allow_unused=True, materialize_grads=True)
        truth, own = (
            _estimates(logps, mask, weight, t, **options) for t in (torch.float64, torch.float32)
        )
        # k3 = (e^r - 1) - r: a rounding of each part, and of its slope, by autograd, one of e^r
        r = (leaves[1].detach().double() - leaves[0].detach().double()).abs()
        eps, most = torch.finfo(got.dtype).eps, float(r.max()) if r.numel() else 0.0
        for o, t, w in zip((got, *d), truth, own, strict=True):
            if t.numel():
                beyond = t.to(o.dtype).isinf()
                t = torch.where(beyond, t.to(o.dtype).double(), t)
                least = eps * (most if o is got else 1 + most)
                error = (own_result(w, t, o.dtype).double() - t).abs().clamp_min(least)
                assert_within(o.detach(), t + error, t, ulps=16.0)

    tried()


def _estimates(
    logps: list[Tensor],
    mask: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    *,
    kind: str,
    grad: str,
    clip: float,
    reduction: str,
    scale: float,
) -> tuple[Tensor, ...]:
    """kl_estimate's docstring, its gradients by autograd."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in logps]
    logp, r = leaves[0], leaves[1] - leaves[0]
    ratio = torch.ones_like(logp)
    if len(leaves) > 2:
        apart = logp - leaves[2]
        near = apart.clamp(max=clip)
        ratio = near.exp() * (1 + (apart - near))
    value = ratio * {"k1": -r, "k2": r * r / 2, "k3": k3(r, clip)}[kind]
    if grad == "reverse_kl":
        value = value.detach() + (ratio * -r).detach() * (logp - logp.detach())
    by_token = torch.full_like(logp, scale)
    if weight is not None:
        by_token = by_token * weight.to(dtype)
    tokens = logp.numel()
    if mask is not None:
        by_token = by_token * mask
        tokens = int(mask.expand(logp.shape).sum())
    value = value * by_token
    if reduction != "none":
        value = value.sum() / (max(1, tokens) if reduction == "mean" else 1)
    d = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return (value.detach(), *d)
