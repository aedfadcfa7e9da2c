"""What a FullKL does between the trainer's losses: steering its coefficient, logging, resuming."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fasttax._base import files
from fasttax._base.handle import Handle
from fasttax.integrations._eval_rows import own_tokens
from fasttax.integrations._trainer import checkpoint_folder, publish, write_state
from fasttax.integrations.control import AdaptiveKL

STATE_FILE = "fasttax_kl.json"


class Evaluation:
    """The mean KL over an evaluation's tokens, put beside the loss as `eval_kl/<kind>`.

    So it is returned by `evaluate()`, logged, and at hand for metric_for_best_model. (`eval_kl` is
    KTO's own, another quantity.)

    Args:
        handle: that takes it out again.
        trainer: whose `evaluation_loop` it sees.
        kind: of the KL.
    """

    def __init__(self, handle: Handle, trainer: Any, kind: str) -> None:
        self.trainer, self.kind = trainer, kind
        # while one runs: (sum, tokens, those of sequences that are unknown, of rows that are)
        self.sums: list[Tensor] | None = None
        loop = self._with_kl(trainer.evaluation_loop)
        handle.replace(trainer, "evaluation_loop", loop, "evaluation_loop")

    def add(self, kl: Tensor | None, tokens: Tensor) -> None:
        """Takes a batch's sum; None where its sequences are not in the reference's file."""
        none = 0 * tokens
        self._add(*((none, none, tokens) if kl is None else (kl, tokens, none)), none)

    def own(self, mask: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The tokens of a batch's mask without those of rows that Accelerate put in twice."""
        found = own_tokens(self.trainer.accelerator, mask, given)
        if found is not None:
            return found
        none = 0 * mask.sum()
        self._add(none, none, none, none + 1)
        return mask

    def _add(self, *values: Tensor) -> None:
        if self.sums is not None:
            self.sums.append(torch.stack([value.float() for value in values]))

    def _with_kl(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        def with_kl(*args: Any, **kwargs: Any) -> Any:
            accelerator = self.trainer.accelerator
            self.sums = [torch.zeros(4, device=accelerator.device)]
            try:
                output, sums = loop(*args, **kwargs), torch.stack(self.sums).sum(0)
            finally:
                self.sums = None
            total, tokens, unknown, twice = accelerator.reduce(sums, reduction="sum").tolist()
            if unknown:
                warnings.warn(
                    "FullKL: the evaluation has sequences that the reference's file has not, so "
                    f"there is no eval_kl/{self.kind}; make the file of both data sets (`fasttax "
                    "kl cache`), or pass evaluate=False",
                    stacklevel=2,
                )
            elif twice:
                warnings.warn(
                    "FullKL: the ranks' last batches may hold rows of the first again, and which "
                    f"can't be told, so there is no eval_kl/{self.kind}; take "
                    "per_device_eval_batch_size=1 where rows are laid end to end, "
                    "dispatch_batches=True for an iterable data set, or pass evaluate=False",
                    stacklevel=2,
                )
            elif tokens:
                prefix = kwargs.get("metric_key_prefix", "eval")
                output.metrics[f"{prefix}_kl/{self.kind}"] = total / tokens
            return output

        return with_kl


class KLEvents(TrainerCallback):
    """Gathers sums over tokens, and gives the log their means over all ranks.

    Args:
        trainer: whose steps and logs these are.
        control: updated at every optimizer step with the mean KL over all ranks, kept in the
            trainer's checkpoints; or None.
    """

    def __init__(self, trainer: Any, control: AdaptiveKL | None) -> None:
        self.trainer, self.control = trainer, control
        self.asked = False  # for a loss, in this step
        self.since_log: dict[str, Tensor] = {}  # by metric: (sum, tokens)
        self.since_step: list[Tensor] = []  # (sum, tokens) of the KL, a micro-batch each

    def record(self, values: Mapping[str, Tensor], tokens: Tensor) -> None:
        """Adds the sums of a forward's metrics over its tokens."""
        for name, value in values.items():
            key = name if name == "entropy" else f"kl/{name}"
            pair = torch.stack((value.detach().float(), tokens.float()))
            self.since_log[key] = self.since_log[key] + pair if key in self.since_log else pair

    def steer(self, kl: Tensor, tokens: Tensor) -> None:
        """Takes a micro-batch's sum of the KL, for the controller."""
        if self.control is not None:
            self.since_step.append(torch.stack((kl.detach(), tokens.to(kl))))

    def log_is_due(self) -> bool:
        """Whether Trainer will log at the end of the step that is being computed."""
        args, state = self.trainer.args, self.trainer.state
        if args.logging_first_step and state.global_step == 0:
            return True
        if args.logging_strategy != "steps":
            return False
        every = max(1, int(state.logging_steps or args.logging_steps))
        return bool((state.global_step + 1) % every == 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resumes the coefficient."""
        path = checkpoint_folder(args, state) / STATE_FILE
        if self.control is not None and path.is_file():
            way_out = "resume from another checkpoint, or delete the file to begin with beta anew"
            self.control.load_state_dict(files.read_json("FullKL", path, way_out))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the coefficient beside the checkpoint."""
        if self.control is not None and state.is_world_process_zero:
            write_state(checkpoint_folder(args, state) / STATE_FILE, self.control.state_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the coefficient.

        Raises:
            RuntimeError: the step was made without a loss that the KL could be added to.
        """
        if not self.asked:
            raise RuntimeError(
                f"FullKL: {type(self.trainer).__name__} made a step without calling compute_loss, "
                "so the KL would be missing; it works in GRPO, RLOO, DPO, KTO, SFT and "
                "transformers' Trainer"
            )
        self.asked = False
        if self.control is not None and self.since_step:
            total, tokens = self._over_ranks(torch.stack(self.since_step).sum(0)).unbind()
            self.since_step.clear()
            self.control.update(float(total / tokens.clamp(min=1)))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Publishes the means since the last log, where the trainer has none of that name."""
        # an evaluation's log and the summary at the end have no loss of a training step
        if logs is None or "loss" not in logs or not self.since_log:
            return
        names = list(self.since_log)
        pairs = self._over_ranks(torch.stack(list(self.since_log.values()))).tolist()
        self.since_log.clear()
        values = {
            name: total / max(1.0, tokens)
            for name, (total, tokens) in zip(names, pairs, strict=True)
            if name not in logs
        }
        if self.control is not None:
            values["kl/beta"] = self.control.beta
        publish(state, logs, values)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        total: Tensor = self.trainer.accelerator.reduce(sums, reduction="sum")
        return total
