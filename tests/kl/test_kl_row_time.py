"""No row takes more of the CPU than a few sweeps: rows that once asked to be swept for ever, beside
ordinary ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from tests.tools.kl_cases import KINDS

N, V = 8, 16384
# Five sweeps for one. Measured 0.5 to 2.3 on an EPYC.
PLAIN = 6.0
# Arithmetic with denormal numbers takes microcode some 25 times as long. Measured 0.5 to 40.
DENORMAL = 200.0


def flat(moved: float) -> tuple[Tensor, Tensor]:
    x = torch.zeros(N, V)
    x[:, 7] = moved
    y = x.clone()
    y[:, 7] = torch.nextafter(x[0, 7], torch.tensor(-torch.inf))
    return x, y


# rows, their temperature, and how many times an ordinary row's time they may take
ROWS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], float, float]] = {
    "one an ulp lower": (lambda: flat(-87.0), 1.0, PLAIN),
    "one an ulp lower, less likely": (lambda: flat(-102.0), 1.0, PLAIN),
    "temperature 1e32": (lambda: (torch.randn(N, V), torch.randn(N, V)), 1e32, PLAIN),
    "denormal": (
        lambda: (torch.full((N, V), 1e-42), torch.linspace(0, 1e-40, V).repeat(N, 1)),
        1.0,
        DENORMAL,
    ),
    "denormal when tempered": (
        lambda: (torch.randn(N, V) * 1e-12, torch.randn(N, V) * 1e-12),
        3e31,
        DENORMAL,
    ),
}


def seconds(x: Tensor, y: Tensor, **options: Any) -> float:
    """CPU time of forward and backward, the least of five."""
    x.requires_grad_()
    taken = []
    for _ in range(5):
        start = time.process_time()
        fasttax.token_kl(x, y, **options).sum().backward()
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows_take_a_few_sweeps(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"kind": kind, "beta": 0.5}
    ordinary = seconds(torch.randn(N, V).to(dtype), torch.randn(N, V).to(dtype), **options)
    for name, (rows, temperature, times) in ROWS.items():
        x, y = (z.to(dtype) for z in rows())
        taken = seconds(x, y, temperature=temperature, **options)
        assert taken < times * ordinary + 1e-3, name
