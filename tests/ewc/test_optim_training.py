"""AdamWEWC as an optimizer: checkpoints both ways with torch's, groups, schedules, GradScaler,
missing gradients, wrong calls.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fasttax import EWC, AdamWEWC
from tests.tools.models import TokenModel
from tests.tools.optim_tools import Sizes, distance, set_gradients
from tests.tools.utils import assert_says


@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_state_dict_goes_both_ways(kind: dict[str, Any]) -> None:
    """Three steps of one, four of the other, by way of a file read with weights_only, are seven of
    either.
    """
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
        return [
            {"params": list(m.held[:2]), "lr": 1e-2, "weight_decay": 0.5},
            {"params": [*m.held[2:], m.free], "betas": (0.8, 0.99), "eps": 1e-4},
        ]

    ours, theirs = (
        AdamWEWC(groups(model), ewc=anchors, lr=3e-3),
        torch.optim.AdamW(groups(twin), lr=3e-3),
    )
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
    model.held[
        0
    ].grad = None  # covered, but no gradient: AdamW leaves it alone, and so does the penalty
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
        e = EWC(
            m,
            {"weight": torch.ones(4, 3, 3, 3)},
            strength=1.0,
            anchor={"weight": torch.zeros(4, 3, 3, 3)},
        )
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
                optimizer = AdamWEWC(
                    model.parameters(),
                    ewc=EWC(
                        model, {n: torch.ones_like(f) for n, f in ewc.fisher.items()}, strength=9.0
                    ),
                    lr=1.0,
                    mode="prox",
                    every=3,
                )
                optimizer.load_state_dict(saved[0])
                optimizer.ewc.load_state_dict(saved[1])
            set_gradients(model, step)
            optimizer.step()
        return model

    assert distance(run(None), run(4)) == 0.0


WRONG: dict[str, tuple[Callable[[Sizes], Any], type[Exception], tuple[str, ...]]] = {
    "no ewc": (
        lambda m: AdamWEWC(m.parameters(), ewc=3),
        TypeError,
        ("AdamWEWC", "ewc", "fasttax.EWC", "got 3"),
    ),
    "mode": (
        lambda m: AdamWEWC(m.parameters(), ewc=None, mode="both"),
        ValueError,
        ("mode", "'grad'", "'prox'", "'both'"),
    ),
    "fisher": (
        lambda m: AdamWEWC(m.parameters(), ewc=None, fisher="adam"),
        ValueError,
        ("fisher", "'second_moment'", "'adam'"),
    ),
    "every": (
        lambda m: AdamWEWC(m.parameters(), ewc=None, every=0),
        ValueError,
        ("every", "integer >= 1"),
    ),
    "scale": (
        lambda m: AdamWEWC(m.parameters(), ewc=None, fisher_scale=0),
        ValueError,
        ("fisher_scale", "> 0"),
    ),
    "lr": (lambda m: AdamWEWC(m.parameters(), ewc=None, lr=-1.0), ValueError, ("learning rate",)),
    "elsewhere": (
        lambda m: AdamWEWC(Sizes().parameters(), ewc=EWC(m, m.fisher(), strength=1.0)),
        ValueError,
        ("params", "holds none", "being trained"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(lambda: call(Sizes()), error, words)


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
    def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        torch.manual_seed(0)
        lists = [[torch.rand(n, dtype=dtype) for n in (5, 0, 70_000)] for _ in range(6)]
        theta, grad, m, v, anchor, fisher = lists
        return {
            "params": theta,
            "grads": grad,
            "exp_avgs": m,
            "exp_avg_sqs": v,
            "max_exp_avg_sqs": [],
            "steps": [torch.ones(()) for _ in theta],
            "anchors": anchor,
            "fishers": fisher,
            "scales": [],
            "prox_mode": True,
            "strength": 2.0,
            "second_moment": 0.0,
            "lr": torch.tensor(0.01, dtype=torch.float64),
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "maximize": False,
            "grad_scale": None,
            "found_inf": None,
        }

    torch.library.opcheck(torch.ops.fasttax.ewc_adamw_.default, (), arguments())
    values = []
    for count in (1, 2, 3):
        threads(count)
        values.append(float(torch.ops.fasttax.ewc_adamw_(**arguments())))
    assert len(set(values)) == 1


def test_trains_a_model_in_a_group_with_free_parameters() -> None:
    """The held parameters stay nearer to their anchor than without, and the loss falls."""
    drift = {}
    for strength in (0.0, 1e3):
        model = TokenModel()
        fisher = {n: torch.ones_like(p) for n, p in model.named_parameters() if n.startswith("up")}
        optimizer = AdamWEWC(
            model.parameters(), ewc=EWC(model, fisher, strength=strength), lr=1e-2, mode="prox"
        )
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
