"""The KL to a base and its second-order form in a trainer's log: `log_quadratic`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.integrations._trainer import add_callback, publish
from fasttax.integrations.to_base import Batch, kl_quadratic, kl_to_base

KEYS = ("ref_model", "batches")
EXAMPLE = "{'ref_model': base, 'batches': general_text}"


@dataclass(frozen=True)
class QuadraticOptions:
    """A `log_quadratic` argument, checked."""

    op: str
    base: nn.Module
    batches: list[Batch]

    @staticmethod
    def of(op: str, given: Any) -> QuadraticOptions:
        """Of a mapping with a model and a few batches, which are kept.

        Raises:
            ValueError, TypeError: a key or a value does not fit.
        """
        if not isinstance(given, Mapping) or {*KEYS} - {*given}:
            raise checks.fail(op, "log_quadratic", f"as {EXAMPLE}", given, error=TypeError)
        checks.keys(op, "log_quadratic", given, KEYS)
        base, batches = given["ref_model"], given["batches"]
        if not isinstance(base, nn.Module):
            name = "log_quadratic['ref_model']"
            raise checks.fail(op, name, "a model", base, error=TypeError)
        if isinstance(batches, (str, bytes, Mapping, torch.Tensor)) or not hasattr(
            batches, "__iter__"
        ):
            name = "log_quadratic['batches']"
            raise checks.fail(op, name, "an iterable of batches", batches, error=TypeError)
        return QuadraticOptions(op, base, list(batches))


class QuadraticLog(TrainerCallback):
    """At every training log the model's KL to a base, and half d^T F d of its whole Fisher.

    A log costs a forward of each model and a forward-mode pass over the batches. The KL is that of
    the two models under the trainer's autocast, the second order is taken without it.

    Args:
        trainer: a transformers Trainer, or one of TRL's.
        options: the base and the batches.

    Raises:
        ValueError, NotImplementedError: as `kl_quadratic`, which is tried on the first batch.
    """

    def __init__(self, trainer: Any, options: QuadraticOptions) -> None:
        self.trainer, self.options = trainer, options
        kl_quadratic(trainer.model, options.base, options.batches[:1])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses parameters that no rank holds whole.

        Raises:
            ValueError: FSDP.
        """
        shards = any(hasattr(p, "full_tensor") for p in self.trainer.model_wrapped.parameters())
        if shards or "FSDP" in str(getattr(self.trainer.accelerator, "distributed_type", "")):
            raise checks.fail(
                self.options.op,
                "log_quadratic",
                "parameters that are whole on every rank",
                "sharded ones",
                "leave it out and measure checkpoints with fasttax.tax.kl_quadratic",
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Measures, and publishes the means over the ranks."""
        if logs is None or "loss" not in logs:
            return
        model, options, accelerator = self.trainer.model, self.options, self.trainer.accelerator
        # accelerate has put autocast around the model's forward: the KL of a base without it would
        # be the rounding's, too
        with accelerator.autocast():
            kl = kl_to_base(model, options.base, options.batches)
        pair = torch.tensor(
            [kl, kl_quadratic(model, options.base, options.batches)], device=accelerator.device
        )
        mean = accelerator.reduce(pair, reduction="mean").tolist()
        publish(state, logs, dict(zip(("kl/to_base", "kl/quadratic"), mean, strict=True)))


def add_quadratic_log(handle: Handle, trainer: Any, options: QuadraticOptions) -> None:
    """Puts the measure into a trainer's log until the handle undoes it."""
    add_callback(handle, trainer, QuadraticLog(trainer, options))
