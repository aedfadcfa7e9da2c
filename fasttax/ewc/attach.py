"""EWC at every step of somebody else's optimizer, and within the backward pass.

Torch's own hooks on steps and gradients do it.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.ewc.claims import claim
from fasttax.ewc.hold import Hold, refuse_lost, refuse_sparse
from fasttax.ewc.ops import beside
from fasttax.ewc.passes import Passes

PROX = "prox_euclidean"  # "prox" is its short name here
CLOSURE = (
    "EWC.attach: step(closure) computes the gradients anew inside the step, so a penalty added "
    "before would be lost; add ewc.penalty() to the closure's loss, or use mode='prox_euclidean'"
)


class Proximal(NamedTuple):
    """A proximal step: in what metric it is, and how to have it."""

    text: str
    way_out: str


PROXIMAL = {
    "prox_euclidean": Proximal(
        "at the group's lr in theta's own metric",
        "ewc.attach(torch.optim.AdamW(params), mode='prox_euclidean')",
    ),
    "prox_adam": Proximal("in Adam's metric", "AdamWEWC(params, ewc=ewc, mode='prox_adam')"),
}


class Attached(Handle):
    """What `EWC.attach` and `EWC.during_backward` return.

    `.remove()` (any number of times) detaches; also a context manager. `.penalty` is the last
    value, `.steps` counts the optimizer's steps. `state_dict` and `load_state_dict` keep the count
    for `every` over a trainer's checkpoint.
    """

    def __init__(self, hold: Hold, every: int = 1) -> None:
        super().__init__()
        self.hold, self.every = hold, every
        self.steps = 0
        self.parts: dict[str, Tensor] = {}  # of the penalty

    @property
    def penalty(self) -> Tensor | None:
        """The penalty before the last step (pass) that it acted on, 0-d; None before the first."""
        values = list(self.parts.values())
        if not values:
            return None
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def state_dict(self) -> dict[str, int]:
        """The count of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on counting where `state_dict` was taken."""
        self.steps = int(state["steps"])

    def _acts(self) -> bool:
        """Counts a step; whether it is one of every k."""
        self.steps += 1
        return self.steps % self.every == 0

    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mode "grad": adds the gradient. `args` begins with the optimizer itself.

        Raises:
            RuntimeError: the step has a closure.
        """
        closures = (*args[1:], kwargs.get("closure"))
        if any(closure is not None for closure in closures):
            raise RuntimeError(CLOSURE)
        if not self._acts():
            return
        # a fused optimizer divides by it inside its step
        times = getattr(optimizer, "grad_scale", None)
        params, uphill = stepped(optimizer.param_groups)
        parts = self.hold.add_grad_parts_(float(self.every), params, times, uphill)
        self.parts = {"": self.hold.total(parts)}

    def after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mode "prox_euclidean": moves the weights, unless a GradScaler left the step out."""
        found_inf = getattr(optimizer, "found_inf", None)
        if not self._acts():
            return
        taken = None if found_inf is None else (found_inf == 0).reshape(()).float()
        for group in optimizer.param_groups:
            lr, times = group["lr"], taken
            if isinstance(lr, Tensor):
                times = as_step(lr) if taken is None else as_step(lr) * beside(taken, lr.device)
                lr = 1.0
            self.hold.prox_(float(lr) * self.every, group["params"], times)


def stepped(groups: list[dict[str, Any]]) -> tuple[list[Tensor], set[int]]:
    """What an optimizer steps, and the ids of what it maximizes by."""
    every = [p for group in groups for p in group["params"]]
    return every, {id(p) for group in groups if group.get("maximize") for p in group["params"]}


def as_step(lr: Tensor) -> Tensor:
    """A learning rate that lies in a tensor, float64; NaN for one below 0, which has no step.

    On a GPU a look at it would be a sync, and weights of NaN are what nobody trains on with.
    """
    wide = lr.detach().reshape(()).double()
    return torch.where(wide < 0, torch.nan, wide)


def innermost(
    optimizer: Any,
    op: str = "EWC.attach",
    way_out: str = "call ewc.add_grad_() before optimizer.step() yourself",
) -> Any:
    """The optimizer inside wrappers: torch's own kind, or what has param_groups and step()."""
    seen = []
    while (
        not hasattr(optimizer, "_optimizer_step_pre_hooks")
        and hasattr(optimizer, "optimizer")
        and optimizer not in seen
    ):
        seen.append(optimizer)
        optimizer = optimizer.optimizer
    groups = getattr(optimizer, "param_groups", None)
    if not (callable(getattr(optimizer, "step", None)) and isinstance(groups, list)):
        raise checks.fail(
            op,
            "optimizer",
            "a torch.optim.Optimizer, something with param_groups and step(), or a wrapper with "
            "one in .optimizer",
            optimizer,
            way_out,
            TypeError,
        )
    return optimizer


