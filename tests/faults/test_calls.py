"""Every public op over shapes, strides, dtypes and values that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fasttax
from fasttax import functional
from tests.tools.kl_cases import KINDS, log_probs, oracle, run, run_oracle
from tests.tools.utils import assert_within, own_result

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130, 257)  # around vectors and tiles


def trials(
    request: pytest.FixtureRequest, short: int, long: int
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, the same ones in every short run."""
    soak = bool(request.config.getoption("--soak"))
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=long if soak else short,
        derandomize=not soak,
        deadline=None,
        database=None,
        suppress_health_check=slow,
        phases=[Phase.generate, Phase.shrink],
    )


# --- tensors -------------------------------------------------------------------------------------

LAYOUTS = ("plain", "offset", "columns", "every other", "last dimension turned", "repeated")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "offset":  # and no address that vectors like
        flat = torch.cat((t.new_zeros(1), t.reshape(-1)))
        return flat[1:].view(t.shape)
    if layout == "columns" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other" and t.dim():
        return torch.stack((t, t.flip(-1)), -1)[..., 0]
    if layout == "last dimension turned" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "repeated" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one sort: ordinary, large, all equal, one far above, or some at -inf."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    sort = draw(st.sampled_from(["ordinary", "large", "equal", "peaked", "small"]))
    if sort == "large":
        x = x * 30
    elif sort == "equal":
        x = torch.full_like(x, 3.0)
    elif sort == "peaked" and x.numel():
        x[..., 0] += 40
    elif sort == "small":
        x = x * 1e-3
    return laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


shapes = st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 10**6)


# --- KL ------------------------------------------------------------------------------------------


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
        judged(backend, x, y, _options(data.draw))

    tried()


def judged(backend: str | int, x: Tensor, y: Tensor, options: dict[str, Any]) -> None:
    """As `kl_cases.check`, for rows of two sorts, whose terms may all but cancel."""
    upstream = torch.linspace(-1.5, 2.0, x.shape[0])
    out = run(backend, x, y, upstream, **options)
    truth = run_oracle(x, y, upstream, torch.float64, **options)
    own = run_oracle(x, y, upstream, torch.float32, **options)
    size = max(1.0, float(x.double().abs().max()), float(y.double().abs().max()))
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
    0. A gradient is a difference of probabilities or one times u - KL: eps p (1 + |u| + E|u|).
    Renyi's are divided by 1 - alpha, as the rounding of its logarithm is. float64's truth has all
    of them, too, and capped logits are rounded once more.
    """
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    logs = log_probs(
        x.double(), y.double(), temperature=temperature, logit_scale=logit_scale, **caps
    )
    p, ratio = logs[0].exp() + logs[1].exp(), (logs[0] - logs[1]).abs()
    value = (p * ratio).sum(-1).clamp_min(eps)
    terms = upstream.double().abs()[:, None] / temperature * p * (1 + ratio + value[:, None])
    eps *= (1 + (x.dtype == torch.float64)) * (1 + bool(caps))
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


def test_token_stats(request: pytest.FixtureRequest, simd: str | int) -> None:
    outputs = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy", "k3")

    @trials(request, 30, 3000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        V, seed = data.draw(st.sampled_from(WIDTHS)), data.draw(seeds)
        x, y = (data.draw(rows(dtype, (4, V), seed + k)) for k in range(2))
        ids = torch.randint(V, (4,), generator=torch.Generator().manual_seed(seed))
        got = fasttax.token_stats(x, y, ids, outputs=outputs)
        truth, own = (_stats(x.to(d), y.to(d), ids) for d in (torch.float64, torch.float32))
        for name in outputs:
            t, o, w = getattr(got, name), truth[name], own[name]
            # lse and logp carry the rounding of the largest logit
            size = max(1.0, float(x.double().abs().max()), float(y.double().abs().max()))
            error = (t.double() - o).abs()
            allowed = 2 * (w.double() - o).abs().max() + 8 * torch.finfo(t.dtype).eps * size
            if name == "k3":
                allowed = allowed + 1e-5 * o.abs()
            assert bool((error <= allowed).all()), (name, error.max(), allowed.max())

    tried()


def test_k3_far_apart(simd: str | int) -> None:
    """The long form's: a log-ratio of 56, beyond 20, where it goes on along its tangent."""
    x, y = torch.tensor([[-45.7, 11.5]]), torch.tensor([[0.6, 0.5]])
    ids = torch.tensor([0])
    want = _stats(x.double(), y.double(), ids)["k3"]
    got = fasttax.token_stats(x, y, ids, outputs=("k3",)).k3
    assert float(want) > 1e10
    assert torch.allclose(got.double(), want, rtol=1e-5)


def _stats(x: Tensor, y: Tensor, ids: Tensor) -> dict[str, Tensor]:
    lp, lq = x.log_softmax(-1), y.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    at, ref_at = (t.gather(-1, ids[:, None]).squeeze(-1) for t in (lp, lq))
    ratio = ref_at - at
    return {
        "logp": at,
        "ref_logp": ref_at,
        "entropy": -(p * lp).sum(-1),
        "lse": x.logsumexp(-1),
        "kl_policy_ref": (p * (lp - lq)).sum(-1),
        "kl_ref_policy": (q * (lq - lp)).sum(-1),
        # beyond 20 the exponential goes on along its tangent
        "k3": torch.expm1(near := ratio.clamp(max=20.0)) - ratio + near.exp() * (ratio - near),
    }


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
        for o, t, own in zip(
            out,
            _composed(h, w, h2, w2, upstream, torch.float64, options),
            _composed(h, w, h2, w2, upstream, torch.float32, options),
            strict=True,
        ):
            if dtype == torch.float64:
                own = t
            assert_within(o, own, t, factor=4.0, ulps=64.0)

    tried()


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


