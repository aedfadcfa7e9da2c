"""AdamWEWC: torch.optim.AdamW where it holds nothing, its formulas in float64 where it does, the closed form against a minimiser."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TokenModel
from torch import Tensor, nn

from fasttax import EWC, AdamWEWC, reference

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
}


class Sizes(nn.Module):
    """Parameters of 1, 256, 257 and `last` elements, below, at and above what a kernel takes at once, and one that no EWC covers."""

    def __init__(self, dtype: torch.dtype = torch.float32, last: int = 1000) -> None:
        super().__init__()
        self.held = nn.ParameterList([torch.randn(n, dtype=torch.float64).to(dtype) for n in (1, 256, 257, last)])
        self.free = nn.Parameter(torch.randn(300, dtype=torch.float64).to(dtype))

    def fisher(self) -> dict[str, Tensor]:
        wide = self.free.dtype == torch.float64
        return {n: (2 * torch.randn(p.shape)).exp().to(torch.float64 if wide else torch.float32) for n, p in self.named_parameters() if n != "free"}


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((p.detach().double() - q.detach().double()).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("options", OPTIONS)
def test_strength_0_is_torchs_adamw(options: str, mode: str, simd: int) -> None:
    """100 steps, judged by how far torch's own foreach and fused implementations are apart."""
    model = Sizes()
    twins = [copy.deepcopy(model) for _ in range(3)]
    chosen = OPTIONS[options]
    ours = AdamWEWC(model.parameters(), ewc=EWC(model, model.fisher(), strength=0.0), lr=1e-2, mode=mode, **chosen)
    theirs = [torch.optim.AdamW(t.parameters(), lr=1e-2, **chosen, **kind) for t, kind in zip(twins, ({"fused": True}, {"foreach": True}, {}), strict=True)]
    for step in range(100):
        for m, optimizer in zip((model, *twins), (ours, *theirs), strict=True):
            set_gradients(m, step)
            optimizer.step()
    own = max(distance(twins[0], twins[1]), distance(twins[0], twins[2]))
    assert distance(model, twins[0]) <= 2 * own + 4 * torch.finfo(torch.float32).eps * max(float(p.abs().max()) for p in model.parameters())


Step = dict[str, Tensor]


def formula(state: dict[str, Step], grads: dict[str, Tensor], held: dict[str, tuple[Tensor, Tensor]], t: int, mode: str, strength: float, *, lr: float,
            betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
            maximize: bool = False, second_moment: float = 0.0) -> float:  # fmt: skip
    """AdamWEWC's docstring in float64, written anew; returns the penalty before the step."""
    penalty = 0.0
    for name, s in state.items():
        theta, g = s["theta"], -grads[name] if maximize else grads[name].clone()
        anchor, fisher = held.get(name, (theta, torch.zeros_like(theta)))
        if second_moment and name in held and mode == "grad":
            fisher = second_moment * s["v"] / (1 - betas[1] ** (t - 1)) if t > 1 else torch.zeros_like(theta)
        if mode == "grad":
            g = g + strength * fisher * (theta - anchor)
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
        s["most"] = torch.maximum(s["most"], s["v"]) if amsgrad else s["v"]
        metric = (s["most"] / (1 - betas[1] ** t)).sqrt() + eps
        if second_moment and name in held and mode == "prox":
            fisher = second_moment * s["v"] / (1 - betas[1] ** t)
        penalty += strength / 2 * float((fisher * (theta - anchor) ** 2).sum())
        u = theta * (1 - lr * weight_decay) - lr / (1 - betas[0] ** t) * s["m"] / metric
        s["theta"] = anchor + (u - anchor) * metric / (metric + lr * strength * fisher) if mode == "prox" else u
    return penalty


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("options", [*OPTIONS, "second moment"])
def test_steps_are_the_formula(options: str, mode: str, backend: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
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
        held = {n: (dict(model.named_parameters())[n].detach().double().clone(), f.double()) for n, f in fisher.items()}
        extra = {"fisher": "second_moment", "fisher_scale": second} if second else {}
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode=mode, **chosen, **extra)
        zero = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
        state = {n: {"theta": p.detach().double().clone(), "m": zero[n], "v": zero[n], "most": zero[n]} for n, p in model.named_parameters()}
        for t in range(1, 11):
            set_gradients(model, t)
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            optimizer.step()
            truth = formula(state, grads, held, t, mode, 0.3, lr=1e-2, second_moment=second, **chosen)
            assert float(optimizer.penalty) == pytest.approx(truth, rel=1e-4 if dtype == torch.float32 else 1e-11, abs=1e-30)
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), state[n]["theta"], rtol=tolerance, atol=tolerance)


