"""A row is swept a few times at most, whatever it holds: each kernel's decisions over their inputs.

What decides is whether an entry stands above the frame, whether the plain sums can be trusted, and
the mean gap that a chunk or a row is moved onto: 0, denormal, infinite, no number.
"""

from __future__ import annotations

import itertools
import math
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fasttax
from tests.tools.kl_cases import INF, KINDS, NAN, run

ROOT = Path(__file__).parents[2]
SECONDS = 20  # for rows that take microseconds, or seconds in Triton's interpreter
V = 2100  # more than a frame is primed from


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Ends the process where the block hangs: a kernel in C++ sees no Python signal handler."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flat(moved: float = -87.0) -> tuple[Tensor, Tensor]:
    """Equal logits but one, whose gap is an ulp: the mean gap underflows in float32."""
    x = torch.zeros(1, V)
    x[0, 7] = moved
    y = x.clone()
    y[0, 7] = torch.nextafter(x[0, 7], torch.tensor(-INF))
    return x, y


# what makes the frame fit or not, beside the gap
ROWS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "flat": flat,
    "flat_low": lambda: flat(-102.0),
    "denormal": lambda: (torch.full((1, V), 1e-42), torch.linspace(0, 1e-40, V)[None]),
    "random": lambda: (torch.randn(1, V), torch.randn(1, V)),
    "close": lambda: (torch.linspace(-4, 4, V)[None], torch.linspace(-4, 4.0001, V)[None]),
}
# added to the last entries of either row, beyond what the frame is primed from
LATE = {"even": (0.0, 0.0), "high": (60.0, 60.0), "one_high": (60.0, 0.0), "shifted": (30.0, 48.0)}
ODD = {"none": None, "inf": INF, "minus_inf": -INF, "nan": NAN, "largest": 3e38}
TEMPERATURES = (1.0, 1e32, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_ends(row: str, late: str, kind: str, backend: str | int) -> None:
    with within(SECONDS * 6):
        for dtype, odd, temperature in itertools.product(
            (torch.float32, torch.bfloat16, torch.float64), ODD, TEMPERATURES
        ):
            if backend == "triton" and (dtype != torch.float32 or temperature == 1e-3):
                continue
            x, y = ROWS[row]()
            x[:, 2060:] += LATE[late][0]
            y[:, 2060:] += LATE[late][1]
            if (value := ODD[odd]) is not None:
                x[0, 11] = value
            x, y = x.to(dtype), y.to(dtype)
            for pair in ((x, y), (y, x)):
                kl = run(backend, *pair, kind=kind, temperature=temperature)[0]
                assert not (kl < 0).any()
                if odd == "none":
                    assert not kl.isnan().any(), (dtype, temperature)


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_token_stats_ends(row: str, late: str) -> None:
    with within(SECONDS):
        for odd, temperature in itertools.product(ODD, TEMPERATURES):
            x, y = ROWS[row]()
            x[:, 2060:] += LATE[late][0]
            y[:, 2060:] += LATE[late][1]
            if (value := ODD[odd]) is not None:
                x[0, 11] = value
            outputs = ("logp", "entropy", "kl_policy_ref", "kl_ref_policy")
            stats = fasttax.token_stats(
                x, y, torch.tensor([3]), outputs=outputs, temperature=temperature
            )
            if odd == "none":
                assert stats.kl_policy_ref is not None
                assert not stats.kl_policy_ref.isnan().any()


def test_flat_rows_have_their_tiny_kl(backend: str | int) -> None:
    x, y = flat(-60.0)
    kl = run(backend, x, y)[0]
    assert 0 <= float(kl) < 1e-12


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e46])
def test_a_temperature_beyond_float32_is_refused(temperature: float) -> None:
    """Its inverse is infinite there, and makes equal logits NaN, or 0, and makes -inf NaN."""
    x = torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"token_kl: .*temperature"):
        fasttax.token_kl(x, x, temperature=temperature)
    assert float(fasttax.token_kl(x, x, temperature=1e38)) == 0


def test_loops_are_bounded_by_one_count() -> None:
    """No loop over sums or sweeps without a bound."""
    math = _text("csrc/math/kl_row.h")
    triton = _text("fasttax/triton/sums.py")
    assert re.findall(r" for \w+ in range\((.*)\):", triton) == ["0, V, LANES * WIDTH"]
    sums = _text("csrc/cuda/kl_sums.cuh")
    assert re.search(r"kMostSpanSums = \d+;", sums)
    assert "sums < kMostSpanSums" in sums
    assert re.search(r"kMostSums = \d+;", math)
    assert "sums < kMostSums" in _text("csrc/cpu/kl_sweep.h")
    for path in (
        "cpu/kl_sweep.h",
        "cpu/kl_kernels.h",
        "cpu/stats_kernels.h",
        "cuda/kl_row.cuh",
        "cuda/kl_sums.cuh",
    ):
        text = _text(f"csrc/{path}")
        assert "for (;;)" not in text
        assert "while (" not in text
    for path in ("kl", "stats", "sums"):
        assert not re.findall(r"while .*", _text(f"fasttax/triton/{path}.py"))


