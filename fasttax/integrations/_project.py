"""Every step's gradient without its part along general text's gradients: `project`.

The directions are the gradients of the LM loss of a few batches of general text at the weights that
training starts from (orthogonal gradient descent, Farajtabar et al. 2020, arXiv:1910.07104). A step
along what is left changes the loss of those batches by nothing to first order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.integrations._replay import Batches, Options, Replay
from fasttax.integrations._trainer import publish

KEYS = ("general", "directions")
DIRECTIONS = 8
# a direction counts whose part beside those before it is more than rounding of a float32 sum
DISTINCT = 1e-4
EXAMPLE = "{'general': batches, 'directions': 8}"


@dataclass(frozen=True)
class Asked:
    """A `project` argument, checked: batches of general text, and how many directions."""

    op: str
    batches: Batches
    directions: int

    @staticmethod
    def of(op: str, project: Any) -> Asked:
        """Of a mapping with general text.

        Raises:
            ValueError, TypeError: a key or a value does not fit.
        """
        if not isinstance(project, Mapping) or "general" not in project:
            raise checks.fail(
                op, "project", f"general text to read, as {EXAMPLE}", project, error=TypeError
            )
        for key in project:
            checks.choice(op, "project", key, KEYS)
        count = checks.count(op, "project['directions']", project.get("directions", DIRECTIONS))
        return Asked(op, Batches(op, project["general"], "project['general']"), count)


class Complement:
    """The orthogonal complement of a few gradients, over all of a model's parameters at once.

    Args:
        parameters: whose gradients are projected.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.basis: list[list[Tensor]] = []  # orthonormal, float32; a tensor for each parameter

    def add(self, gradient: Sequence[Tensor]) -> bool:
        """Takes a direction; False where those before it hold all of it, to rounding."""
        vector = [g.detach().float() for g in gradient]
        before = _norm(vector)
        _subtract(vector, self.basis)
        norm = _norm(vector)
        if not bool(norm > DISTINCT * before):
            return False
        self.basis.append([v / norm for v in vector])
        return True

    @torch.no_grad()
    def project_(self) -> Tensor:
        """Takes the directions out of `.grad`; the share of the gradient's norm that is gone."""
        own = [p.grad for p in self.parameters]
        vector = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
            for p, g in zip(self.parameters, own, strict=True)
        ]
        before = _norm(vector)
        vector = [v.clone() if v is g else v for v, g in zip(vector, own, strict=True)]
        _subtract(vector, self.basis)
        for p, value in zip(self.parameters, vector, strict=True):
            if p.grad is not None:
                p.grad.copy_(value)
            elif bool(value.any()):
                p.grad = value.to(p.dtype)
        return 1 - _norm(vector) / before.clamp(min=torch.finfo(torch.float32).tiny)


def _norm(vector: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.double().square().sum() for v in vector]).sum().sqrt().float()


def _subtract(vector: list[Tensor], basis: Sequence[Sequence[Tensor]]) -> None:
    """Takes the basis out of a vector, twice: what one pass leaves is its own rounding's."""
    for _ in range(2):
        for direction in basis:
            along = torch.stack(
                [
                    torch.dot(v.flatten(), q.flatten()).double()
                    for v, q in zip(vector, direction, strict=True)
                ]
            ).sum()
            for v, q in zip(vector, direction, strict=True):
                v.sub_(q * along.to(v.dtype))


class Project(TrainerCallback):
    """Projects the gradient of every step, after accumulation, averaging over ranks and clipping.

    Args:
        trainer: a transformers Trainer, or one of TRL's, with the weights that the directions are
            those of.
        asked: the general text.

    Raises:
        ValueError: no causal language model, no parameter to train, or text without a gradient.
    """

    def __init__(self, trainer: Any, asked: Asked) -> None:
        self.trainer, self.asked = trainer, asked
        named = list(trainer.model.named_parameters())
        self.complement = Complement([p for _, p in named if p.requires_grad])
        if not self.complement.parameters:
            raise checks.fail(asked.op, "project", "parameters that are trained", "none")
        self._removed: list[Tensor] = []
        self._find()

    def _find(self) -> None:
        """Reads the general text and keeps the directions of its gradients."""
        options = Options(self.asked.op, self.asked.batches, "lm", 1.0, 1, None)
        reader = Replay(self.trainer, options)
        accelerator = self.trainer.accelerator
        modes = [(m, m.training) for m in self.trainer.model.modules()]
        self.trainer.model.eval()
        try:
            for _ in range(self.asked.directions):
                total, tokens = reader.summed(self.asked.batches.take())
                # a mean over all ranks' tokens, the same on every rank
                everywhere = accelerator.reduce(tokens.detach().clone(), reduction="sum")
                gradient = self._gradient(total / everywhere.clamp(min=1))
                self.complement.add([accelerator.reduce(g, reduction="sum") for g in gradient])
        finally:
            for module, mode in modes:
                module.training = mode
            self.asked.batches.close()
        if not self.complement.basis:
            raise checks.fail(
                self.asked.op,
                "project['general']",
                "text whose loss has a gradient in the parameters that are trained",
                "gradients of 0",
                "pass batches with tokens that count",
            )

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        """Of the loss in the parameters; 0 in those that it does not reach."""
        parameters = self.complement.parameters
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses gradients that are not whole on each rank, and other parameters than it read.

        Raises:
            ValueError: parameters that are sharded or were made anew.
        """
        self._removed = []
        mine = {id(p) for p in self.complement.parameters}
        wrapped = self.trainer.model_wrapped
        there = {id(p) for p in wrapped.parameters() if p.requires_grad}
        if mine != there:
            raise checks.fail(
                self.asked.op,
                "project",
                "the parameters that attach saw, whole on every rank",
                "others: sharded by FSDP, or made anew by model_init",
                "train with DDP or on one device and pass the model itself, or leave project out "
                "and use replay",
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Projects what the optimizer is about to take."""
        self._removed.append(self.complement.project_())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Publishes the mean share of the gradient's norm that was taken out since the last log."""
        if logs is None or "loss" not in logs or not self._removed:
            return
        removed, self._removed = torch.stack(self._removed), []
        mean = float(removed.mean())
        publish(state, logs, {"project/removed": mean if math.isfinite(mean) else 0.0})


def add_project(handle: Handle, trainer: Any, asked: Asked) -> None:
    """Puts a projection behind all that adds to a gradient, until the handle undoes it.

    Raises:
        ValueError: as `Project`; the trainer has one already.
    """
    handler = trainer.callback_handler
    if any(isinstance(c, Project) for c in handler.callbacks):
        raise checks.fail(
            asked.op,
            "project",
            "a trainer without a projection",
            "one that has it already",
            "undo() that one first; its text may be longer",
        )
    callback = Project(trainer, asked)
    handler.callbacks = [*handler.callbacks, callback]

    def restore() -> None:
        handler.callbacks = [c for c in handler.callbacks if c is not callback]

    handle.on_undo(restore)