def test_prox_is_the_minimum_of_the_penalised_quadratic_model() -> None:
    """argmin_t m't + D/(2 lr) (t - theta (1 - lr wd))^2 + strength/2 F (t - a)^2, by golden section in float64, a coordinate at a time."""
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
        return m * t + d / (2 * lr) * (t - before * (1 - lr * wd)) ** 2 + strength / 2 * fisher["held.1"] * (t - anchor) ** 2

    low, high, ratio = torch.full_like(m, -20.0), torch.full_like(m, 20.0), (5**0.5 - 1) / 2
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = objective(a) < objective(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    # the objective is flat to eps about its minimum: t is found to sqrt(eps) of its scale
    torch.testing.assert_close(model.held[1].detach(), (low + high) / 2, rtol=1e-6, atol=1e-6)


def test_strength_1e12_prox_contracts_where_grad_does_not() -> None:
    """The distance falls at every step under prox, until it is rounding; under grad Adam's normalisation makes it oscillate about the anchor by about lr."""
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
    assert all(later <= max(earlier, floor) for earlier, later in zip([start, *distances["prox"]], distances["prox"], strict=False))
    assert all(d == d and d < 1e9 for d in distances["grad"])
    assert distances["grad"][-1] > 1e3 * distances["prox"][-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_half_parameters(dtype: torch.dtype, mode: str, simd: int) -> None:
    """The arithmetic is float32's: one step from equal state is float64's to one rounding of each tensor."""
    model = Sizes(dtype)
    ewc = EWC(model, model.fisher(), strength=0.3, storage="bf16")
    exact = Sizes(torch.float64)
    exact.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    twin = EWC(exact, {n: f.double() for n, f in ewc.fisher.items()}, strength=0.3)
    optimizers = [AdamWEWC(m.parameters(), ewc=e, lr=1e-1, mode=mode) for m, e in ((model, ewc), (exact, twin))]
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
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float16 else 1e-12)


def test_is_add_grad_then_adamw() -> None:
    model = Sizes()
    twin = copy.deepcopy(model)
    fisher = model.fisher()
    ewc, other = EWC(model, fisher, strength=0.5), EWC(twin, fisher, strength=0.5)
    ours, theirs = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2), torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for step in range(5):
        set_gradients(model, step)
        ours.step()
        set_gradients(twin, step)
        value = other.add_grad_()
        assert float(ours.penalty) == pytest.approx(float(value), rel=1e-4, abs=1e-12)
        theirs.step()
    assert distance(model, twin) < 2e-5


@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_state_dict_goes_both_ways(kind: dict[str, Any]) -> None:
    """Three steps of one, four of the other, by way of a file read with weights_only, are seven of either."""
    whole = Sizes()
    begin = {n: t.clone() for n, t in whole.state_dict().items()}

    def ours(m: Sizes) -> torch.optim.Optimizer:
        return AdamWEWC(m.parameters(), ewc=None, lr=1e-2)

    def theirs(m: Sizes) -> torch.optim.Optimizer:
        return torch.optim.AdamW(m.parameters(), lr=1e-2, **kind)

    straight = theirs(whole)
    for step in range(7):
        set_gradients(whole, step)
        straight.step()
    for first, second in ((ours, theirs), (theirs, ours)):
        model, twin = Sizes(), Sizes()
        model.load_state_dict(begin)
        optimizer = first(model)
        for step in range(3):
            set_gradients(model, step)
            optimizer.step()
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        twin.load_state_dict(saved["model"])
        optimizer = second(twin)
        optimizer.load_state_dict(saved["optimizer"])
        for step in range(3, 7):
            set_gradients(twin, step)
            optimizer.step()
        assert distance(twin, whole) < 1e-6


