"""The end of the functions of tokens: estimates, weights, mask, reduction and scale as one op each
way, and gradients that a forward has left, against torch's own autograd in float64.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl import gradients
from fasttax.kl import weigh as kl_weigh
from fasttax.kl.weigh import Weighing
from fasttax.reference import weigh
from fasttax.reference.weigh import K1, K2, K3, REDUCTIONS
from tests.tools.utils import assert_within

INF, NAN = math.inf, math.nan
OUTPUTS = (3, K3, K1, K2, 3, 0)
MASK = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])


def rows(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probs by the policy, the reference, who sampled, and another value."""
    r = torch.randn(4, 2, 5) - 3
    return [r[:1].to(dtype), r[1:3].to(dtype), r[3:].to(dtype)]


def arguments(pair: tuple[int, ...], reduction: int, weighed: bool, masked: bool) -> Any:
    weight = torch.randn(2, 5) if weighed else None
    return OUTPUTS, pair, MASK if masked else None, weight, reduction, -0.3, 3.0


CASES = list(itertools.product(((0, 1), (0, 1, 2)), range(3), (False, True), (False, True)))


@pytest.mark.parametrize("reduction", [1, 2])
def test_more_tokens_than_a_block_takes(reduction: int) -> None:
    """2500: Triton's programs take 1024 at a time, CUDA's blocks as many."""
    value = torch.rand(1, 2500)
    mask = torch.arange(2500) % 7 != 0
    (got,) = torch.ops.fasttax.weigh_tokens(
        [value], [0], [], mask, None, reduction, 1.0, 3.0, False
    )
    (want,) = weigh.weigh_tokens([value.double()], [0], [], mask, None, reduction, 1.0, 3.0, False)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("counted", [0, 1, 2])
