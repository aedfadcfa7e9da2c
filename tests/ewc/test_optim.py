"""AdamWEWC: torch.optim.AdamW where it holds nothing, its formulas in float64 where it does, the
closed form against a minimiser.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import EWC, AdamWEWC, reference
from tests.tools.optim_tools import Sizes, distance, formula, set_gradients

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
}


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("options", OPTIONS)
def test_strength_0_is_torchs_adamw(options: str, mode: str, simd: int) -> None:
    """100 steps, judged by how far torch's own foreach and fused implementations are apart."""
    model = Sizes()
    twins = [copy.deepcopy(model) for _ in range(3)]
    chosen = OPTIONS[options]
    ours = AdamWEWC(
        model.parameters(),
        ewc=EWC(model, model.fisher(), strength=0.0),
        lr=1e-2,
        mode=mode,
        **chosen,
    )
    theirs = [
        torch.optim.AdamW(t.parameters(), lr=1e-2, **chosen, **kind)
        for t, kind in zip(twins, ({"fused": True}, {"foreach": True}, {}), strict=True)
    ]
    for step in range(100):
        for m, optimizer in zip((model, *twins), (ours, *theirs), strict=True):
            set_gradients(m, step)
            optimizer.step()
    own = max(distance(twins[0], twins[1]), distance(twins[0], twins[2]))
    assert distance(model, twins[0]) <= 2 * own + 4 * torch.finfo(torch.float32).eps * max(
        float(p.abs().max()) for p in model.parameters()
    )


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("options", [*OPTIONS, "second moment"])
def test_steps_are_the_formula(
    options: str, mode: str, backend: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps in float64 to 1e-12, and in float32 to what ten steps of float32 leave."""
    if backend == "reference":
        monkeypatch.setattr(torch.ops.fasttax, "ewc_adamw_", reference.ewc_adamw_)
    chosen = OPTIONS.get(options, {})
    second = 3.0 if options == "second moment" else 0.0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        torch.manual_seed(1)
        model = Sizes(dtype, last=65536 + 3)  # a task's end
        fisher = model.fisher()
        ewc = EWC(model, fisher, strength=0.3, storage="fp32")
        held = {
            n: (dict(model.named_parameters())[n].detach().double().clone(), f.double())
            for n, f in fisher.items()
        }
        extra = {"fisher": "second_moment", "fisher_scale": second} if second else {}
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode=mode, **chosen, **extra)
        zero = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
        state = {
            n: {"theta": p.detach().double().clone(), "m": zero[n], "v": zero[n], "most": zero[n]}
            for n, p in model.named_parameters()
        }
        for t in range(1, 11):
            set_gradients(model, t)
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            optimizer.step()
            truth = formula(
                state, grads, held, t, mode, 0.3, lr=1e-2, second_moment=second, **chosen
            )
            assert float(optimizer.penalty) == pytest.approx(
                truth, rel=1e-4 if dtype == torch.float32 else 1e-11, abs=1e-30
            )
        for n, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach().double(), state[n]["theta"], rtol=tolerance, atol=tolerance
            )


def test_prox_is_the_minimum_of_the_penalised_quadratic_model() -> None:
    """argmin_t m't + D/(2 lr) (t - theta (1 - lr wd))^2 + strength/2 F (t - a)^2, by golden section
    in float64, a coordinate at a time.
    """
    model = Sizes(torch.float64)
    fisher, lr, wd, strength = model.fisher(), 0.05, 0.1, 7.0
    ewc = EWC(model, fisher, strength=strength)
    anchor = model.held[1].detach().clone()
    with torch.no_grad():
        model.held[1].add_(torch.randn(256, dtype=torch.float64))
    before = model.held[1].detach().clone()
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=lr, weight_decay=wd, mode="prox")
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state[model.held[1]]
    m, d = state["exp_avg"] / (1 - 0.9), (state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8

    def objective(t: Tensor) -> Tensor:
        return (
            m * t
            + d / (2 * lr) * (t - before * (1 - lr * wd)) ** 2
            + strength / 2 * fisher["held.1"] * (t - anchor) ** 2
        )

    low, high, ratio = torch.full_like(m, -20.0), torch.full_like(m, 20.0), (5**0.5 - 1) / 2
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = objective(a) < objective(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    # the objective is flat to eps about its minimum: t is found to sqrt(eps) of its scale
    torch.testing.assert_close(model.held[1].detach(), (low + high) / 2, rtol=1e-6, atol=1e-6)


def test_strength_1e12_prox_contracts_where_grad_does_not() -> None:
    """The distance falls at every step under prox, until it is rounding; under grad Adam's
    normalisation makes it oscillate about the anchor by about lr.
    """
    distances: dict[str, list[float]] = {"grad": [], "prox": []}
    for mode, seen in distances.items():
        torch.manual_seed(0)
        model = Sizes()
        ewc = EWC(model, model.fisher(), strength=1e12)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode=mode)
        start = float(ewc.distance().total)
        for step in range(12):
            set_gradients(model, step)
            optimizer.step()
            seen.append(float(ewc.distance().total))
    floor = 1e-15 * start
    assert all(
        later <= max(earlier, floor)
        for earlier, later in zip([start, *distances["prox"]], distances["prox"], strict=False)
    )
    assert all(d == d and d < 1e9 for d in distances["grad"])
    assert distances["grad"][-1] > 1e3 * distances["prox"][-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prox_where_lr_times_strength_overflows(
    dtype: torch.dtype, backend: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Fisher of 0 leaves AdamW's step, any other pulls onto the anchor; nothing is NaN."""
    if backend == "reference":
        monkeypatch.setattr(torch.ops.fasttax, "ewc_adamw_", reference.ewc_adamw_)
        monkeypatch.setattr(torch.ops.fasttax, "ewc_prox_", reference.ewc_prox_)
    model = torch.nn.Linear(8, 8, bias=False).to(dtype)
    twin = copy.deepcopy(model)
    fisher = torch.ones(8, 8, dtype=dtype).triu()
    anchor = torch.full((8, 8), 0.5, dtype=dtype)
    ewc = EWC(model, {"weight": fisher}, strength=1e300, anchor={"weight": anchor})
    ours = AdamWEWC(model.parameters(), ewc=ewc, lr=1e10, mode="prox", weight_decay=0.0)
    theirs = AdamWEWC(twin.parameters(), ewc=None, lr=1e10, weight_decay=0.0)
    for m, optimizer in ((model, ours), (twin, theirs)):
        m.weight.grad = torch.ones_like(m.weight)
        optimizer.step()
    wanted = torch.where(fisher > 0, anchor, twin.weight.detach())
    torch.testing.assert_close(model.weight.detach(), wanted)
    ewc.prox_(1e10)
    torch.testing.assert_close(model.weight.detach(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_half_parameters(dtype: torch.dtype, mode: str, simd: int) -> None:
    """The arithmetic is float32's: one step from equal state is float64's to one rounding of each
    tensor.
    """
    model = Sizes(dtype)
    ewc = EWC(model, model.fisher(), strength=0.3, storage="bf16")
    exact = Sizes(torch.float64)
    exact.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    twin = EWC(exact, {n: f.double() for n, f in ewc.fisher.items()}, strength=0.3)
    optimizers = [
        AdamWEWC(m.parameters(), ewc=e, lr=1e-1, mode=mode)
        for m, e in ((model, ewc), (exact, twin))
    ]
    for m in (model, exact):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.5)
    set_gradients(model, 0)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        with torch.no_grad():
            q.copy_(p)
        q.grad = p.grad.double()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            got, want = optimizers[0].state[p][key].double(), optimizers[1].state[q][key]
            torch.testing.assert_close(
                got,
                want,
                rtol=2 * torch.finfo(dtype).eps,
                atol=1e-6 if dtype == torch.float16 else 1e-12,
            )


def test_is_add_grad_then_adamw() -> None:
    model = Sizes()
    twin = copy.deepcopy(model)
    fisher = model.fisher()
    ewc, other = EWC(model, fisher, strength=0.5), EWC(twin, fisher, strength=0.5)
    ours, theirs = (
        AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2),
        torch.optim.AdamW(twin.parameters(), lr=1e-2),
    )
    for step in range(5):
        set_gradients(model, step)
        ours.step()
        set_gradients(twin, step)
        value = other.add_grad_()
        assert float(ours.penalty) == pytest.approx(float(value), rel=1e-4, abs=1e-12)
        theirs.step()
    assert distance(model, twin) < 2e-5
