"""EWC at every step of somebody else's optimizer, through torch's own step hooks, and within the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax.ewc.store import Held

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC

MODES = ("grad", "prox")


class Handle:
    """What `EWC.attach` and `EWC.during_backward` return.

    `.remove()` (any number of times) detaches; also a context manager.

    `.penalty` is the last value, `.steps` counts the optimizer's steps. `state_dict` and
    `load_state_dict` keep the count for `every` over a trainer's checkpoint.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.parts: dict[str, Tensor] = {}  # of the penalty
        self._undo: list[Callable[[], None]] = []

    @property
    def penalty(self) -> Tensor | None:
        return (
            torch.stack(
                [value.to(next(iter(self.parts.values())).device) for value in self.parts.values()]
            ).sum()
            if self.parts
            else None
        )

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = int(state["steps"])

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def unwrap(optimizer: Any) -> Any:
    """The innermost optimizer: a torch.optim.Optimizer, or what has param_groups and step() as one
    does.
    """
    seen = []
    while (
        not hasattr(optimizer, "_optimizer_step_pre_hooks")
        and hasattr(optimizer, "optimizer")
        and optimizer not in seen
    ):
        seen.append(optimizer)
        optimizer = optimizer.optimizer
    if not (
        callable(getattr(optimizer, "step", None))
        and isinstance(getattr(optimizer, "param_groups", None), list)
    ):
        raise checks.fail(
            "EWC.attach",
            "optimizer",
            "a torch.optim.Optimizer, something with param_groups and step(), or a wrapper with "
            "one in "
            ".optimizer",
            optimizer,
            "call ewc.add_grad_() before optimizer.step() yourself",
            TypeError,
        )
    return optimizer


def check_optimizer(op: str, argument: str, ewc: EWC, param_groups: list[dict[str, Any]]) -> None:
    held = {id(p) for p in ewc.parameters().values()}
    if not any(id(p) in held for group in param_groups for p in group["params"]):
        raise checks.fail(
            op,
            argument,
            "an optimizer over parameters that this EWC holds",
            "one that holds none of them",
            "build the EWC on the model being trained; where the optimizer steps copies of the "
            "parameters (DeepSpeed ZeRO, apex "
            "master weights) add ewc.penalty() to the loss",
        )


def attach(ewc: EWC, optimizer: Any, mode: str, every: int) -> Handle:
    op = "EWC.attach"
    checks.choice(op, "mode", mode, MODES)
    checks.count(op, "every", every)
    inner = unwrap(optimizer)
    check_optimizer(op, "optimizer", ewc, inner.param_groups)
    if mode == "prox":
        ewc.refuse_prox_of_lora(op)
    handle = Handle()

    def turn() -> bool:
        handle.steps += 1
        return handle.steps % every == 0

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise RuntimeError(
                "EWC.attach: step(closure) computes the gradients anew inside the step, so a "
                "penalty added before would be lost; "
                "add ewc.penalty() to the closure's loss, or use mode='prox'"
            )
        if not turn():
            return
        scaled = getattr(opt, "grad_scale", None)  # a fused optimizer divides by it inside its step
        parts: list[Any] = []
        for sign in (1.0, -1.0):
            params = [
                p
                for group in opt.param_groups
                if (-1.0 if group.get("maximize") else 1.0) == sign
                for p in group["params"]
            ]
            if params:
                parts += ewc._add_grad_(
                    ewc._store.blocks(params),
                    sign * every if scaled is None else scaled * (sign * every),
                    params,
                )
        handle.parts = {"": ewc._total(parts)}

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        if not turn():
            return
        found_inf = getattr(opt, "found_inf", None)
        if found_inf is not None and bool(found_inf):  # the fused optimizer left this step out
            return
        for group in opt.param_groups:
            ewc.prox_(float(group["lr"]) * every, only=group["params"])

    if hasattr(inner, "_optimizer_step_pre_hooks"):
        hook = (
            inner.register_step_pre_hook(before)
            if mode == "grad"
            else inner.register_step_post_hook(after)
        )
        handle._undo.append(hook.remove)
    else:
        _wrap_step(
            inner, handle, before if mode == "grad" else None, after if mode == "prox" else None
        )
    return handle


def _wrap_step(optimizer: Any, handle: Handle, before: Any, after: Any) -> None:
    """For optimizers without torch's hooks.

    This object's step() alone, put back by handle.remove().
    """
    step = optimizer.step
    own = "step" in vars(optimizer)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(optimizer, (optimizer, *args), kwargs)
        out = step(*args, **kwargs)
        if after is not None:
            after(optimizer, (optimizer, *args), kwargs)
        return out

    def undo() -> None:
        if own:
            optimizer.step = step
        else:
            del optimizer.step

    optimizer.step = hooked
    handle._undo.append(undo)


def during_backward(ewc: EWC, scale: float) -> Handle:
    op = "EWC.during_backward"
    scale = checks.number(op, "scale", scale)
    if ewc._lora:
        raise checks.fail(
            op,
            "ewc",
            "an EWC of plain parameters",
            "one with LoRA updates",
            "use attach: their factors are small",
        )
    handle = Handle()
    store = ewc._store
    held = [h for block in store.blocks() for h in block]
    # the backward pass goes from the last to the first
    before = {h.name: earlier for earlier, h in pairwise(held)}
    under_way: dict[str, Any] = {}  # the one that is expected next

    def ready(h: Held) -> None:
        brought = under_way.pop(h.name, None) or store.bring([h])
        expected = before.get(h.name)
        under_way.clear()
        if expected is not None:
            under_way[expected.name] = store.bring([expected])
        with torch.no_grad():
            handle.parts[h.name] = ewc._add_block_(store.arrived(brought), scale)
        store.leave([h])

    for h in held:
        hook = h.theta.register_post_accumulate_grad_hook(lambda p, h=h: ready(h))
        handle._undo.append(hook.remove)
    return handle
