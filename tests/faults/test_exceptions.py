"""An exception anywhere in fasttax leaves no hook, no changed model and no memory behind."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax import EWC, AdamWEWC
from fasttax.integrations.trl import FullKL
from tests.tools import kl_steps
from tests.tools.models import TokenModel, assert_same_state, ids, state_of

PACKAGE = str(Path(fasttax.__file__).parent)
# It works on one tensor after the other; an op of C++ is done or is not.
SPECIFICATION = str(Path(PACKAGE, "reference"))
# What takes back: a second exception there has no second chance.
TAKES_BACK = {"__exit__", "remove", "undo", "close", "__del__", "<genexpr>"}


class Planted(Exception):
    """What no code of fasttax's expects."""


def _takes_back(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in TAKES_BACK:
            return True
        frame = frame.f_back
    return False


def failing(work: Callable[[], object], at: int) -> int:
    """Runs `work`, where the call number `at` of a function of fasttax's raises.

    Returns how many there were.
    """
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        file = frame.f_code.co_filename
        ours = file.startswith(PACKAGE) and not file.startswith(SPECIFICATION)
        if event == "call" and ours and not _takes_back(frame):
            count += 1
            if count == at:
                raise Planted(f"{frame.f_code.co_filename}:{frame.f_lineno}")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Planted:
        pass
    finally:
        sys.settrace(before)
    return count


def everywhere(work: Callable[[], object], check: Callable[[int], None], soak: bool) -> None:
    """Plants an exception at every call of fasttax's in `work`, or at some of them."""
    work()
    count = failing(work, at=0)
    assert count > 20
    points = range(1, count + 1)
    held = tensors()
    for at in points if soak else sorted(random.Random(0).sample(points, 25)):
        failing(work, at)
        check(at)
    assert tensors() <= held + 4096


def tensors() -> int:
    """Bytes of all tensors that Python has."""
    # torch's engine keeps what a backward that failed has not come to until the next backward
    torch.ones((), requires_grad=True).mul(2).backward()
    gc.collect()
    every = [t for t in gc.get_objects() if type(t) is Tensor]
    return sum(t.nbytes for t in every if t.layout == torch.strided)


@pytest.mark.parametrize("structure", ["diagonal", "kron"])
def test_estimate_fisher(structure: Any, soak: bool) -> None:
    model, batches = TokenModel().eval(), [ids(2, 6), ids(2, 6, seed=4)]
    model.up.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = state_of(model)

    def work() -> None:
        fasttax.estimate_fisher(model, batches, structure=structure, progress=False)

    def check(at: int) -> None:
        assert_same_state(model, before)

    everywhere(work, check, soak)


def hooks(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> list[int]:
    """How many there are, of each sort."""
    found = [len(p._backward_hooks or ()) for p in model.parameters()]
    found += [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    for optimizer in optimizers:
        found += [len(optimizer._optimizer_step_pre_hooks)]
        found += [len(optimizer._optimizer_step_post_hooks)]
    return found


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_attach(mode: Any, soak: bool) -> None:
    model = TokenModel()
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, modules = hooks(model, optimizer), state_of(model)[1]
    x = ids(2, 6)

    def work() -> None:
        ewc = EWC(model, fisher, strength=1.0)
        handle = ewc.attach(optimizer, mode=mode)
        try:
            optimizer.zero_grad()
            model(x).logits.sum().backward()
            optimizer.step()
        finally:
            handle.remove()

    def check(at: int) -> None:
        optimizer.zero_grad()
        assert hooks(model, optimizer) == before, at
        assert state_of(model)[1] == modules

    everywhere(work, check, soak)


@pytest.mark.parametrize("what", ["grad", "prox", "backward", "mask"])
def test_attaching(what: str) -> None:
    """At every call of what puts the hooks there."""
    model = TokenModel()
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    ewc, optimizer = EWC(model, fisher, strength=1.0), torch.optim.SGD(model.parameters(), lr=0.1)
    mask = fasttax.FisherMask(model, fisher, share=0.5)
    before = hooks(model, optimizer)

    def work() -> None:
        if what == "backward":
            ewc.during_backward().remove()
        elif what == "mask":
            mask.attach(optimizer).remove()
        else:
            ewc.attach(optimizer, mode=what).remove()

    for at in range(1, failing(work, at=0) + 1):
        failing(work, at)
        assert hooks(model, optimizer) == before, at
    work()  # nobody else has the parameters


def test_adamw(soak: bool) -> None:
    """A step that failed before the kernel can be made again, to the same bits."""
    fisher = {n: torch.rand_like(p) for n, p in TokenModel().named_parameters()}

    def made() -> tuple[TokenModel, AdamWEWC]:
        model = TokenModel()
        ewc = EWC(model, fisher, strength=1.0)
        return model, AdamWEWC(model.parameters(), ewc=ewc, lr=0.1)

    def step(model: TokenModel, optimizer: AdamWEWC) -> None:
        optimizer.zero_grad()
        model(ids(2, 6)).logits.square().sum().backward()
        optimizer.step()

    want, optimizer = made()
    step(want, optimizer)
    twice, optimizer = made()
    step(twice, optimizer)
    step(twice, optimizer)
    points = failing(lambda: step(*made()), at=0)
    for at in range(1, points + 1) if soak else range(1, points + 1, max(1, points // 25)):
        model, optimizer = made()
        failing(functools.partial(step, model, optimizer), at)
        done = torch.equal(model.up.weight, want.up.weight)
        step(model, optimizer)
        again = twice if done else want
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), at


def test_full_kl(soak: bool) -> None:
    policy, reference = kl_steps.llama(), kl_steps.llama(1)
    trainer = kl_steps.trainer(policy)
    trainer.current_gradient_accumulation_steps = 1
    policy.train()
    before, held_by = state_of(policy), state_of(reference)
    own = set(vars(trainer))
    listeners = list(trainer.callback_handler.callbacks)

    def work() -> None:
        full = FullKL(trainer, reference, 0.5)
        try:
            trainer.compute_loss(policy, dict(kl_steps.BATCH)).backward()
        finally:
            full.undo()
            policy.zero_grad(set_to_none=True)

    def check(at: int) -> None:
        policy.zero_grad(set_to_none=True)
        assert_same_state(policy, before)
        assert_same_state(reference, held_by)
        assert set(vars(trainer)) == own, at
        assert trainer.callback_handler.callbacks == listeners, at

    everywhere(work, check, soak)
