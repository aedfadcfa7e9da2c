"""EWC at every step of somebody else's optimizer, through torch's own step hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fasttax import _checks

if TYPE_CHECKING:
    from fasttax.ewc import EWC

MODES = ("grad", "prox")


class Handle:
    """What `EWC.attach` returns: `.remove()` (any number of times) detaches; also a context manager. `.penalty` is the last value."""

    def __init__(self) -> None:
        self.penalty: torch.Tensor | None = None
        self._hook: Any = None

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    seen = []
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer") and optimizer not in seen:
        seen.append(optimizer)
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise _checks.fail("EWC.attach", "optimizer", "a torch.optim.Optimizer, or a wrapper with one in .optimizer", optimizer,
                           "call ewc.add_grad_() before optimizer.step() yourself", TypeError)  # fmt: skip
    return optimizer


def attach(ewc: EWC, optimizer: Any, mode: str, every: int) -> Handle:
    _checks.choice("EWC.attach", "mode", mode, MODES)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise _checks.fail("EWC.attach", "every", "an integer >= 1", every)
    inner = unwrap(optimizer)
    held = {id(p) for p in ewc.parameters().values()}
    if not any(id(p) in held for group in inner.param_groups for p in group["params"]):
        raise _checks.fail("EWC.attach", "optimizer", "an optimizer over parameters that this EWC holds", "one that holds none of them",
                           "build the EWC on the model being trained")  # fmt: skip
    handle = Handle()
    step = 0

    def turn() -> bool:
        nonlocal step
        step += 1
        return step % every == 0

    def before(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(opt, "grad_scale", None) is not None:
            raise RuntimeError("EWC.attach: this fused optimizer unscales fp16 gradients inside its step, so a penalty added before "
                               "would be divided by the loss scale; call scaler.unscale_(optimizer) before step, or use mode='prox'")  # fmt: skip
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise RuntimeError("EWC.attach: step(closure) computes the gradients anew inside the step, so a penalty added before would be lost; "
                               "add ewc.penalty() to the closure's loss, or use mode='prox'")  # fmt: skip
        if turn():
            handle.penalty = ewc.add_grad_(float(every), only=[p for group in opt.param_groups for p in group["params"]])

    def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if turn():
            for group in opt.param_groups:
                ewc.prox_(float(group["lr"]) * every, only=group["params"])

    handle._hook = inner.register_step_pre_hook(before) if mode == "grad" else inner.register_step_post_hook(after)
    return handle
