"""EWC, an exact KL to a reference and replay in transformers' Trainer and what is built on it.

    callbacks=[EWCCallback(ewc)]                       # before Trainer is made
    handle = attach(trainer, ewc=ewc, kl={...})        # after; handle.undo() takes it away
    attach(trainer, replay={"loader": batches})        # general text beside the trainer's own

The order of events in a step is transformers 5's: on_step_begin, the micro-batches, unscale and
clip, on_pre_optimizer_step, step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttax._base import checks, files
from fasttax._base.handle import Handle
from fasttax._base.optional import given
from fasttax.ewc.attach import innermost
from fasttax.ewc.claims import Claim, claim
from fasttax.integrations._fsdp1 import FSDP1Shares, has_fsdp1
from fasttax.integrations._models import WHERE, anchor_hash, check_anchor, check_ewc, on_model

try:
    from transformers import TrainerCallback

    from fasttax.integrations import deepspeed
    from fasttax.integrations._full_kl import FullKL
    from fasttax.integrations._project import ProjectOptions, add_project
    from fasttax.integrations._quadratic_log import QuadraticOptions, add_quadratic_log
    from fasttax.integrations._replay import ReplayOptions, add_replay
    from fasttax.integrations._trainer import (
        add_callback,
        check_trainer,
        checkpoint_folder,
        has_own_loop,
        loss_scale,
        move_to_the_front,
        publish,
        refuse_deepspeed,
        refuse_own_loop,
        under_deepspeed,
        write_state,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.transformers: {error.name} is not installed; run `pip install "
        "'fasttax[transformers]'`",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC

KL_NEEDS = {
    "ref_model": "the model that the KL is to (None: the trainer's own reference, or the model "
    "without its adapter)",
    "beta": "its coefficient, 0.1 to begin with, or an AdaptiveKL(target=0.05)",
}
STATE_FILE = "fasttax_ewc.json"


class EWCCallback(TrainerCallback):
    """The EWC penalty's gradient at every optimizer step, once a step whatever the accumulation.

    Equal to adding `ewc.penalty()` to the loss, but that the logged loss stays the trainer's own:
    the log gets `ewc/penalty` and `ewc/distance` (sum fisher * (theta - anchor)^2), both of the
    weights after the step.

    Args:
        ewc: an `fasttax.EWC` over parameters of the model being trained (under PEFT: of the wrapped
            model). Where FSDP2 puts sharded parameters in their place it is made anew on those,
            with the same Fisher, anchor and strength; where FSDP1 has cut them (`use_orig_params`)
            each rank takes its share of both.
        where: "pre_clip": part of the gradient that is clipped and of grad_norm; p.grad of the held
            parameters then exists from the step's begin on. "post_clip": added after clipping, so
            that clipping never weakens it.

    Under DeepSpeed, and in trainers with a loop of their own (PPO), only `attach` knows the engine
    or optimizer that steps: there take `attach(trainer, ewc=ewc)`.

    Raises:
        TypeError, ValueError: when made; or as training begins, where the penalty would be lost:
            DeepSpeed without `attach`, LoRA or Kronecker factors under FSDP1, parameters that are
            not the model's or all frozen, a checkpoint made with another anchor.
        RuntimeError: a step was made without the events that the gradient hangs on.

    Example:
        >>> from fasttax.integrations.transformers import EWCCallback
        >>> trainer.add_callback(EWCCallback(ewc))
        >>> result = trainer.train()
    """

    def __init__(self, ewc: EWC, where: str = "pre_clip") -> None:
        check_ewc("EWCCallback", ewc)
        self.ewc = ewc
        self.where = checks.choice("EWCCallback", "where", where, WHERE)
        self._primed = False
        self._seen = False  # the events of the step that is being made
        self._logged: dict[str, float] = {}  # of the evaluation that is being logged
        self._claim: Claim | None = None
        self.trainer: Any = None  # that `attach` was given
        self._steps: Handle | None = None  # on DeepSpeed's engine, or PPO's optimizer
        self._shares: FSDP1Shares | None = None

    # --- the gradient -----------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before clipping: puts the penalty's gradient where the micro-batches' are added to.

        p.grad is None at this point. A window that was broken off keeps its gradient, and with it
        the penalty's.
        """
        self._seen = True
        if self.where == "pre_clip" and not self._primed and self._steps is None:
            device = next(iter(self.ewc.parameters().values())).device
            self._held.add_grad_(loss_scale(kwargs.get("optimizer"), device))
            self._primed = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After clipping: adds the gradient.

        fp16's gradients are unscaled by then, by clipping or by the norm's computation.
        """
        self._primed = False
        if self.where == "post_clip" and self._steps is None:
            self._held.add_grad_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sees that the step had the events that the gradient is added at.

        Raises:
            RuntimeError: a trainer with a loop of its own, in which the penalty would be missing.
        """
        if not self._seen and self._steps is None:
            raise RuntimeError(
                "EWCCallback: the trainer made a step without on_step_begin, so the penalty would "
                "be missing: it has a loop of its own; use attach(trainer, ewc=ewc), or "
                "ewc.attach(optimizer)"
            )
        self._seen = False

    # --- logs and checkpoints ---------------------------------------------------------------------

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Checks that the penalty reaches the weights that are trained, and resumes."""
        self._primed = self._seen = False
        engine = self._engine() if under_deepspeed(args, optimizer) else None
        if model is not None:
            self._look_at(model)
        self.release()
        if engine is not None:
            self._steps = deepspeed.attach(engine, self.ewc)
        elif has_own_loop(self.trainer):
            self._steps = self.ewc.attach(optimizer)
        elif optimizer is not None:
            holder, steps = f"EWCCallback(where={self.where!r})", innermost(optimizer)
            self._claim = claim("EWCCallback", "ewc", holder, self.ewc.parameters(), steps)
        _check_resumed(self.ewc, checkpoint_folder(args, state) / _state_file(self.ewc, args))
        move_to_the_front(self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets others hold the parameters."""
        self.release()

    def release(self) -> None:
        """Lets others hold the parameters, and takes off what steps by itself."""
        if self._claim is not None:
            self._claim.release()
        if self._steps is not None:
            self._steps.undo()
        self._claim = self._steps = None

    @property
    def _held(self) -> EWC | FSDP1Shares:
        """What the penalty is of."""
        return self.ewc if self._shares is None else self._shares

    def _look_at(self, model: Any) -> None:
        """Finds the parameters that are trained, as whatever wraps the model has them."""
        self._shares = None
        if has_fsdp1(model):
            self._shares = FSDP1Shares("EWCCallback", self.ewc.hold, model)
        else:
            self.ewc = on_model("EWCCallback", self.ewc, model)

    def _engine(self) -> Any:
        """DeepSpeed's, which the trainer that `attach` was given has made by now."""
        if self.trainer is None:
            raise checks.fail(
                "EWCCallback",
                "trainer",
                "a run without DeepSpeed",
                "one under DeepSpeed",
                "its engine clips, steps and clears the gradients inside backward(), before this "
                "callback could add to them; use attach(trainer, ewc=ewc), which works on the "
                "engine",
            )
        found = [getattr(self.trainer, name, None) for name in ("model_wrapped", "model")]
        return next((m for m in found if hasattr(m, "zero_optimization_stage")), found[0])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Adds `ewc/penalty` and `ewc/distance`; to an evaluation's log `eval_ewc/penalty`."""
        if logs is None:
            return
        if _of_training(logs):
            held = self._steps if isinstance(self._steps, deepspeed.UnderDeepSpeed) else self._held
            penalty, distance = held.penalty().detach(), held.distance().total
            publish(state, logs, {"ewc/penalty": penalty, "ewc/distance": distance})
        elif prefix := _of_evaluation(logs):
            self._logged = self._evaluated(args, prefix, kwargs.get("model"))
            publish(state, logs, self._logged)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `eval_ewc/penalty`, as it was logged, to what `evaluate()` returns."""
        if metrics is not None and (prefix := _of_evaluation(metrics)):
            key = f"{prefix}_ewc/penalty"
            known = key in self._logged
            metrics.update(
                self._logged if known else self._evaluated(args, prefix, kwargs.get("model"))
            )
        self._logged = {}

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation has begun: what is known is of another."""
        self._logged = {}

    def _evaluated(self, args: Any, prefix: str, model: Any) -> dict[str, float]:
        """The penalty under an evaluation's name; over sharded parameters a collective."""
        if isinstance(self._steps, deepspeed.UnderDeepSpeed):
            value = self._steps.penalty()
        elif under_deepspeed(args, None):
            value = deepspeed.penalty(self.ewc)
        else:
            if model is not None and self._shares is None:
                self._look_at(model)
            value = self._held.penalty()
        return {f"{prefix}_ewc/penalty": float(value.detach())}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the anchor's hash beside the checkpoint, for `on_train_begin` to compare."""
        name = _state_file(self.ewc, args)
        if state.is_world_process_zero or name != STATE_FILE:
            write_state(
                checkpoint_folder(args, state) / name,
                {"anchor_hash": anchor_hash(self.ewc), "strength": self.ewc.strength},
            )