def check_optimizer(op: str, argument: str, hold: Hold, param_groups: list[dict[str, Any]]) -> None:
    """An error where an optimizer steps none of the parameters held."""
    held = {id(p) for p in hold.parameters().values()}
    if not any(id(p) in held for group in param_groups for p in group["params"]):
        raise checks.fail(
            op,
            argument,
            "an optimizer over parameters that this EWC holds",
            "one that holds none of them",
            "build the EWC on the model being trained; where the optimizer steps copies of the "
            "parameters add ewc.penalty() to the loss (apex master weights), or use "
            "fasttax.integrations.deepspeed.attach(engine, ewc) (DeepSpeed ZeRO)",
        )


def checked_mode(op: str, mode: str, prox: str) -> str:
    """The mode by its full name: "prox" is short for `prox`, and the other such step is another."""
    if isinstance(mode, str) and mode in PROXIMAL and mode != prox:
        mine, way_out = PROXIMAL[prox].text, PROXIMAL[mode].way_out
        raise checks.fail(
            op,
            "mode",
            f"'grad' or {prox!r}, the proximal step {mine}",
            f"{mode!r}, the step {PROXIMAL[mode].text}",
            f"use {way_out}",
        )
    checks.choice(op, "mode", mode, ("grad", prox, "prox"))
    return prox if mode == "prox" else mode


def attach(hold: Hold, optimizer: Any, mode: str, every: int) -> Attached:
    """Applies `hold` at every step of `optimizer`, until the handle undoes it."""
    op = "EWC.attach"
    mode = checked_mode(op, mode, PROX)
    handle = Attached(hold, checks.count(op, "every", every))
    inner = innermost(optimizer)
    hold.check(op)
    check_optimizer(op, "optimizer", hold, inner.param_groups)
    if mode == PROX:
        hold.refuse_prox_of_lora(op)
    holder = f"EWC.attach({type(inner).__name__}, mode={mode!r})"
    with handle.or_undone():
        handle.on_undo(claim(op, "optimizer", holder, hold.parameters(), inner).release)
        if not hasattr(inner, "_optimizer_step_pre_hooks"):
            _wrap_step(inner, handle, mode)
        elif mode == "grad":
            handle.put(inner.register_step_pre_hook, handle.before_step)
        else:
            handle.put(inner.register_step_post_hook, handle.after_step)
    return handle


def _wrap_step(optimizer: Any, handle: Attached, mode: str) -> None:
    """For optimizers without torch's hooks: this object's step() alone."""
    step = optimizer.step

    def hooked(*args: Any, **kwargs: Any) -> Any:
        call = (optimizer, (optimizer, *args), kwargs)
        if mode == "grad":
            handle.before_step(*call)
        out = step(*args, **kwargs)
        if mode == PROX:
            handle.after_step(*call)
        return out

    handle.replace(optimizer, "step", hooked, "EWC.attach: optimizer.step")


def during_backward(hold: Hold, scale: float) -> Attached:
    """Adds each parameter's gradient as its own is complete, the next one being under way."""
    op = "EWC.during_backward"
    scale = checks.number(op, "scale", scale)
    if hold.lora:
        raise checks.fail(
            op,
            "ewc",
            "an EWC of plain parameters",
            "one with LoRA updates",
            "use attach: their factors are small",
        )
    if hold.kronecker:
        raise checks.fail(
            op,
            "ewc",
            "an EWC of diagonal Fishers",
            "one with Kronecker factors, which lie beside the weights",
            "use attach",
        )
    hold.check(op)
    handle = Attached(hold)
    handle.on_undo(claim(op, "ewc", op, hold.parameters()).release)
    held = [h for block in hold.store.blocks() for h in block]
    # the backward pass goes from the last to the first
    expected = {h.name: earlier.name for earlier, h in pairwise(held)}
    under_way: dict[str, Any] = {}  # the one that is expected next
    passes = Passes(op)

    def ready(name: str, parameter: Tensor) -> None:
        if not passes.first(name):
            return
        refuse_lost(op, name, parameter)
        refuse_sparse(op, name, parameter)
        store = hold.store
        block = [store.held[name]]
        brought = under_way.pop(name, None) or store.bring(block)
        under_way.clear()
        if name in expected:
            following = expected[name]
            under_way[following] = store.bring([store.held[following]])
        with torch.no_grad():
            handle.parts[name] = hold.add_grad_of_(store.arrived(brought), scale)
        store.leave(block)

    with handle.or_undone():
        handle.put(hold.watch.model.register_forward_hook, passes.watch)
        for h in held:
            handle.put(h.theta.register_post_accumulate_grad_hook, partial(ready, h.name))
    return handle