def test_a_mean_over_few_tokens(counted: int) -> None:
    """Of one it is the token's own, of none 0."""
    value, mask = torch.rand(1, 4), torch.arange(4) < counted
    mean = REDUCTIONS.index("mean")
    (got,) = torch.ops.fasttax.weigh_tokens([value], [0], [], mask, None, mean, 1.0, 3.0, False)
    torch.testing.assert_close(got, value[0, :counted].sum() / max(counted, 1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Any, reverse: bool) -> None:
    given = arguments(*case)
    values = rows()
    if case[-1]:
        for value in values:
            value[:, ~MASK] = NAN  # what is under the mask is not read

    def truth(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [v.to(dtype).requires_grad_() for v in values]
        outputs, pair, mask, weight, reduction, scale, clip = given
        of = None if weight is None else weight.to(dtype)
        out = weigh.weigh_tokens(leaves, outputs, pair, mask, of, reduction, scale, clip, reverse)
        upstream = [g.to(dtype) for g in grads[:2] + grads[3:]]
        found = torch.autograd.grad(out[:2] + out[3:], leaves, upstream, allow_unused=True)
        d = [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]
        return [o.detach() for o in out], torch.cat(d)

    shape = (2, 5) if case[1] == 0 else ()
    grads = [torch.randn(shape) for _ in OUTPUTS]
    grads[1] = torch.randn(()).expand(shape)  # as a sum gives it
    out = torch.ops.fasttax.weigh_tokens(values, *given, reverse)
    which = [0, 1, 3, 4, 5]
    upstream = [grads[i] for i in which]
    d = torch.ops.fasttax.weigh_tokens_backward(upstream, which, values, *given, reverse)
    (wide, d_wide), (own, d_own) = truth(torch.float64), truth(torch.float32)
    for a, b, c in zip(out, own, wide, strict=True):
        assert_within(a, b, c, ulps=16)
    assert_within(d, d_own, d_wide, ulps=16)
    if case[-1]:
        assert torch.equal(d[:, ~MASK], torch.zeros(4, 2))


def test_impossible_tokens() -> None:
    """What one model rules out is infinite; what both do counts nothing, and no slope is NaN."""
    logp = torch.tensor([-1.0, -INF, -INF, -1.0, -INF, -1.0])
    ref = torch.tensor([-INF, -1.0, -INF, -2.0, -1.0, -1.0])
    old = torch.tensor([-1.0, -1.0, -INF, -INF, -INF, -200.0])
    for kind, has_old in itertools.product((K1, K2, K3), (False, True)):
        pair = (0, 1, 2) if has_old else (0, 1)
        values = [torch.stack((logp, ref, old))]
        for reverse in (False, True):
            options = ((kind,), pair, None, None, 0, 1.0, 20.0, reverse)
            leaves = [v.double().requires_grad_() for v in values]
            (truth,) = weigh.weigh_tokens(leaves, *options)
            (got,) = torch.ops.fasttax.weigh_tokens(values, *options)
            torch.testing.assert_close(got.double(), truth.detach(), rtol=1e-5, atol=1e-6)
            d = torch.ops.fasttax.weigh_tokens_backward([torch.ones(6)], [0], values, *options)
            assert not d.isnan().any()
            assert torch.equal(d[:, 2], torch.zeros(3))
            finite = got.isfinite()
            (expected,) = torch.autograd.grad(truth[finite].sum(), leaves, allow_unused=True)
            torch.testing.assert_close(
                d[:, finite].double(), expected[:, finite], rtol=1e-5, atol=1e-5
            )


def test_a_token_without_a_gradient_gets_no_nan() -> None:
    values = [torch.tensor([[-1.0, -INF, NAN], [-INF, -1.0, -1.0]])]
    grads = [torch.tensor([0.0, 0.0, 0.0])]
    options = ((K2,), (0, 1), None, None, 0, 1.0, 20.0, False)
    d = torch.ops.fasttax.weigh_tokens_backward(grads, [0], values, *options)
    assert torch.equal(d, torch.zeros(2, 3))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_the_results_gradient(reduction: str) -> None:
    value = torch.randn(2, 5)
    for weight, mask in itertools.product((None, torch.randn(2, 5)), (None, MASK)):
        w = Weighing("op", mask, weight, REDUCTIONS.index(reduction), 0.7)
        by_token = w.by_token(value)
        leaf = (value if mask is None else value.masked_fill(~mask, 0)).requires_grad_()
        (d,) = torch.autograd.grad(w.of(leaf).sum(), leaf)
        live = torch.ones_like(MASK) if mask is None else mask
        torch.testing.assert_close(by_token[live], d[live])


def test_no_tokens() -> None:
    for reduction in range(3):
        w = Weighing("op", None, torch.empty(0), reduction, 2.0)
        leaf = torch.empty(0, requires_grad=True)
        result = w.of(leaf)
        assert result.shape == (() if reduction else (0,))
        assert float(result.detach().sum()) == 0
        assert w.by_token(leaf).shape == (0,)
        result.sum().backward()
        assert leaf.grad.shape == (0,)
    none = torch.zeros(5, dtype=torch.bool)
    assert float(Weighing("op", none, None, 2, 1.0).of(torch.full((5,), NAN))) == 0


# derivatives of the ops' results


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function's end by ops, as on a GPU."""
    for module in (kl_weigh, gradients):
        monkeypatch.setattr(module, "by_ops", lambda device: True)


def logits() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 3, 7, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_an_estimate_has_second_derivatives(kind: str, reduction: str) -> None:
    def value(*logps: Tensor) -> Tensor:
        a, b, old = logps
        result: Tensor = fasttax.kl_estimate(
            a, b, old_logp=old, kind=kind, reduction=reduction, weight=weight, scale=0.3
        )
        return result

    weight = torch.randn(5)
    leaves = tuple(torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)
    along = torch.func.jvp(value, leaves, tuple(torch.ones_like(a) for a in leaves))[1]
    d = torch.autograd.grad(value(*leaves).sum(), leaves)
    torch.testing.assert_close(along.sum(), torch.stack(d).sum())


def test_k3_of_a_near_policy_keeps_its_digits() -> None:
    """And its first three derivatives, by torch's own autograd as on a CPU: 1 - e^r, e^r, -e^r."""
    r = torch.tensor([1e-6, -1e-4, 3e-3, -0.2, 0.49, -0.7, 3.0], dtype=torch.float32)
    near, ref = (-r).requires_grad_(), torch.zeros(len(r))
    value = fasttax.kl_estimate(near, ref, kind="k3")
    (first,) = torch.autograd.grad(value.sum(), near, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), near, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), near)
    e = r.double().exp()
    eps = torch.finfo(torch.float32).eps
    terms = [r.double() ** n / float(math.factorial(n)) for n in range(2, 30)]
    k3 = torch.stack(terms).sum(0)
    for mine, exact in ((value, k3), (first, -torch.expm1(r.double())), (second, e), (third, -e)):
        assert bool(((mine.double() - exact).abs() <= 4 * eps * exact.abs()).all())
    slope = torch.func.jvp(
        lambda t: fasttax.kl_estimate(t, ref, kind="k3"), (-r,), (torch.ones_like(r),)
    )[1]
    assert torch.equal(slope, first)