def test_topk_kl(request: pytest.FixtureRequest) -> None:
    """With every token it is the full KL; with fewer it is a bound from below."""

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
        part = fasttax.topk_kl(x, logp, ids, kind=kind)
        assert bool((part.double() <= full * (1 + 1e-4) + 1e-5 * scale).all())
        assert bool((part >= 0).all())

    tried()


# --- squares -------------------------------------------------------------------------------------


def test_squares(request: pytest.FixtureRequest, simd: str | int) -> None:
    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        B, T = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5))
        wide, out = (data.draw(st.sampled_from(WIDTHS)) for _ in range(2))
        g = torch.Generator().manual_seed(data.draw(seeds))
        layout = data.draw(st.sampled_from(LAYOUTS))
        a = laid_out(torch.randn(B, T, wide, generator=g).to(dtype), layout)
        d = laid_out(torch.randn(B, T, out, generator=g).to(dtype), layout)
        x = laid_out(torch.randn(B, T, out, generator=g).to(dtype), layout)
        ids = torch.randint(11, (B, T), generator=g)
        weight = torch.rand(B, generator=g) if data.draw(st.booleans()) else None
        per = torch.ones(B, dtype=torch.float64) if weight is None else weight.double()
        A, D, X = a.double(), d.double(), x.double()
        one_hot = torch.nn.functional.one_hot(ids, 11).double()
        found = {
            "linear": (
                functional.linear_sqgrad(a, d, example_weight=weight),
                torch.einsum("bto,bti->boi", D, A),
            ),
            "bias": (functional.bias_sqgrad(d, example_weight=weight), D.sum(1)),
            "norm": (functional.norm_sqgrad(x, d, example_weight=weight), (D * X).sum(1)),
            "embedding": (
                functional.embedding_sqgrad(ids, d, 11, example_weight=weight),
                torch.einsum("btv,bto->bvo", one_hot, D),
            ),
        }
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        for name, (got, grads) in found.items():
            want = (per.view(-1, *[1] * (grads.dim() - 1)) * grads.square()).sum(0)
            scale = float(want.abs().max()) if want.numel() else 0.0
            error = float((got.double() - want).abs().max()) if want.numel() else 0.0
            assert got.shape == want.shape, name
            assert error <= 64 * eps * (scale + 1e-3), (name, error, scale)

    tried()


# --- EWC -----------------------------------------------------------------------------------------


def test_quadratics(request: pytest.FixtureRequest, simd: str | int) -> None:
    """Lists of any lengths, dtypes and sizes: penalty, gradient and proximal step."""

    @trials(request, 40, 4000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        count = data.draw(st.integers(1, 4))
        sizes = [data.draw(st.sampled_from((0, 1, 5, 16, 33, 300))) for _ in range(count)]
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        theta_t, grad_t, anchor_t, fisher_t = (data.draw(st.sampled_from(narrow)) for _ in range(4))
        odd = data.draw(st.booleans())

        def drawn(dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
            made = [torch.randn(n + odd, generator=g) for n in sizes]
            return [(t.abs() if positive else t).to(dtype)[int(odd) :] for t in made]

        theta, anchor = drawn(theta_t), drawn(anchor_t)
        fisher, grad = drawn(fisher_t, positive=True), drawn(grad_t)
        strength = data.draw(st.sampled_from([0.0, 0.3, 5.0]))
        moved = [[x.double() for x in t] for t in (theta, anchor, fisher, grad)]
        apart = [t - a for t, a in zip(moved[0], moved[1], strict=True)]
        want = sum(float((f * x * x).sum()) for f, x in zip(moved[2], apart, strict=True))
        want *= strength / 2
        got = functional.ewc_penalty(theta, anchor, fisher, strength)
        assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-7)
        added = functional.ewc_add_grad_(theta, grad, anchor, fisher, strength)
        assert float(added) == pytest.approx(want, rel=1e-5, abs=1e-7)
        for k in range(count):
            expected = moved[3][k] + strength * moved[2][k] * apart[k]
            near(grad[k], expected, grad_t)
        at = [t.clone() for t in theta]
        functional.ewc_prox_(at, anchor, fisher, strength)
        for k in range(count):
            near(at[k], moved[1][k] + apart[k] / (1 + strength * moved[2][k]), theta_t)

    tried()


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within a rounding of the dtype, and a few of float32's."""
    eps = torch.finfo(dtype).eps
    allowed = (0.51 * eps + 8 * torch.finfo(torch.float32).eps) * want.abs() + 1e-6
    assert bool(((got.double() - want).abs() <= allowed).all()), (got, want)


def test_lora_penalty(request: pytest.FixtureRequest, simd: str | int) -> None:
    @trials(request, 20, 2000)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        g = torch.Generator().manual_seed(data.draw(seeds))
        out, wide = (data.draw(st.sampled_from(WIDTHS)) for _ in range(2))
        rank = data.draw(st.integers(1, 5))
        a = torch.randn(rank, wide, generator=g).requires_grad_()
        b = torch.randn(out, rank, generator=g).requires_grad_()
        fisher = torch.rand(out, wide, generator=g)
        got = functional.lora_ewc_penalty(a, b, fisher, 0.5, 3.0)
        d = torch.autograd.grad(got, (a, b))
        got = got.detach()
        A, B = (t.detach().double().requires_grad_() for t in (a, b))
        want = 1.5 * (fisher.double() * (0.5 * B @ A).square()).sum()
        truth = torch.autograd.grad(want, (A, B))
        want = want.detach()
        assert float(got) == pytest.approx(float(want), rel=1e-5)
        for one, other in zip(d, truth, strict=True):
            scale = float(other.abs().max())
            assert float((one.double() - other).abs().max()) <= 1e-5 * scale

    tried()
