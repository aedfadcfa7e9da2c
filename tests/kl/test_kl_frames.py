"""Rows whose chunks lie in frames far apart: what was summed moves there and keeps its digits.

A chunk is 2048, 1024 or 512 entries by instruction set; V is several of the largest.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from tests.tools.kl_cases import INF, oracle, run, run_oracle

C = 2048


def rows(sort: str) -> tuple[Tensor, Tensor]:
    x, y = torch.zeros(1, 3 * C), torch.zeros(1, 3 * C)
    if sort == "masses apart, then a higher chunk":
        x[:, C : 2 * C], y[:, C : 2 * C], x[:, 2 * C :] = 20.0, -0.5, 20.5
        x += 0.01 * torch.randn(1, 3 * C)
        y += 0.01 * torch.randn(1, 3 * C)
    elif sort == "the same with an entry in neither row":
        x[:, C : 2 * C], y[:, C : 2 * C], x[:, 2 * C :] = 20.0, -0.5, 20.5
        x[0, 1] = y[0, 1] = -INF
    elif sort == "a side whose first mass is nothing beside what follows":
        y[:, C:] = 1000.0
        x[0, C] = 5.0
    elif sort == "an infinite term of a mass that vanishes":
        x[:, :C] = y[:, :C] = -1e4
        y[0, 0] = -INF
    return x, y


SORTS = (
    "masses apart, then a higher chunk",
    "the same with an entry in neither row",
    "a side whose first mass is nothing beside what follows",
    "an infinite term of a mass that vanishes",
)


@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_values(sort: str, mirrored: bool, kind: str, backend: str | int) -> None:
    x, y = rows(sort)
    if mirrored:
        x, y = y, x
    kl, dx, _ = run(backend, x, y, torch.ones(1), kind=kind)
    leaf = x.double().requires_grad_()
    truth = oracle(leaf, y.double(), kind=kind)
    if truth.isnan():  # 0 inf, of a probability that is 0 in float64 too
        assert float(kl) == 0
        return
    assert float(kl) == pytest.approx(float(truth.detach()), rel=1e-4, abs=1e-9)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    # d - E[d] of a gap of 20 is rounded to 1e-6 of p
    assert float((dx - slope).norm()) <= 1e-4 * float(slope.norm()) + 1e-6


@pytest.mark.parametrize("sort", SORTS[:3])
def test_statistics(sort: str) -> None:
    x, y = rows(sort)
    stats = fasttax.token_stats(x, y, outputs=("entropy", "kl_policy_ref", "kl_ref_policy"))
    lp, lq = x.double().log_softmax(-1), y.double().log_softmax(-1)
    truth = {
        "kl_policy_ref": torch.where(lp > -INF, lp.exp() * (lp - lq), 0.0).nansum(),
        "kl_ref_policy": torch.where(lq > -INF, lq.exp() * (lq - lp), 0.0).nansum(),
        "entropy": -torch.where(lp > -INF, lp.exp() * lp, 0.0).nansum(),
    }
    for name, value in truth.items():
        assert float(getattr(stats, name)) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("beta", [0.999, 0.999999, 1e-6])
def test_jsd_near_its_ends(beta: float) -> None:
    x = torch.randn(2, 5000)
    y = x + 0.3 * torch.randn(2, 5000)
    kl = fasttax.token_kl(x, y, kind="jsd", beta=beta).double()
    lp, lq = x.double().log_softmax(-1), y.double().log_softmax(-1)
    m = (lp.exp() + beta * (lq.exp() - lp.exp())).log()
    # p log(p/m) + (m - p) and its twin: of one sign each, and the same sum
    of_p = (lp.exp() * (lp - m) + m.exp() - lp.exp()).sum(-1)
    of_q = (lq.exp() * (lq - m) + m.exp() - lq.exp()).sum(-1)
    truth = beta * of_q + (1 - beta) * of_p
    assert ((kl - truth).abs() / truth).max() < 1e-4


def test_log_probs_of_a_dominant_token_under_a_softcap() -> None:
    x = torch.randn(300, 50)
    x[:, 3] = torch.linspace(20, 28, 300)
    ids = torch.full((300,), 3)
    leaf = x.clone().requires_grad_()
    logp = fasttax.token_stats(leaf, None, ids, outputs=("logp",), softcap=30.0).logp
    assert logp is not None
    logp.sum().backward()
    assert leaf.grad is not None
    exact = x.double().requires_grad_()
    truth = (30 * torch.tanh(exact / 30)).log_softmax(-1)[:, 3]
    truth.sum().backward()
    assert exact.grad is not None
    # eager's: the logits' own rounding, at 1e-6
    eager = (30 * torch.tanh(x / 30)).log_softmax(-1)[:, 3]
    own = (eager.double() - truth.detach()).abs().max()
    assert (logp.detach().double() - truth.detach()).abs().max() <= 2 * own + 1e-7


@pytest.mark.parametrize("V", [33, 2048 + 5])
def test_a_softcaps_bits_do_not_depend_on_what_came_before(V: int, backend: str | int) -> None:
    """The last vector of a row is not whole: what lies beyond it is no part of any choice."""
    x = torch.randn(1, V) * 3
    y = x + 1e-3 * torch.randn(1, V)
    caps = {"softcap": 30.0, "ref_softcap": 30.0}
    found = []
    for filler in (0.0, 25.0, 0.0):
        other = torch.full((1, C), filler)
        run(backend, other, -other, torch.ones(1), **caps)
        found.append(run(backend, x, y, torch.ones(1), **caps))
    for again in found[1:]:
        for first, second in zip(found[0], again, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "ref_softcap": 30.0}])
@pytest.mark.parametrize("temperature", [0.7, 0.1, 0.01])
def test_a_policy_of_one_token_has_a_gradient_of_zero(
    temperature: float, options: dict[str, float], simd: str | int
) -> None:
    """Its log-ratio is the KL to the bit: a product rounded in one and not in the other is not."""
    torch.manual_seed(0)
    x, y = torch.full((64, 700), -300.0), torch.randn(64, 700) * 30
    x[:, 3] = 100
    x.requires_grad_()
    kl = fasttax.token_kl(x, y, temperature=temperature, **options)
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    assert (kl > 10).any()
    exact = isinstance(simd, int) and simd > 0  # portable vectors: a unit in the KL's last place
    allowed = 0.0 if exact else torch.finfo(torch.float32).eps * kl / temperature
    assert (gradient[:, 3].abs() <= allowed).all()


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_its_gradient_is_zero_where_the_reference_peaks_in_a_later_chunk(
    temperature: float, simd: int
) -> None:
    """There the frame moves, after what the gradient is made of was kept in the one before."""
    x, y = torch.full((4, 3 * C), -300.0), torch.randn(4, 3 * C)
    x[:, 3], y[:, 2 * C + 5] = 100.0, 300.0
    x.requires_grad_()
    loss = fasttax.token_kl(
        x, y, temperature=temperature, softcap=30.0, ref_softcap=30.0, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) > 10
    allowed = 0.0 if simd > 0 else torch.finfo(torch.float32).eps * float(loss) / temperature
    assert float(gradient[:, 3].abs().max()) <= allowed


@pytest.mark.parametrize("inf", ["propagate", "mask"])
@pytest.mark.parametrize("ref_softcap", [30.0, 20.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_capped_policys_gradient_where_frames_move(
    dtype: torch.dtype, ref_softcap: float | None, inf: str, simd: int
) -> None:
    """Chunks of nothing, of a gap as large as the cap, and of a peak far above all before."""
    x = torch.randn(3, 3 * C + 7) - 25
    y = x + 0.1 * torch.randn(3, 3 * C + 7)
    x[0, :C], y[1, :C] = -INF, -INF
    x[:, C : C + 100], y[:, C + 50 : C + 150] = 4.0, 9.0
    x[2, 2 * C + 3], y[2, 2 * C + 4] = 60.0, 50.0
    x, y = x.to(dtype), y.to(dtype)
    options = {"softcap": 30.0, "ref_softcap": ref_softcap, "temperature": 0.5, "inf": inf}
    leaf, weight = x.clone().requires_grad_(), torch.tensor([1.0, 0.3, 2.0])
    loss = fasttax.token_kl(leaf, y, reduction="sum", weight=weight, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    _, truth, _ = run_oracle(x, y, weight, torch.float64, **options)
    _, eager, _ = run_oracle(x, y, weight, torch.float32, **options)
    finite = truth.isfinite()  # a reference without a token that the policy has: infinite
    torch.testing.assert_close(
        gradient[~finite].double(), truth[~finite], rtol=0, atol=0, equal_nan=True
    )
    gradient, eager, truth = gradient[finite].double(), eager[finite].double(), truth[finite]
    own = (eager - truth).abs().max()
    assert ((gradient - truth).abs() <= 2 * own + torch.finfo(dtype).eps * truth.abs()).all()


@pytest.mark.parametrize("kind", ["policy_ref", "jsd"])
def test_a_capped_policys_gradient_is_nan_where_the_kl_is(kind: Any, simd: int) -> None:
    """Of saturated entries, too, whose slope is 0."""
    x, y = torch.full((2, C + 3), 300.0), torch.randn(2, C + 3)
    x[:, ::2] = -300.0
    y[0, 1] = math.nan
    x.requires_grad_()
    loss = fasttax.token_kl(x, y, kind=kind, softcap=5.0, ref_softcap=30.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()