def _text(path: str) -> str:
    return (ROOT / path).read_text()


# accuracy at the edges


def _truth(x: Tensor, y: Tensor, cap: float) -> Tensor:
    lp, lq = (
        (cap * torch.tanh(z.double() / cap)).log_softmax(-1) if cap else z.double().log_softmax(-1)
        for z in (x, y)
    )
    u = lp - lq
    return (lp.exp() * (torch.expm1(-u) + u)).sum(-1)


@pytest.mark.parametrize("cap", [5.0, 30.0, 50.0])
@pytest.mark.parametrize("std", [3.0, 8.0])
def test_small_kl_under_a_softcap(std: float, cap: float, backend: str | int) -> None:
    """What is promised of a KL of 5e-7; two capped logits rounded at 30 leave 1e-3 to 3e-2."""
    x = torch.randn(32, 1000) * std
    y = x + 8e-4 * torch.randn(32, 1000)
    for raw, other in ((x, y), (y, x)):
        want = _truth(raw, other, cap)
        got = run(backend, raw, other, softcap=cap, ref_softcap=cap)[0].double()
        assert ((got - want).abs() / want).max() < 2e-5


def test_small_kl_under_a_softcap_and_other_temperatures(backend: str | int) -> None:
    """A frame of its own for each row, and entries that the inf mask drops."""
    x = torch.randn(8, 1000) * 3
    y = x + 8e-4 * torch.randn(8, 1000)
    x[:, 5], y[:, 9] = -INF, -INF
    keep = torch.ones(1000, dtype=torch.bool)
    keep[[5, 9]] = False
    want = _truth(x[:, keep], y[:, keep], 30.0)
    got = run(backend, x, y, softcap=30.0, ref_softcap=30.0, inf="mask")[0].double()
    assert ((got - want).abs() / want).max() < 2e-5


def test_gradients_of_rows_far_apart(backend: str | int) -> None:
    """p - q of rows whose maxima lie elsewhere: as good as a difference of two softmaxes."""
    for V, std in ((300, 8.0), (1000, 8.0), (5000, 5.0)):
        x, y = torch.randn(2, 48, V) * std
        truth = x.double().softmax(-1) - y.double().softmax(-1)
        eager = x.softmax(-1) - y.softmax(-1)

        def error(d: Tensor, truth: Tensor = truth) -> Tensor:
            return (d.double() - truth).norm(dim=-1) / truth.norm(dim=-1)

        of_x = run(backend, x, y, torch.ones(48), kind="ref_policy")[1]
        assert error(of_x).quantile(0.9) <= 2 * error(eager).quantile(0.9) + 1e-7


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_gradients_of_rows_far_apart(beta: float, backend: str | int) -> None:
    x = torch.randn(24, 500) * 3
    y = x + 10 * torch.randn(24, 500)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        a, b = (z.to(dtype).requires_grad_() for z in (x, y))
        lp, lq = a.log_softmax(-1), b.log_softmax(-1)
        m = torch.logaddexp(lq + math.log(beta), lp + math.log(1 - beta))
        value = beta * lq.exp() * (lq - m) + (1 - beta) * lp.exp() * (lp - m)
        return [d.double() for d in torch.autograd.grad(value.sum(), (a, b))]

    ours = run(backend, x, y, torch.ones(24), kind="jsd", beta=beta)[1:]
    for d, truth, eager in zip(
        ours, gradients(torch.float64), gradients(torch.float32), strict=True
    ):
        own = (eager - truth).norm()
        assert (d.double() - truth).norm() <= 2 * own + 4 * torch.finfo(
            torch.float32
        ).eps * truth.norm()


@pytest.mark.parametrize("moved", [1e-3, 1.0])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 0.999])
def test_jsd_gradients_at_any_beta(beta: float, moved: float, simd: int) -> None:
    """A side whose share of the mixture is nearly all keeps its digits: log(m/q) is 1e-3 of u."""
    x = torch.randn(16, 3000) * 3
    y = x + moved * torch.randn(16, 3000)
    a, b = (z.double().requires_grad_() for z in (x, y))
    lp, lq = a.log_softmax(-1), b.log_softmax(-1)
    m = torch.logaddexp(lq + math.log(beta), lp + math.log1p(-beta))
    value = beta * lq.exp() * (lq - m) + (1 - beta) * lp.exp() * (lp - m)
    truths = torch.autograd.grad(value.sum(), (a, b))
    for needs in ((True, True), (True, False), (False, True)):
        leaves = [z.clone().requires_grad_(need) for z, need in zip((x, y), needs, strict=True)]
        fasttax.token_kl(*leaves, kind="jsd", beta=beta, reduction="sum").backward()
        for leaf, truth in zip(leaves, truths, strict=True):
            if leaf.grad is not None:
                assert (leaf.grad.double() - truth).norm() <= 4e-7 * truth.norm()