def attach(
    trainer: Any,
    *,
    ewc: EWC | None = None,
    kl: Mapping[str, Any] | None = None,
    replay: Any = None,
    project: Mapping[str, Any] | None = None,
    log_quadratic: Mapping[str, Any] | None = None,
    where: str = "pre_clip",
) -> Handle:
    """Puts EWC, an exact KL, replay, a projection, or several into a trainer that exists already.

    Replay adds weight * the mean loss over the tokens of a batch of general text to the gradient of
    every k-th optimizer step: once a step whatever the accumulation, before clipping. Under DDP and
    FSDP2 each rank reads its own loader, and the mean is over the tokens of all. The logged loss
    stays the trainer's own; the log gets `replay/lm` or `replay/kl`, the mean since the last log. A
    loader that is exhausted begins anew.

    Args:
        trainer: a transformers Trainer, or one of TRL's.
        ewc: as in `EWCCallback`.
        kl: the arguments of `fasttax.integrations.trl.FullKL` but for trainer and replay:
            {"ref_model": ..., "beta": 0.1, "kind": "policy_ref"}. Logs `kl/policy_ref`,
            `kl/ref_policy` and `entropy`.
        replay: a loader of batches (input_ids with attention_mask, labels, position_ids or
            cu_seqlens; their size is the loader's own), or a mapping: "loader" that one; "kind"
            "lm", the cross-entropy of the next tokens (InstructGPT's PPO-ptx), or "kl",
            `token_kl(logits, ref_logits)` to "ref_model", a model or a TopKReference of the
            loader's sequences, without which it is that of `kl`, the trainer's own, or under PEFT
            the model without its adapter; "weight" 1.0; "every" 1: it acts on every k-th step, with
            the same weight.
        project: {"general": batches, "directions": 8}: each step's gradient, after accumulation,
            averaging and clipping, without its part along the LM loss's gradients of that many
            batches of general text at the weights of the moment, perpendicular to them to 1e-5 in
            float32; a batch whose gradient those before it make up, as one that is read again, adds
            no direction. The optimizer must have all parameters that are trained. It holds that
            many float32 copies of them. What the optimizer makes of the gradient (moments, scaling,
            weight decay) is not projected. Logs `project/removed`, the share of the gradient's norm
            that is taken out, a mean over the steps whose gradient is finite.
        log_quadratic: {"ref_model": base, "batches": general_text}: each training log gets
            `kl/to_base`, KL(model || base) on those batches, and `kl/quadratic`, 1/2 d^T F d of the
            base's whole Fisher beside it (`fasttax.tax.kl_quadratic`), at the cost of three
            forwards and a forward-mode pass over them.
        where: as in `EWCCallback`.

    Returns:
        A handle whose `undo()` takes them out; also a context manager.

    Raises:
        ValueError, TypeError: none of them; replay, projection or the quadratic log under
            DeepSpeed; all but EWC in a trainer with a loop of its own (PPO); a loader or reference
            that does not fit; replay and projection at once; or as `EWCCallback` and `FullKL`.

    Example:
        >>> from fasttax.integrations.transformers import attach
        >>> with attach(trainer, ewc=ewc, kl={"ref_model": base, "beta": 0.1}):
        ...     result = trainer.train()
    """
    op = "attach"
    check_trainer(op, trainer, "a transformers.Trainer")
    if all(part is None for part in (ewc, kl, replay, project, log_quadratic)):
        raise checks.fail(
            op,
            "ewc and kl",
            "at least one of the two, or replay, project or log_quadratic",
            "None and None",
            "pass ewc=fasttax.EWC(...), kl={'ref_model': ..., 'beta': ...}, "
            "replay={'loader': ...} or project={'general': ...}",
        )
    if replay is not None and project is not None:
        raise checks.fail(
            op,
            "project",
            "none beside replay, whose gradient it would take out again",
            "both",
            "leave out one of the two",
        )
    parts = {"replay": replay, "project": project, "log_quadratic": log_quadratic}
    for what, part in parts.items():
        if part is not None:
            refuse_deepspeed(op, trainer, what)
            refuse_own_loop(op, trainer, what, "GRPO and RLOO have no such loop")
    callback = None if ewc is None else _callback(op, trainer, ewc, where)
    arguments = {} if kl is None else _kl_arguments(op, kl)
    ref_model = arguments.get("ref_model")
    replayed = given(replay, lambda loader: ReplayOptions.of(op, loader, ref_model))
    projected = given(project, partial(ProjectOptions.of, op))
    logged = given(log_quadratic, partial(QuadraticOptions.of, op))
    handle = Handle()
    with handle.or_undone():
        if projected is not None:
            add_project(handle, trainer, projected)
        if kl is not None:
            handle.put(partial(FullKL, trainer, **arguments))
        if replayed is not None:
            add_replay(handle, trainer, replayed)
        if logged is not None:
            add_quadratic_log(handle, trainer, logged)
        if callback is not None:
            handle.on_undo(callback.release)
            add_callback(handle, trainer, callback)
    return handle