def test_groups_and_schedules() -> None:
    model = Sizes()
    twin = copy.deepcopy(model)
    fisher = model.fisher()
    anchors = EWC(model, fisher, strength=0.0)

    def groups(m: Sizes) -> list[dict[str, Any]]:
        return [{"params": list(m.held[:2]), "lr": 1e-2, "weight_decay": 0.5}, {"params": [*m.held[2:], m.free], "betas": (0.8, 0.99), "eps": 1e-4}]

    ours, theirs = AdamWEWC(groups(model), ewc=anchors, lr=3e-3), torch.optim.AdamW(groups(twin), lr=3e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in (ours, theirs)]
    for step in range(20):
        for m, optimizer, schedule in zip((model, twin), (ours, theirs), schedules, strict=True):
            set_gradients(m, step)
            optimizer.step()
            schedule.step()
    assert distance(model, twin) < 2e-6
    tensor_lr = AdamWEWC(model.parameters(), ewc=anchors, lr=torch.tensor(1e-2))
    set_gradients(model, 0)
    tensor_lr.step()


def test_gradscaler_scales_and_skips_inside_the_step() -> None:
    """Against the same run without a scaler; its own bookkeeping (growth, backoff) goes on."""
    model = Sizes()
    twin = copy.deepcopy(model)
    fisher = model.fisher()
    ours = AdamWEWC(model.parameters(), ewc=EWC(model, fisher, strength=0.5), lr=1e-2)
    plain = AdamWEWC(twin.parameters(), ewc=EWC(twin, fisher, strength=0.5), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        set_gradients(twin, step)
        scaler.scale(torch.zeros(()))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad * scaler.get_scale()
        if step == 3:
            model.free.grad[7] = float("inf")
            kept = [p.detach().clone() for p in model.parameters()]
        if step == 4:
            scaler.unscale_(ours)  # as before clipping
        scaler.step(ours)
        scaler.update()
        if step == 3:
            assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))
            assert float(ours.penalty) == 0
            continue
        plain.step()
    assert scaler.get_scale() == 512.0
    assert float(ours.state[model.free]["step"]) == 5
    assert distance(model, twin) < 1e-6


def test_missing_gradients_closures_layouts_and_every() -> None:
    model = Sizes()
    ewc = EWC(model, model.fisher(), strength=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-2, mode="prox", every=2)
    set_gradients(model, 0)
    model.held[0].grad = None  # covered, but no gradient: AdamW leaves it alone, and so does the penalty
    kept = model.held[0].detach().clone()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    assert optimizer.step(lambda: 5.0) == 5.0
    other.step()
    assert torch.equal(model.held[0], kept)
    assert model.held[0] not in optimizer.state
    assert distance(model, twin) < 1e-6  # the first of two steps: not held
    optimizer.step()
    other.step()
    assert distance(model, twin) > 1e-3
    image = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    flat = copy.deepcopy(image).to(memory_format=torch.contiguous_format)
    for m in (image, flat):
        e = EWC(m, {"weight": torch.ones(4, 3, 3, 3)}, strength=1.0, anchor={"weight": torch.zeros(4, 3, 3, 3)})
        step = AdamWEWC(m.parameters(), ewc=e, lr=1e-2, mode="prox")
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        step.step()
    torch.testing.assert_close(image.weight, flat.weight)
    assert not image.weight.is_contiguous()


