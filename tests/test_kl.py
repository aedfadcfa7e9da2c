"""token_kl against a float64 oracle written out here, on every backend: the reference's functions and C++ at each instruction set."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SIMD, simd_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils import assert_within

import fasttax
from fasttax import reference
from fasttax.kl import tempering

KINDS = ("policy_ref", "ref_policy", "jsd")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan

# V, each with a reason; AVX-512 has 16 lanes and takes 4 vectors at a time, AVX2 8, portable 4; sums fold every 2048 entries
VOCABULARIES = (
    1,  # one outcome: KL 0 whatever the logits
    2,  # the smallest distribution that can differ
    15,  # no whole AVX-512 vector
    16,  # one, and no tail
    17,  # one and a tail of one
    63,  # one short of the four-vector block
    65,  # one more than it
    1003,  # blocks, vectors and a tail
    2047,  # one short of the fold, which is also where the frame is primed
    2049,  # a second fold of one entry
    9001,  # several folds and a tail
)

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "temperatures": {"temperature": 0.7, "ref_temperature": 2.0},  # no shared scale: the general frame
    "softcap": {"softcap": 5.0},  # deep in saturation for logits of 3 sigma = 9
    "softcaps": {"softcap": 30.0, "ref_softcap": 20.0},  # Gemma 2's
    "ref_softcap": {"ref_softcap": 4.0},  # one side only
    "scale": {"logit_scale": 0.25, "ref_logit_scale": 0.25},  # Cohere's
    "scales": {"logit_scale": 1.5, "ref_logit_scale": 0.5},
    "all": {"temperature": 0.8, "ref_temperature": 1.3, "softcap": 10.0, "ref_softcap": 15.0, "logit_scale": 0.5, "ref_logit_scale": 2.0},
    "mask": {"inf": "mask"},  # the general frame with nothing to drop
    "beta_low": {"beta": 0.1},
    "beta_high": {"beta": 0.9},
    "beta_tiny": {"beta": 1e-3},  # log(beta) and log(1 - beta) of very different size
}


@pytest.fixture(params=["reference", *simd_levels()], ids=lambda backend: backend if isinstance(backend, str) else SIMD[backend])
def backend(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """The reference, then every instruction set."""
    if request.param == "reference":
        yield request.param
        return
    best = torch.ops.fasttax._simd_level(-1)
    torch.ops.fasttax._simd_level(request.param)
    yield request.param
    torch.ops.fasttax._simd_level(best)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def oracle(x: Tensor, y: Tensor, *, kind: str = "policy_ref", beta: float = 0.5, temperature: float = 1.0, ref_temperature: float | None = None,
           softcap: float | None = None, ref_softcap: float | None = None, logit_scale: float = 1.0, ref_logit_scale: float = 1.0,
           inf: str = "propagate") -> Tensor:  # fmt: skip
    """The textbook sums over log_softmax, in the dtype of x: float64 is the truth, float32 PyTorch's own composition."""
    gone = (x == -INF) | (y == -INF)
    x, y = x * logit_scale, y * ref_logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    y = y if ref_softcap is None else ref_softcap * torch.tanh(y / ref_softcap)
    x, y = x / temperature, y / (temperature if ref_temperature is None else ref_temperature)
    if inf == "mask":
        x, y = x.masked_fill(gone, -INF), y.masked_fill(gone, -INF)
    lp, lq = x.log_softmax(-1), y.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    p_log_p, q_log_q = lp.masked_fill(lp == -INF, 0.0), lq.masked_fill(lq == -INF, 0.0)
    if kind == "policy_ref":
        return (p * (p_log_p - lq.masked_fill(lp == -INF, 0.0))).sum(-1)
    if kind == "ref_policy":
        return (q * (q_log_q - lp.masked_fill(lq == -INF, 0.0))).sum(-1)
    if beta in (0.0, 1.0):
        return (p + q).sum(-1) * 0
    both = (lp == -INF) & (lq == -INF)
    lm = torch.logaddexp(lp.masked_fill(both, 0.0) + math.log1p(-beta), lq.masked_fill(both, 0.0) + math.log(beta))
    return (beta * q * (q_log_q - lm.masked_fill(lq == -INF, 0.0)) + (1 - beta) * p * (p_log_p - lm.masked_fill(lp == -INF, 0.0))).sum(-1)


Result = tuple[Tensor, Tensor, Tensor]


def run_oracle(x: Tensor, y: Tensor, upstream: Tensor, dtype: torch.dtype, **options: Any) -> Result:
    a, b = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()
    kl = oracle(a, b, **options)
    return (kl.detach(), *torch.autograd.grad(kl, (a, b), upstream.to(dtype)))