@pytest.mark.usefixtures("ops")
def test_second_derivatives_of_a_sweep_are_refused() -> None:
    x, y = logits()
    for value in (
        fasttax.token_kl(x, y, scale=0.3),
        fasttax.token_kl(x, y, scale=0.3, reduction="mean"),
        fasttax.token_stats(x, y, torch.tensor([0, 3, 6]), outputs="k3").k3,
    ):
        (d,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            d.square().sum().backward()


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("written", ["mask", "weight"])
def test_what_is_written_into_before_the_backward_is_seen(written: str, reduction: str) -> None:
    """A buffer of masks that the next batch fills, say."""
    given = {"mask": MASK.clone(), "weight": torch.rand(2, 5, dtype=torch.float64)}
    logp, ref_logp = torch.randn(2, 2, 5, dtype=torch.float64)
    k3 = fasttax.kl_estimate(logp.requires_grad_(), ref_logp, reduction=reduction, **given)
    given[written].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        k3.sum().backward()


@pytest.mark.usefixtures("ops")
def test_batched_gradients() -> None:
    """torch.func.vmap over a backward."""
    x, y = logits()

    def back(value: Tensor, upstream: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, upstream, retain_graph=True)[0]

    ids, each = torch.tensor([0, 3, 6]), torch.eye(3, dtype=torch.float64)
    for value in (
        fasttax.token_kl(x, y, scale=0.3),
        fasttax.token_stats(x, y, ids, outputs="k3").k3,
        fasttax.token_stats(x, y, ids, outputs=("logp", "kl")).logp,
    ):
        together = torch.func.vmap(partial(back, value))(each)
        for row, one in zip(together, each, strict=True):
            torch.testing.assert_close(row, back(value, one))
    total = fasttax.token_kl(x, y, reduction="mean")
    factors = torch.tensor([1.0, 0.3], dtype=torch.float64)
    d = torch.func.vmap(partial(back, total))(factors)
    torch.testing.assert_close(d[1], 0.3 * torch.autograd.grad(total, x)[0])


# gradients that a forward has left


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_held_by_powers_of_two(dtype: torch.dtype) -> None:
    held = torch.randn(5, 7, 1000).to(dtype)
    for factor in (torch.tensor(-0.5), torch.tensor([0.5, 1.0, -2.0, 1.0, 0.0])):
        got = held.clone()
        torch.ops.fasttax.scale_held_(got, factor)
        by = factor.to(dtype)
        assert torch.equal(got, held * (by.reshape(-1, 1, 1) if by.numel() > 1 else by))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_held(dtype: torch.dtype) -> None:
    held = torch.randn(5, 3, 41).to(dtype)
    for factor in (
        torch.tensor(1.0),
        torch.tensor(0.3),
        torch.tensor(0.0),
        torch.tensor([0.3], dtype=torch.float64),
        torch.tensor([0.3, 1.0, -2.0, 1.0, 0.0]),
    ):
        got = held.clone()
        torch.ops.fasttax.scale_held_(got, factor)
        wide = held if dtype == torch.float64 else held.float()
        by = factor.reshape(-1, 1, 1) if factor.numel() > 1 else factor.reshape(())
        expected = (wide * by.to(wide.dtype)).to(dtype)
        assert torch.equal(got, expected), factor


def test_a_factor_is_not_rounded_to_the_gradients_dtype() -> None:
    """torch multiplies a bfloat16 tensor by a 0-d one that it rounds to bfloat16: 0.4 % off."""
    x, y = torch.randn(64, 500).bfloat16().requires_grad_(), torch.randn(64, 500).bfloat16()
    factor = 1.00390625 - 1e-4  # between two bfloat16
    for keep in (False, True):
        loss = fasttax.token_kl(x, y, reduction="sum")
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (d,) = torch.autograd.grad(factor * loss, x, retain_graph=keep)
        assert torch.equal(d, (plain.float() * factor).bfloat16())


def test_opcheck() -> None:
    values, mask, weight = rows(), MASK, torch.rand(2, 5)
    for reduction, pair in itertools.product(range(3), ((0, 1), (0, 1, 2))):
        options = (OUTPUTS, pair, mask, weight, reduction, 0.5, 20.0, False)
        torch.library.opcheck(torch.ops.fasttax.weigh_tokens.default, (values, *options))
        grads = [torch.rand((2, 5) if reduction == 0 else ()) for _ in range(2)]
        torch.library.opcheck(
            torch.ops.fasttax.weigh_tokens_backward.default, (grads, [0, 2], values, *options)
        )
        torch.library.opcheck(
            torch.ops.fasttax.token_weights.default, (weight, mask, weight, reduction, 0.5)
        )
    held = torch.randn(3, 4).bfloat16()
    for factor in (torch.tensor(0.5), torch.rand(3)):
        torch.library.opcheck(torch.ops.fasttax.scale_held_.default, (held.clone(), factor))