def _callback(op: str, trainer: Any, ewc: EWC, where: str) -> EWCCallback:
    """For a trainer that is known: its engine or optimizer, too."""
    callback = EWCCallback(ewc, where)
    callback.trainer = trainer
    if where == "post_clip" and under_deepspeed(trainer.args, trainer.optimizer):
        raise checks.fail(
            op,
            "where",
            "'pre_clip' under DeepSpeed, whose engine clips within its step",
            "'post_clip'",
            "leave where out",
        )
    return callback


def _kl_arguments(op: str, kl: Any) -> dict[str, Any]:
    """The arguments of `FullKL`, checked by name."""
    if not isinstance(kl, Mapping):
        raise checks.fail(
            op,
            "kl",
            "a mapping such as {'ref_model': model, 'beta': 0.1, 'kind': 'policy_ref'}",
            kl,
            error=TypeError,
        )
    names = tuple(inspect.signature(FullKL).parameters)[1:]
    accepted = tuple(name for name in names if name != "replay")  # attach has it itself
    checks.keys(op, "kl", kl, accepted, KL_NEEDS)
    return dict(kl)


def _of_training(logs: Mapping[str, Any]) -> bool:
    """Whether a log is a training step's: not an evaluation's, nor the summary."""
    return "loss" in logs or any(name.startswith("loss/") for name in logs)  # PPO's


def _of_evaluation(logs: Mapping[str, Any]) -> str:
    """The prefix of an evaluation's log, "eval" or "eval_NAME" of several data sets; "" of none."""
    names = (name for name in logs if name.startswith("eval") and name.endswith("_loss"))
    return next(names, "").removesuffix("_loss")


def _state_file(ewc: EWC, args: Any) -> str:
    """One for all ranks, or where each has shards of its own one a rank."""
    if not any(hasattr(p, "full_tensor") for p in ewc.parameters().values()):
        return STATE_FILE
    return STATE_FILE.replace(".json", f"-{args.process_index}-of-{args.world_size}.json")


def _check_resumed(ewc: EWC, path: Path) -> None:
    """Refuses another anchor than the one that the checkpoint was trained with."""
    if not path.is_file():
        return
    way_out = "resume from another checkpoint, or delete the file to go on without this check"
    saved = str(files.read_json("EWCCallback", path, way_out).get("anchor_hash"))
    check_anchor("EWCCallback", ewc, saved)