def run(backend: str | int, x: Tensor, y: Tensor, upstream: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Result:
    """Value and both gradients, by the reference's functions or the public op."""
    x, y = x.detach(), y.detach()
    upstream = torch.ones(x.shape[:-1]) if upstream is None else upstream
    upstream = upstream.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if backend == "reference":
        args = tempering("test", **options).args()
        kl, stats = reference.token_kl(x, y, mask, *args)
        return (kl, *reference.token_kl_backward(upstream, x, y, mask, stats, *args, True, True))
    x, y = x.requires_grad_(), y.requires_grad_()
    kl = fasttax.token_kl(x, y, mask=mask, **options)
    return (kl.detach(), *torch.autograd.grad(kl, (x, y), upstream))


def check(backend: str | int, x: Tensor, y: Tensor, **options: Any) -> None:
    """Value and gradients within twice PyTorch's own error; `x`, `y` are rows of one sort, so that one scale fits them."""
    upstream = torch.linspace(-1.5, 2.0, x.shape[0])
    out = run(backend, x, y, upstream, **options)
    truth = run_oracle(x, y, upstream, torch.float64, **options)
    own = run_oracle(x, y, upstream, torch.float32, **options)
    assert [o.dtype for o in out] == [torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype, y.dtype]
    for o, w, t, name in zip(out, own, truth, ("value", "d_logits", "d_ref_logits"), strict=True):
        if o.dtype == torch.float64:  # PyTorch's error there is its error in float32, 2^29 times smaller; the truth has it too
            w = t + (w - t) * 2.0**-27
        try:
            # logits of magnitude M carry a rounding of eps * M into the exponent from each step: centring and scaling, on each of two rows
            size = max(1.0, float(x.float().abs().max()), float(y.float().abs().max()))
            magnitude = size * options.get("logit_scale", 1.0) / min(1.0, options.get("temperature", 1.0))
            assert_within(o, w.to(o.dtype), t, ulps=max(4.0, 4 * min(magnitude, 64.0)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def rows(V: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Four rows of each sort."""
    x, y, noise = torch.randn(3, 4, V)
    return {
        "apart": ((3 * x).to(dtype), (3 * y).to(dtype)),
        "near": ((3 * x).to(dtype), (3 * x + 0.1 * noise).to(dtype)),  # the series, not the exponentials
        "low": ((x - 500).to(dtype), (y - 300).to(dtype)),  # a tail filled with 0 instead of -inf would take all the mass
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabularies(V: int, dtype: torch.dtype, kind: str, backend: str | int) -> None:
    for x, y in rows(V, dtype).values():
        check(backend, x, y, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)  # float16 differs in load and store alone
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, dtype: torch.dtype, kind: str, backend: str | int) -> None:
    for sort, (x, y) in rows(147, dtype).items():  # two blocks of 64, a vector, a tail of 3
        if sort != "low" or not {"softcap", "ref_softcap"} & set(OPTIONS[option]):  # -500 under a softcap has no gradient left
            check(backend, x, y, kind=kind, **OPTIONS[option])


# --- hard rows -----------------------------------------------------------------------------------------------------------


def peaked(height: float, who: str, where: int, V: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 4, V) * 0.5
    if who in ("policy", "both", "apart"):
        x[:, where] += height
    if who in ("ref", "both"):
        y[:, where] += height
    if who == "apart":
        y[:, where // 2] += height
    return x, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["policy", "ref", "both", "apart"])
# 3000 is in a whole block beyond the first 2048 entries, 9000 in the last, partial vector; 100 is seen when the frame is primed
@pytest.mark.parametrize("where", [100, 3000, 9000])
@pytest.mark.parametrize("height", [12, 39, 60])  # within the slack of 40, at its edge, and a collapsed row
def test_peaks(height: float, where: int, who: str, kind: str, backend: str | int) -> None:
    x, y = peaked(height, who, where, 9001)
    for options in ({}, {"ref_temperature": 1.1}):  # the shared frame and the general one
        check(backend, x, y, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_against_peaked(kind: str, backend: str | int) -> None:
    """30001 entries of like mass in one row, one in the other: sum e^ay is what is left when the sums of both cancel."""
    flat, peak = torch.randn(2, 2, 30001) * 0.3
    peak[:, 77] = 30
    for x, y in ((flat, peak), (peak, flat)):
        for options in ({}, {"ref_temperature": 1.1}, {"inf": "mask"}):
            check(backend, x, y, kind=kind, **options)


@pytest.mark.parametrize(("size", "offset", "bound"), [
    (1e-3, 0.0, 1e-3),  # KL about 5e-7
    (1e-1, 1000.0, 1e-5),  # KL about 5e-3, policy 1000 above
    (1e-1, -1000.0, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("V", [1003, 9001])
@pytest.mark.parametrize("kind", KINDS)
def test_small_kl_keeps_its_digits(kind: str, V: int, size: float, offset: float, bound: float, backend: str | int) -> None:
    y = torch.randn(8, V)
    x = (y + size * torch.randn(8, V)) + offset
    kl = run(backend, x, y, kind=kind)[0]
    truth = oracle(x.double(), y.double(), kind=kind)
    assert truth.min() > 1e-8
    assert truth.max() < 2e-2
    assert ((kl - truth).abs() / truth).max() <= bound


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"softcap": 5.0, "ref_softcap": 5.0}, {"inf": "mask"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_exactly_zero(dtype: torch.dtype, kind: str, options: dict[str, Any], backend: str | int) -> None:
    for V in (1, 17, 9001):
        x = (5 * torch.randn(3, V)).to(dtype)
        x[1] -= 200
        x[2, V // 2] = -INF if V > 1 else 0.0
        for out in run(backend, x, x.clone(), kind=kind, **options):
            assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_the_ends_is_zero(beta: float, backend: str | int) -> None:
    for out in run(backend, torch.randn(3, 70), torch.randn(3, 70), kind="jsd", beta=beta):
        assert torch.equal(out, torch.zeros_like(out))


logit = st.floats(-1e4, 1e4, width=32) | st.sampled_from([-INF, 0.0, 1000.0, -88.5, 1e-6])


@given(st.data(), st.integers(1, 70), st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from([1.0, 0.3]))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def check_never_negative(backend: str | int, data: st.DataObject, V: int, kind: str, dtype: torch.dtype, ref_temperature: float) -> None:
    base = st.lists(logit, min_size=V, max_size=V)
    x = torch.tensor([data.draw(base)], dtype=torch.float64).to(dtype)
    y = torch.tensor([data.draw(base)], dtype=torch.float64).to(dtype) if data.draw(st.booleans()) else x * (1 + 2**-7)
    kl = run(backend, x, y, kind=kind, ref_temperature=ref_temperature)[0]
    dead = bool((x == -INF).all() or (y == -INF).all())
    assert bool(kl.isnan().all()) if dead else bool((kl >= 0).all())


def test_never_negative(backend: str | int) -> None:
    check_never_negative(backend)


def test_near_rows_are_never_negative(backend: str | int) -> None:
    """Rounding errors of both signs are as large as these KLs."""
    y = 3 * torch.randn(256, 203)
    for size in (1e-7, 1e-5, 1e-3):
        for kind in KINDS:
            assert (run(backend, y + size * torch.randn_like(y), y, kind=kind)[0] >= 0).all()


# --- -inf, NaN, masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inf", ["propagate", "mask"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [5, 130, 9001])  # tail only, blocks and tail, several folds
@pytest.mark.parametrize("where", ["both", "policy", "ref", "each"])
def test_minus_infinity(where: str, V: int, kind: str, inf: str, backend: str | int) -> None:
    x, y = torch.randn(2, 4, V)
    for at in (1, V // 2, V - 1):
        if where in ("both", "policy", "each"):
            x[:, at] = -INF
        if where in ("both", "ref"):
            y[:, at] = -INF
    if where == "each":
        y[:, 3] = -INF
    infinite = inf == "propagate" and {"policy_ref": where in ("ref", "each"), "ref_policy": where in ("policy", "each"), "jsd": False}[kind]
    if infinite:
        assert (run(backend, x, y, kind=kind, inf=inf)[0] == INF).all()
    else:
        check(backend, x, y, kind=kind, inf=inf)


def test_most_of_the_vocabulary_suppressed(backend: str | int) -> None:
    """A frame primed on the first 2048 entries finds no maximum there."""
    x, y = torch.randn(2, 4, 9001)
    x[:, :8000] = y[:, :8000] = -INF
    for kind in KINDS:
        check(backend, x, y, kind=kind)
        check(backend, x, y, kind=kind, inf="mask")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_is_nan_and_alone(dtype: torch.dtype, kind: str, bad: float, backend: str | int) -> None:
    V = 4201  # two folds, blocks, vectors, a tail
    clean = torch.randn(2, 3, V).to(dtype)
    expected = run(backend, *clean, kind=kind)[0]
    for options in ({}, {"ref_temperature": 1.3}):
        for at in (0, 2047, 2111, V - 1):
            for side in (0, 1):
                z = clean.clone()
                z[side, 1, at] = bad
                kl = run(backend, *z, kind=kind, **options)[0]
                assert kl[1].isnan(), (at, side, kl)
                if not options:
                    assert torch.equal(kl[[0, 2]], expected[[0, 2]])


def test_a_row_of_minus_infinity_is_nan(backend: str | int) -> None:
    x, y = torch.randn(2, 2, 40)
    x[0], y[1] = -INF, -INF
    for kind in KINDS:
        assert run(backend, x, y, kind=kind)[0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_is_not_read(dtype: torch.dtype, kind: str, backend: str | int) -> None:
    x, y = torch.randn(2, 5, 70).to(dtype)
    expected = run(backend, x, y, kind=kind)
    mask = torch.tensor([True, False, True, False, False])
    x[1], y[1], x[3], y[4] = NAN, INF, -INF, NAN
    for options in ({}, {"softcap": 30.0, "ref_softcap": 30.0}, {"inf": "mask"}):
        out = run(backend, x, y, mask=mask, kind=kind, **options)
        if not options:
            for o, e in zip(out, expected, strict=True):
                assert torch.equal(o[mask], e[mask])
        for o in out:
            assert torch.equal(o[~mask], torch.zeros_like(o[~mask]))


@pytest.mark.parametrize("mask", [
    torch.tensor([[True, False, True], [False, False, True]]),
    torch.tensor([[1, 0, 3], [0, 0, -1]]),  # anything but 0 counts
    torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    torch.tensor([True, False, True]),  # broadcast over sequences
    torch.tensor([[True], [False]]),  # a whole sequence out
    torch.tensor(False),
    torch.ones(3, 2, dtype=torch.bool).t(),  # strided
], ids=["bool", "int", "float", "row", "column", "scalar", "strided"])  # fmt: skip
def test_mask_weight_and_reductions(mask: Tensor) -> None:
    x, y, weight = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11), torch.rand(2, 3, requires_grad=True)
    live = (mask != 0).expand(2, 3)
    kl = torch.where(live, oracle(x.double(), y.double()), 0.0)
    for w in (None, weight):
        tokens = kl if w is None else kl * w.double()
        for reduction, truth in {"none": tokens, "sum": tokens.sum(), "mean": tokens.sum() / max(1, int(live.sum()))}.items():
            out = fasttax.token_kl(x, y, mask=mask, weight=w, reduction=reduction)
            torch.testing.assert_close(out.double(), truth, rtol=2e-6, atol=1e-9)
            inputs = (x,) if w is None else (x, w)
            for d, t in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(truth.sum(), inputs, retain_graph=True), strict=True):
                torch.testing.assert_close(d, t, rtol=1e-5, atol=1e-8)


def test_mean_of_nothing_is_zero_with_a_graph() -> None:
    for shape, mask in (((2, 3, 7), torch.zeros(2, 3, dtype=torch.bool)), ((0, 7), None), ((2, 0, 7), None)):
        x = torch.full(shape, NAN, requires_grad=True)
        loss = fasttax.token_kl(x, torch.randn(shape), mask=mask, reduction="mean")
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(x.grad, torch.zeros(shape))


def test_a_bad_weight_under_the_mask_does_not_count() -> None:
    weight = torch.tensor([1.0, NAN, INF])
    out = fasttax.token_kl(torch.randn(3, 5), torch.randn(3, 5), mask=torch.tensor([1, 0, 0]), weight=weight, reduction="mean")
    assert out.isfinite()


# --- layouts ---------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "0d": lambda z: z[0, 0, 0],  # one token, no leading dimension
    "1d": lambda z: z[0, 0],
    "3d": lambda z: z,
    "none": lambda z: z[0, 0, :0],
    "none_inside": lambda z: z[:, :0],
    "one": lambda z: z[:1, 0, 0],
    "shifted": lambda z: z[0, :, :-1],  # the next-token logits of a language model
    "transposed": lambda z: z.transpose(0, 2),
    "every_other_row": lambda z: z[:, ::2, 1::2],
    "every_other_entry": lambda z: z[..., ::2],
    "vocabulary_first": lambda z: z.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "unaligned": lambda z: z[..., 1:],  # rows start at no multiple of a vector, and end where others begin
    "one_entry": lambda z: z[..., 3:4],  # V = 1 with a vocabulary stride that is not 1
    "expanded": lambda z: z[:, :1].expand(-1, 5, -1, -1),
    "expanded_vocabulary": lambda z: z[..., :1].expand(-1, -1, -1, 9),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str | int) -> None:
    """A view gives what its contiguous copy gives, and the gradient goes back through the view."""
    view = LAYOUTS[layout]
    x, y = torch.randn(2, 2, 3, 4, 37).to(dtype)
    for kind in KINDS:
        strided, copied = run(backend, view(x), view(y), kind=kind), run(backend, view(x).contiguous(), view(y).contiguous(), kind=kind)
        assert strided[0].shape == view(x).shape[:-1]
        for s, c in zip(strided, copied, strict=True):  # torch's log_softmax itself may take another path for another layout
            torch.testing.assert_close(s, c, **({"rtol": 2e-2, "atol": 1e-4} if backend == "reference" else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_views(layout: str) -> None:
    view = LAYOUTS[layout]
    x, y = torch.randn(2, 2, 3, 4, 37, dtype=torch.float64).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()
    got = torch.autograd.grad(fasttax.token_kl(view(x), view(y)).sum(), (x, y))
    expected = torch.autograd.grad(oracle(view(x), view(y)).sum(), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_one_reference_for_many_rollouts() -> None:
    x, y = torch.randn(4, 3, 65, requires_grad=True), torch.randn(1, 3, 65, requires_grad=True)
    fasttax.token_kl(x, y.expand_as(x)).sum().backward()
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    oracle(a, b.expand_as(a)).sum().backward()
    torch.testing.assert_close((x.grad.double(), y.grad.double()), (a.grad, b.grad), rtol=1e-5, atol=1e-7)


def test_mixed_dtypes() -> None:
    x, y = torch.randn(3, 65).bfloat16().requires_grad_(), torch.randn(3, 65).requires_grad_()
    kl = fasttax.token_kl(x, y)
    assert torch.equal(kl, fasttax.token_kl(x.float(), y))
    kl.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.bfloat16, torch.float32)
    assert fasttax.token_kl(x, y.double()).dtype == torch.float64
    assert fasttax.token_kl(x, y.half()).dtype == torch.float32


# --- invariance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(dtype: torch.dtype, kind: str, simd: int, threads: Callable[[int], None]) -> None:
    """A row's bits depend on nothing but the row: not on its neighbours, its place, its alignment or the threads."""
    x, y = (2 * torch.randn(2, 70, 2201)).to(dtype)  # 70 rows of 2201 make five tasks of 14
    x[1, 2150] += 60  # a neighbour that is run twice
    threads(1)
    one = run(simd, x, y, kind=kind)
    threads(2)
    for other in (run(simd, x, y, kind=kind), run(simd, x, y, kind=kind)):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    back = run(simd, x.flip(0), y.flip(0), kind=kind)
    for n in (0, 1, 69):
        for alone, whole, moved in zip(run(simd, x[n : n + 1], y[n : n + 1], kind=kind), one, back, strict=True):
            assert torch.equal(alone[0], whole[n])
            assert torch.equal(moved[69 - n], whole[n])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"ref_temperature": 2.0}, {"softcap": 9.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone_is_the_same(kind: str, options: dict[str, Any], backend: str | int) -> None:
    """One side, the other and both are compiled apart."""
    x, y = torch.randn(2, 3, 2201)
    args = tempering("test", kind=kind, **options).args()
    ops = reference if backend == "reference" else torch.ops.fasttax
    kl, stats = ops.token_kl(x, y, None, *args)
    both = ops.token_kl_backward(torch.ones(3), x, y, None, stats, *args, True, True)
    policy = ops.token_kl_backward(torch.ones(3), x, y, None, stats, *args, True, False)
    ref = ops.token_kl_backward(torch.ones(3), x, y, None, stats, *args, False, True)
    assert (policy[1].numel(), ref[0].numel()) == (0, 0)
    scale = max(float(both[0].abs().max()), float(both[1].abs().max()))
    torch.testing.assert_close((policy[0], ref[1]), both, rtol=1e-5, atol=2e-7 * scale)


def test_nothing_is_left_uninitialised(backend: str | int) -> None:
    """torch fills new memory with NaN: whatever the kernel does not write shows."""
    x, y = torch.randn(2, 5, 2051)
    mask = torch.tensor([True, False, True, True, False])
    plain = run(backend, x, y, mask=mask)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all(), "no poison here, nothing tested"
        poisoned = run(backend, x, y, mask=mask)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    for a, b in zip(plain, poisoned, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone(backend: str | int) -> None:
    x, y = torch.randn(2, 5, 70)
    before = x.clone(), y.clone()
    run(backend, x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# --- autograd --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "ref_softcap": 2.0}, {"temperature": 0.7, "ref_temperature": 1.4, "logit_scale": 1.2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, options: dict[str, Any]) -> None:
    x, y = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for masked in (None, mask):
        assert torch.autograd.gradcheck(
            lambda a, b, m=masked: fasttax.token_kl(a, b, kind=kind, beta=0.3, mask=m, **options), (x.requires_grad_(), y.requires_grad_())
        )


def test_second_derivatives_are_refused() -> None:
    x, y = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    (d,) = torch.autograd.grad(fasttax.token_kl(x, y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="token_kl: second derivatives are not available"):
        d.sum().backward()


def test_two_losses_and_retained_graphs() -> None:
    x, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    first, second = fasttax.token_kl(x, y), fasttax.token_kl(x, y, kind="ref_policy")
    (both,) = torch.autograd.grad((first + second).sum(), x, retain_graph=True)
    apart = sum(torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (first, second))
    torch.testing.assert_close(both, apart)
    again = torch.autograd.grad(first.sum(), x, retain_graph=True)[0]
    assert torch.equal(again, torch.autograd.grad(first.sum(), x)[0])


def test_only_what_requires_grad_gets_one() -> None:
    x, y = torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)
    fasttax.token_kl(x, y).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(y.grad.double(), run_oracle(x, y, torch.ones(3), torch.float64)[2], rtol=1e-5, atol=1e-7)
    assert not fasttax.token_kl(x, y.detach()).requires_grad


def test_autocast() -> None:
    h, w, y = torch.randn(4, 8), torch.randn(70, 8, requires_grad=True), torch.randn(4, 70)
    with torch.autocast("cpu", torch.bfloat16):
        logits = h @ w.T
        kl = fasttax.token_kl(logits, y, reduction="mean")
    assert logits.dtype == torch.bfloat16
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), oracle(logits.double(), y.double()).mean(), rtol=1e-5, atol=0)
    kl.backward()
    assert w.grad.isfinite().all()


# --- inplace_backward ------------------------------------------------------------------------------------------------------

Program = Callable[[Tensor, Tensor, bool], None]


def kl_sum(logits: Tensor, ref: Tensor, inplace: bool) -> Tensor:
    return fasttax.token_kl(logits, ref, inplace_backward=inplace, reduction="sum")


def saved_before(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    (logits.square().sum() + kl_sum(logits, y, inplace)).backward()


def saved_by_the_model(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w.tanh(), y, inplace).backward()  # tanh keeps its output for its own backward


def two_heads(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    (kl_sum(logits, y, inplace) + kl_sum(logits, 2 * y, inplace)).backward()


def twice(w: Tensor, y: Tensor, inplace: bool) -> None:
    loss = kl_sum(w * 1, y, inplace)
    loss.backward(retain_graph=True)
    loss.backward()


def expanded(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum((w[:1] * 1).expand(6, -1), y, inplace).backward()


def overlapping_ref(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    kl_sum(logits[1:], logits[:-1].detach(), inplace).backward()  # a row's reference is the row before, already overwritten


def leaf(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w, y, inplace).backward()


def view_of_a_leaf(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w[1:], y[1:], inplace).backward()


def linear(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(torch.eye(6) @ w, y, inplace).backward()


def shifted(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum((w * 1)[:-1], y[1:], inplace).backward()


def outcome(program: Program, inplace: bool) -> Tensor:
    torch.manual_seed(0)
    w, y = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    before = w.detach().clone()
    program(w, y, inplace)
    assert torch.equal(w.detach(), before), "a parameter was overwritten"
    return w.grad


@pytest.mark.parametrize("program", [linear, shifted])
def test_inplace_backward(program: Program, simd: int) -> None:
    assert torch.equal(outcome(program, True), outcome(program, False))


@pytest.mark.parametrize("program", [saved_before, saved_by_the_model, two_heads, twice, leaf, view_of_a_leaf, expanded, overlapping_ref])
def test_inplace_backward_refuses_or_is_right(program: Program) -> None:
    """Where the logits' values are needed again, an error; never a wrong gradient or a lost parameter."""
    try:
        got = outcome(program, True)
    except (RuntimeError, ValueError) as error:
        assert any(text in str(error) for text in ("modified by an inplace operation", "inplace_backward")), error
    else:
        torch.testing.assert_close(got, outcome(program, False))


def test_inplace_backward_saves_the_buffer_and_serves_the_reference() -> None:
    w, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70, requires_grad=True)
    logits = w * 1
    kl_sum(logits, y, True).backward()
    assert torch.equal(logits.detach(), w.grad)
    torch.testing.assert_close(y.grad.double(), run_oracle(w, y, torch.ones(3), torch.float64)[2], rtol=1e-5, atol=1e-7)


# --- torch.library, torch.compile ------------------------------------------------------------------------------------------

ARGS = tempering("test", kind="jsd", temperature=0.7, softcap=9.0).args()
SAMPLES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor | None]]] = {
    "plain": lambda: (torch.randn(2, 3, 9), torch.randn(2, 3, 9), None),
    "grad": lambda: (torch.randn(3, 9, requires_grad=True), torch.randn(3, 9, requires_grad=True), torch.tensor([True, False, True])),
    "policy": lambda: (torch.randn(3, 9, requires_grad=True), torch.randn(3, 9), None),
    "bfloat16": lambda: (torch.randn(3, 9).bfloat16().requires_grad_(), torch.randn(3, 9).bfloat16(), None),
    "float64": lambda: (torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64), None),
    "strided": lambda: (torch.randn(4, 3, 9).transpose(0, 1)[:, 1:], torch.randn(3, 4, 9)[:, :-1], None),
    "empty": lambda: (torch.randn(0, 9, requires_grad=True), torch.randn(0, 9), None),
    "vector": lambda: (torch.randn(9), torch.randn(9), torch.tensor(True)),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    x, y, mask = SAMPLES[sample]()
    torch.library.opcheck(torch.ops.fasttax.token_kl.default, (x, y, mask, *ARGS))


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample: str, sides: tuple[bool, bool]) -> None:
    x, y, mask = SAMPLES[sample]()
    x, y = x.detach(), y.detach()
    kl, stats = torch.ops.fasttax.token_kl(x, y, mask, *ARGS)
    torch.library.opcheck(torch.ops.fasttax.token_kl_backward.default, (torch.randn_like(kl), x, y, mask, stats, *ARGS, *sides))


@pytest.mark.parametrize("sample", ["plain", "strided", "empty"])
def test_opcheck_backward_in_place(sample: str) -> None:
    x, y, mask = SAMPLES[sample]()
    x, y = x.detach(), y.detach()
    kl, stats = torch.ops.fasttax.token_kl(x, y, mask, *ARGS)
    torch.library.opcheck(torch.ops.fasttax.token_kl_backward_.default, (torch.randn_like(kl), x, y, mask, stats, *ARGS, True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    def step(hidden: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        return fasttax.token_kl(hidden * 2, ref, mask=mask, kind="ref_policy", temperature=0.9, reduction="mean")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for N in (3, 5, 8):
        x, y, mask = torch.randn(N, 70, requires_grad=True), torch.randn(N, 70), torch.arange(N) % 3 != 1
        loss = compiled(x, y, mask)
        (d,) = torch.autograd.grad(loss, x)
        eager = step(x, y, mask)
        torch.testing.assert_close((loss, d), (eager, *torch.autograd.grad(eager, x)), rtol=1e-6, atol=1e-8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled again for another N"


# --- size --------------------------------------------------------------------------------------------------------------------


def test_more_than_2_31_cells(simd: int) -> None:
    """Two rows 2^31 + 8 elements apart in 4 GiB that are never touched between them: an offset of 32 bits would fault or miss."""
    V, stride = 3001, 2**31 + 8
    space = torch.empty(stride + V, dtype=torch.bfloat16).as_strided((2, V), (stride, 1))
    space.copy_(torch.randn(2, V))
    ref = torch.randn(2, V).bfloat16()
    near = space.contiguous()
    for a, b in zip(run(simd, space, ref), run(simd, near, ref), strict=True):
        assert torch.equal(a, b)
    args = tempering("test").args()
    kl, stats = torch.ops.fasttax.token_kl(near, ref, None, *args)
    for logits in (space, near):
        torch.ops.fasttax.token_kl_backward_(torch.ones(2), logits, ref, None, stats, *args, False)
    assert torch.equal(space, near)


MEMORY = """
import torch, fasttax
def status(key):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024
def step(x, y, inplace):
    logits = x if not inplace else x.requires_grad_().view_as(x)
    fasttax.token_kl(x.requires_grad_(), y, reduction='mean', kind={kind!r}).backward()
step(torch.randn(2, 100), torch.randn(2, 100), False)
x, y = torch.randn(2, 256, 65536).unbind()
x = x.clone()
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
step(x, y, False)
print(status('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_the_gradient() -> None:
    """64 MiB of gradient and at most 4 MiB beside it (stats of 256 tokens, threads' stacks)."""
    out = subprocess.run([sys.executable, "-c", MEMORY.format(kind="policy_ref")], capture_output=True, text=True, check=True)
    extra = float(out.stdout)
    assert 60 <= extra <= 68, f"{extra} MiB"


# --- wrong calls -------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 5)
WRONG: dict[str, tuple[tuple[Any, Any], dict[str, Any], type[Exception], list[str]]] = {
    "not_a_tensor": (([1.0], X), {}, TypeError, ["logits", "torch.Tensor", "[1.0]"]),
    "ref_not_a_tensor": ((X, None), {}, TypeError, ["ref_logits", "torch.Tensor", "None"]),
    "integers": ((X.long(), X), {}, TypeError, ["logits", "float32", "int64"]),
    "no_dimension": ((X[0, 0], X[0, 0]), {}, ValueError, ["logits", "(..., V)", "()"]),
    "empty_vocabulary": ((X[:, :0], X[:, :0]), {}, ValueError, ["logits", "V >= 1", "(2, 0)"]),
    "other_vocabulary": ((X, X[:, :4]), {}, ValueError, ["ref_logits", "vocabulary of 5", "(2, 4)", "tokenizer"]),
    "other_shape": ((X, X[:1]), {}, ValueError, ["ref_logits", "(2, 5)", "(1, 5)"]),
    "other_device": ((X, X.to("meta")), {}, ValueError, ["ref_logits", "cpu", "meta", ".to("]),
    "kind": ((X, X), {"kind": "forward"}, ValueError, ["kind", "'policy_ref'", "'ref_policy'", "'jsd'", "'forward'"]),
    "reduction": ((X, X), {"reduction": "batchmean"}, ValueError, ["reduction", "'mean'", "'batchmean'"]),
    "inf": ((X, X), {"inf": "drop"}, ValueError, ["inf", "'propagate'", "'mask'", "'drop'"]),
    "beta": ((X, X), {"kind": "jsd", "beta": 1.5}, ValueError, ["beta", ">= 0", "<= 1", "1.5"]),
    "beta_nan": ((X, X), {"beta": NAN}, ValueError, ["beta", "finite", "nan"]),
    "temperature": ((X, X), {"temperature": 0}, ValueError, ["temperature", "> 0", "0.0"]),
    "ref_temperature": ((X, X), {"ref_temperature": -1.0}, ValueError, ["ref_temperature", "> 0", "-1.0"]),
    "temperature_tensor": ((X, X), {"temperature": torch.ones(())}, TypeError, ["temperature", ".item()"]),
    "temperature_text": ((X, X), {"temperature": "hot"}, TypeError, ["temperature", "number", "hot"]),
    "softcap": ((X, X), {"softcap": 0.0}, ValueError, ["softcap", "> 0", "0.0"]),
    "ref_softcap": ((X, X), {"ref_softcap": INF}, ValueError, ["ref_softcap", "finite", "inf"]),
    "logit_scale": ((X, X), {"logit_scale": -2}, ValueError, ["logit_scale", "> 0", "-2.0"]),
    "ref_logit_scale": ((X, X), {"ref_logit_scale": NAN}, ValueError, ["ref_logit_scale", "finite", "nan"]),
    "mask_shape": ((X, X), {"mask": torch.ones(3)}, ValueError, ["mask", "(2,)", "(3,)"]),
    "mask_list": ((X, X), {"mask": [1, 0]}, TypeError, ["mask", "torch.Tensor", "[1, 0]"]),
    "mask_device": ((X, X), {"mask": torch.ones(2, device="meta")}, ValueError, ["mask", "cpu", "meta"]),
    "weight_shape": ((X, X), {"weight": torch.ones(2, 5)}, ValueError, ["weight", "(2,)", "(2, 5)"]),
    "weight_number": ((X, X), {"weight": 2.0}, TypeError, ["weight", "torch.Tensor", "2.0"]),
    "inplace_strided": ((torch.zeros(5, 2).T, X), {"inplace_backward": True}, ValueError, ["inplace_backward", "contiguous"]),
    "inplace_mixed": ((X, X.double()), {"inplace_backward": True}, ValueError, ["inplace_backward", "dtype"]),
    "inplace_leaf": ((X.clone().requires_grad_(), X), {"inplace_backward": True}, ValueError, ["inplace_backward", "leaf"]),
    "tp_group": ((X, X), {"tp_group": object()}, ValueError, ["tp_group", "init_process_group"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    tensors, options, error, texts = WRONG[case]
    with pytest.raises(error) as raised:
        fasttax.token_kl(*tensors, **options)
    for text in ("token_kl: ", "expected", "got", *texts):
        assert text in str(raised.value), str(raised.value)


def test_the_op_itself_checks() -> None:
    """Behind the public function the kernels trust nothing either."""
    args = tempering("test").args()
    for x, y, mask in ((X, X[:, :4], None), (X.T, X.T, None), (X, X.double(), None), (X, X, torch.ones(3).bool()), (X[:, :0], X[:, :0], None)):
        with pytest.raises(RuntimeError, match="token_kl: "):
            torch.ops.fasttax.token_kl(x, y, mask, *args)
