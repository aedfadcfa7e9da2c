"""EWC and an exact KL to a reference in transformers' Trainer and everything built on it.

    callbacks=[EWCCallback(ewc)]                       # before Trainer is made
    handle = attach(trainer, ewc=ewc, kl={...})        # after; handle.undo() takes it away

The order of events in a step is transformers 5's: on_step_begin, the micro-batches, unscale and
clip, on_pre_optimizer_step, step.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasttax._base import checks, files
from fasttax.integrations._handle import Handle
from fasttax.integrations._models import on_model

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.transformers: {error.name} is not installed; run `pip install "
        "'fasttax[transformers]'`",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC

WHERE = ("pre_clip", "post_clip")
STATE_FILE = "fasttax_ewc.json"


class EWCCallback(TrainerCallback):
    """The EWC penalty's gradient at every optimizer step, once a step whatever the accumulation.

    Equal to adding `ewc.penalty()` to the loss, but that the logged loss stays the trainer's own:
    the log gets `ewc/penalty` and `ewc/distance` (sum fisher * (theta - anchor)^2), both of the
    weights after the step.

    Args:
        ewc: an `fasttax.EWC` over parameters of the model being trained (under PEFT: of the wrapped
            model). Where FSDP2 puts sharded parameters in their place it is made anew on those,
            with the same Fisher, anchor and strength.
        where: "pre_clip": part of the gradient that is clipped and of grad_norm; p.grad of the held
            parameters then exists from the step's begin on. "post_clip": added after clipping, so
            that clipping never weakens it.

    Raises:
        TypeError, ValueError: when made; or as training begins, where the penalty would be lost:
            DeepSpeed (steps inside backward), FSDP1 (flattens parameters), parameters that are not
            the model's or all frozen, a checkpoint made with another anchor.
    """

    def __init__(self, ewc: EWC, where: str = "pre_clip") -> None:
        op = "EWCCallback"
        if not all(
            hasattr(ewc, name) for name in ("add_grad_", "penalty", "distance", "parameters")
        ):
            raise checks.fail(op, "ewc", "a fasttax.EWC", ewc, error=TypeError)
        self.ewc = ewc
        self.where = checks.choice(op, "where", where, WHERE)
        self._primed = False

    # --- the gradient ------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # grads are None here; a window that was broken off keeps its gradient, and with it the
        # penalty's
        if self.where == "pre_clip" and not self._primed:
            self.ewc.add_grad_(_loss_scale(kwargs.get("optimizer")))
            self._primed = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._primed = False
        if (
            self.where == "post_clip"
        ):  # clipping, or computing the norm, has unscaled fp16 gradients by now
            self.ewc.add_grad_()

    # --- logs and checkpoints ------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._primed = False
        refuse_deepspeed("EWCCallback", args, optimizer)
        if model is not None:
            self.ewc = on_model("EWCCallback", self.ewc, model)
        _check_resumed(self.ewc, checkpoint_folder(args, state) / _state_file(self.ewc, args))
        _to_the_front(self)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if (
            logs is not None and "loss" in logs
        ):  # a training log, not an evaluation's or the summary
            publish(
                state,
                logs,
                {
                    "ewc/penalty": self.ewc.penalty().detach(),
                    "ewc/distance": self.ewc.distance().total,
                },
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = _state_file(self.ewc, args)
        if state.is_world_process_zero or name != STATE_FILE:
            write_state(
                checkpoint_folder(args, state) / name,
                {"anchor_hash": _anchor_hash(self.ewc), "strength": self.ewc.strength},
            )


def attach(
    trainer: Any,
    *,
    ewc: EWC | None = None,
    kl: Mapping[str, Any] | None = None,
    where: str = "pre_clip",
) -> Handle:
    """Puts EWC, an exact KL to a reference, or both into a trainer that exists already.

    `undo()` on what is returned takes them out.

    Args:
        trainer: a transformers Trainer, or one of TRL's.
        ewc, where: as in `EWCCallback`.
        kl: the arguments of `fasttax.integrations.trl.FullKL` but for the trainer: {"ref_model":
            ..., "beta": 0.1, "kind": "policy_ref"}. Logs `kl/policy_ref`, `kl/ref_policy` and
                `entropy`.

    Raises:
        ValueError, TypeError: neither ewc nor kl; DeepSpeed; or as the two of them.
    """
    op = "attach"
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
        raise checks.fail(op, "trainer", "a transformers.Trainer", trainer, error=TypeError)
    if ewc is None and kl is None:
        raise checks.fail(
            op,
            "ewc and kl",
            "at least one of the two",
            "None and None",
            "pass ewc=fasttax.EWC(...) or kl={'ref_model': ..., 'beta': ...}",
        )
    refuse_deepspeed(op, trainer.args, trainer.optimizer)
    callback = None if ewc is None else EWCCallback(ewc, where)
    handle = Handle()
    if kl is not None:
        from fasttax.integrations._full_kl import FullKL

        if not isinstance(kl, Mapping):
            raise checks.fail(
                op,
                "kl",
                "a mapping such as {'ref_model': model, 'beta': 0.1, 'kind': 'policy_ref'}",
                kl,
                error=TypeError,
            )
        accepted = tuple(inspect.signature(FullKL).parameters)[1:]
        for name in kl:
            checks.choice(op, "kl", name, accepted)
        handle._restore.append(FullKL(trainer, **kl).undo)
    if callback is not None:
        add_callback(handle, trainer, callback)
    return handle


# --- what the integrations share -----------------------------------------------------------------------------------------


def _loss_scale(optimizer: Any) -> float:
    """What fp16 multiplies the loss by: gradients before unscaling carry it.

    The scaler hangs on Accelerate's optimizer.
    """
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def refuse_deepspeed(op: str, args: Any, optimizer: Any) -> None:
    kind = str(getattr(getattr(args, "distributed_state", None), "distributed_type", ""))
    if (
        getattr(args, "deepspeed", None)
        or kind.endswith("DEEPSPEED")
        or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
    ):
        raise checks.fail(
            op,
            "trainer",
            "a run without DeepSpeed",
            "one under DeepSpeed",
            "its engine clips, steps and clears the gradients inside backward(), before any "
            "callback could add to them, and ZeRO-3 "
            "keeps parameters empty outside the forward; use DDP or FSDP2, or under ZeRO-1 or 2 "
            "add ewc.penalty() to the loss",
        )


def publish(state: Any, logs: dict[str, Any], values: Mapping[str, Tensor | float]) -> None:
    """Into the log that reporters are about to read, and into the history, which has its copy
    already.
    """
    numbers = {name: float(value) for name, value in values.items()}
    logs.update(numbers)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(numbers)


def add_callback(handle: Handle, trainer: Any, callback: TrainerCallback) -> None:
    """In front of the reporters, so that they see what it adds to a log."""
    handler = trainer.callback_handler
    handler.callbacks.insert(0, callback)

    def restore() -> None:
        handler.callbacks = [c for c in handler.callbacks if c is not callback]

    handle._restore.append(restore)


def _to_the_front(callback: TrainerCallback) -> None:
    """As `add_callback`, for one that Trainer put behind its reporters.

    No event passes the handler along: it is the caller's caller.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(
        handler := frame.f_locals.get("self"), CallbackHandler
    ):
        frame = frame.f_back
    if frame is not None and handler is not None:  # a new list: the old one is being iterated over
        handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]


def checkpoint_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(values)))
    partial.replace(path)


def _state_file(ewc: EWC, args: Any) -> str:
    """One for all ranks, or where each has shards of its own one a rank."""
    if not any(hasattr(p, "full_tensor") for p in ewc.parameters().values()):
        return STATE_FILE
    return STATE_FILE.replace(".json", f"-{args.process_index}-of-{args.world_size}.json")


def _anchor_hash(ewc: EWC) -> str:
    return files.weights_hash(ewc.anchor.items())


def _check_resumed(ewc: EWC, path: Path) -> None:
    if not path.is_file():
        return
    saved = json.loads(path.read_text())["anchor_hash"]
    if saved != (now := _anchor_hash(ewc)):
        raise checks.fail(
            "EWCCallback",
            "ewc",
            f"the anchor that the checkpoint was trained with (hash {saved})",
            f"another (hash {now})",
            "build the EWC on the base model, before the checkpoint's weights are loaded, or load "
            "it with EWC.load",
        )