def test_every_survives_a_checkpoint() -> None:
    def run(resume_at: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = Sizes()
        ewc = EWC(model, model.fisher(), strength=1.0)
        optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-1, mode="prox", every=3)
        for step in range(8):
            if step == resume_at:
                saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ewc.state_dict())
                optimizer = AdamWEWC(model.parameters(), ewc=EWC(model, {n: torch.ones_like(f) for n, f in ewc.fisher.items()}, strength=9.0), lr=1.0,
                                     mode="prox", every=3)  # fmt: skip
                optimizer.load_state_dict(saved[0])
                optimizer.ewc.load_state_dict(saved[1])
            set_gradients(model, step)
            optimizer.step()
        return model

    assert distance(run(None), run(4)) == 0.0


WRONG: dict[str, tuple[Callable[[Sizes], Any], type[Exception], tuple[str, ...]]] = {
    "no ewc": (lambda m: AdamWEWC(m.parameters(), ewc=3), TypeError, ("AdamWEWC", "ewc", "fasttax.EWC", "got 3")),
    "mode": (lambda m: AdamWEWC(m.parameters(), ewc=None, mode="both"), ValueError, ("mode", "'grad'", "'prox'", "'both'")),
    "fisher": (lambda m: AdamWEWC(m.parameters(), ewc=None, fisher="adam"), ValueError, ("fisher", "'second_moment'", "'adam'")),
    "every": (lambda m: AdamWEWC(m.parameters(), ewc=None, every=0), ValueError, ("every", "integer >= 1")),
    "scale": (lambda m: AdamWEWC(m.parameters(), ewc=None, fisher_scale=0), ValueError, ("fisher_scale", "> 0")),
    "lr": (lambda m: AdamWEWC(m.parameters(), ewc=None, lr=-1.0), ValueError, ("learning rate",)),
    "elsewhere": (lambda m: AdamWEWC(Sizes().parameters(), ewc=EWC(m, m.fisher(), strength=1.0)), ValueError, ("params", "holds none", "being trained")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error) as caught:
        call(Sizes())
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"


def test_sparse_gradients_are_refused() -> None:
    table, dense = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)
    optimizer = AdamWEWC([{"params": dense.parameters()}, {"params": table.parameters()}], ewc=None)
    dense(table(torch.tensor([1, 2]))).sum().backward()
    before = dense.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)
    assert not optimizer.state


def test_opcheck_and_threads(threads: Callable[[int], None]) -> None:
    def arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        torch.manual_seed(0)
        lists = [[torch.rand(n, dtype=dtype) for n in (5, 0, 70_000)] for _ in range(6)]
        theta, grad, m, v, anchor, fisher = lists
        return (theta, grad, m, v, [], [torch.ones(()) for _ in theta], anchor, fisher, [], True, 2.0, 0.0, torch.tensor(0.01, dtype=torch.float64),
                0.9, 0.999, 1e-8, 0.01, False, None, None)  # fmt: skip

    torch.library.opcheck(torch.ops.fasttax.ewc_adamw_.default, arguments())
    values = []
    for count in (1, 2, 3):
        threads(count)
        values.append(float(torch.ops.fasttax.ewc_adamw_(*arguments())))
    assert len(set(values)) == 1


def test_trains_a_model_in_a_group_with_free_parameters() -> None:
    """The held parameters stay nearer to their anchor than without, and the loss falls."""
    drift = {}
    for strength in (0.0, 1e3):
        model = TokenModel()
        fisher = {n: torch.ones_like(p) for n, p in model.named_parameters() if n.startswith("up")}
        optimizer = AdamWEWC(model.parameters(), ewc=EWC(model, fisher, strength=strength), lr=1e-2, mode="prox")
        anchor = model.up.weight.detach().clone()
        x = torch.arange(3, 40)[None]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).logits[0, :-1], x[0, 1:])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        drift[strength] = float((model.up.weight.detach() - anchor).norm())
    assert drift[1e3] < 0.05 * drift[0.0]
