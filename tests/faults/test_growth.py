"""Ten thousand calls take no more memory than a few, and many steps stay at float64's."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttax import EWC, AdamWEWC
from tests.faults.calls import CALLS
from tests.faults.written import KINDS

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


def grown(call: Callable[[int], object], times: int) -> int:
    """How much more lies in memory after `times` calls than after the first tenth of them."""
    for i in range(times // 10):
        call(i)
    gc.collect()
    before = resident()
    for i in range(times):
        call(i)
    gc.collect()
    return resident() - before


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, soak: bool) -> None:
    """In the long form less than 100 bytes a call: the smallest tensor that is kept has more."""
    times, most = (10_000, 1 << 20) if soak else (200, 3 << 20)
    assert grown(CALLS[name], times) < most


@pytest.mark.parametrize("name", KINDS)
def test_files(name: str, tmp_path: Path, soak: bool) -> None:
    path = tmp_path / "f.safetensors"
    kind = KINDS[name]
    kind.write(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert grown(lambda _: kind.read(path), 2000 if soak else 40) < 2 << 20
    assert len(os.listdir("/proc/self/fd")) == descriptors


class Quadratic:
    """A convex loss of given gradients: noise that pulls to a moving target, the same each time."""

    def __init__(self, size: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.curvature = torch.rand(size, generator=g, dtype=torch.float64) + 0.1
        self.noise = torch.randn(64, size, generator=g, dtype=torch.float64)

    def gradient(self, theta: Tensor, step: int) -> Tensor:
        """At theta, in its dtype."""
        target = self.noise[step % 64].to(theta)
        return self.curvature.to(theta) * (theta - 0.3 * target)


def trained(dtype: torch.dtype, mode: str, steps: int, torchs_own: bool) -> Tensor:
    """theta after so many steps in `dtype`; `torchs_own`: AdamW with EWC's gradient by hand."""
    size, strength = 64, 2.0
    g = torch.Generator().manual_seed(1)
    start = torch.randn(size, generator=g, dtype=torch.float64)
    fisher = torch.rand(size, generator=g, dtype=torch.float64)
    p = torch.nn.Parameter(start.to(dtype))
    module = torch.nn.Module()
    module.register_parameter("p", p)
    held = fisher.to(dtype)
    ewc = EWC(module, {"p": held}, strength=strength)
    lr, decay, loss = 1e-2, 0.01, Quadratic(size)
    anchor = p.detach().clone()
    optimizer: torch.optim.Optimizer
    if torchs_own:
        optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=decay)
    else:
        optimizer = AdamWEWC([p], ewc=ewc, lr=lr, weight_decay=decay, mode=mode)
    for step in range(steps):
        p.grad = loss.gradient(p.detach(), step)
        if torchs_own and mode == "grad":
            p.grad += strength * held * (p.detach() - anchor)
        optimizer.step()
        if torchs_own and mode == "prox":
            moment = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** (step + 1))
            metric = moment.sqrt() + 1e-8
            with torch.no_grad():
                p.copy_(anchor + (p - anchor) * metric / (metric + lr * strength * held))
    return p.detach().double()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_many_steps_stay_at_float64s(mode: str, soak: bool) -> None:
    """Float32's error after them is at most twice that of torch's AdamW with EWC by hand."""
    steps = 100_000 if soak else 2_000
    truth = trained(torch.float64, mode, steps, torchs_own=True)
    exact = trained(torch.float64, mode, steps, torchs_own=False)
    assert float((exact - truth).abs().max()) < 1e-10
    own = float((trained(torch.float32, mode, steps, torchs_own=True) - truth).abs().max())
    error = float((trained(torch.float32, mode, steps, torchs_own=False) - truth).abs().max())
    assert error <= 2 * own + 4 * torch.finfo(torch.float32).eps
