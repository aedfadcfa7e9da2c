"""What the integrations share that work in transformers' Trainer: its callbacks, logs, folders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from fasttax._base import checks, files
from fasttax._base.handle import Handle

T = TypeVar("T")


def check_trainer(op: str, trainer: Any, expected: str) -> None:
    """Refuses what has no callbacks or computes no loss."""
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
        raise checks.fail(op, "trainer", expected, trainer, error=TypeError)


def has_own_loop(trainer: Any) -> bool:
    """Whether it steps without Trainer's events and losses: TRL's PPO before 1.10, and its kin."""
    return any(c.__name__ == "PPOTrainer" for c in type(trainer).__mro__)


def refuse_own_loop(op: str, trainer: Any, what: str, way_out: str) -> None:
    """An error where a trainer's own loop would leave out what hangs on Trainer's."""
    if has_own_loop(trainer):
        raise checks.fail(
            op,
            "trainer",
            f"one whose steps are Trainer's, for {what}",
            f"{type(trainer).__name__}, which computes its loss and steps in a loop of its own",
            way_out,
        )


def under_deepspeed(args: Any, optimizer: Any) -> bool:
    """Whether DeepSpeed's engine makes the steps."""
    kind = str(getattr(getattr(args, "distributed_state", None), "distributed_type", ""))
    return bool(
        getattr(args, "deepspeed", None)
        or kind.endswith("DEEPSPEED")
        or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
    )


def refuse_deepspeed(op: str, trainer: Any, what: str) -> None:
    """Refuses DeepSpeed, under which a callback's gradient would be lost."""
    if under_deepspeed(trainer.args, trainer.optimizer):
        raise checks.fail(
            op,
            "trainer",
            f"a run without DeepSpeed, for {what}",
            "one under DeepSpeed",
            "its engine clips, steps and clears the gradients inside backward(), before any "
            "callback could add to them; use DDP or FSDP2",
        )


def refuse_scattered(op: str, trainer: Any) -> None:
    """Refuses DeepSpeed's ZeRO-3, under which heads are empty outside their own forward."""
    if not under_deepspeed(trainer.args, trainer.optimizer):
        return
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None or int(plugin.zero_stage) >= 3:
        raise checks.fail(
            op,
            "trainer",
            "parameters that are whole on every rank, or FSDP2's",
            "DeepSpeed's ZeRO-3, which scatters the head as its forward ends",
            "use ZeRO-2 (zero_stage: 2), or FSDP2 (fsdp_version: 2)",
        )


def loss_scale(optimizer: Any, device: torch.device) -> float | Tensor:
    """What fp16 multiplies the loss by: gradients before unscaling carry it.

    The scaler hangs on Accelerate's optimizer. Its get_scale() would be a host sync.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


# --- callbacks ------------------------------------------------------------------------------------


def add_callback(handle: Handle, trainer: Any, callback: TrainerCallback) -> None:
    """Puts a callback in front of the reporters, which then see what it adds to a log."""
    handler = trainer.callback_handler

    def restore() -> None:
        handler.callbacks = [c for c in handler.callbacks if c is not callback]

    handle.on_undo(restore)
    _put_in_front(handler, callback)


def move_to_the_front(callback: TrainerCallback) -> None:
    """As `add_callback`, for one that was given to Trainer, which puts it behind its reporters.

    To be called in one of the callback's events; elsewhere it does nothing.
    """
    handler = calling(CallbackHandler, lambda found: callback in found.callbacks)
    if handler is not None:
        _put_in_front(handler, callback)


def _put_in_front(handler: CallbackHandler, callback: TrainerCallback) -> None:
    # a new list: the old one is being iterated over, where this is called in an event
    handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]


def calling(kind: type[T], fits: Callable[[T], bool]) -> T | None:
    """The nearest `kind` that fits and whose method has led here; None for none.

    transformers (5.24) gives an event the model, the optimizer and the data loaders, but neither
    the trainer nor its handler, so that both are found where they are: the `self` of a frame that
    called the event. test_transformers.py pins that frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind) and fits(found):
            return found
        frame = frame.f_back
    return None


# --- logs and checkpoints -------------------------------------------------------------------------


def publish(state: Any, logs: dict[str, Any], values: Mapping[str, Tensor | float]) -> None:
    """Adds values to the log that reporters are about to read, and to the history.

    The history has its copy of the log already when callbacks see it.
    """
    numbers = {name: float(value) for name, value in values.items()}
    logs.update(numbers)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(numbers)


def checkpoint_folder(args: Any, state: Any) -> Path:
    """The folder that Trainer writes at this step, or that it resumed from."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """JSON beside a checkpoint's files, under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(values))
    files.whole("Trainer", path, lambda name: name.write_text(text, encoding="utf-8"))
