"""Every step's gradient without its part along general text's gradients: `project`.

The directions are the gradients of the LM loss of a few batches of general text at the weights that
training starts from (orthogonal gradient descent, Farajtabar et al. 2020, arXiv:1910.07104). A step
along what is left changes the loss of those batches by nothing to first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fasttax._base import checks
from fasttax._base.gradient import gradient_of
from fasttax._base.handle import Handle
from fasttax._base.modes import evaluated
from fasttax.ewc.attach import innermost
from fasttax.integrations._replay import Batches, Replay, ReplayOptions
from fasttax.integrations._trainer import add_callback, publish

KEYS = ("general", "directions")
DIRECTIONS = 8
# a direction counts whose part beside those before it is more than rounding of a float32 sum
DISTINCT = 1e-4
# What fp16 multiplies the loss by, as GradScaler does: activations' gradients of a mean over
# thousands of tokens are below 6e-8, its least number. The next one where a gradient overflows.
FP16_SCALES = tuple(2.0**power for power in (16, 12, 8, 4, 0))
EXAMPLE = "{'general': batches, 'directions': 8}"


@dataclass(frozen=True)
class ProjectOptions:
    """A `project` argument, checked: batches of general text, and how many directions."""

    op: str
    batches: Batches
    directions: int

    @staticmethod
    def of(op: str, project: Any) -> ProjectOptions:
        """Of a mapping with general text.

        Raises:
            ValueError, TypeError: a key or a value does not fit.
        """
        if not isinstance(project, Mapping) or "general" not in project:
            raise checks.fail(
                op, "project", f"general text to read, as {EXAMPLE}", project, error=TypeError
            )
        checks.keys(op, "project", project, KEYS)
        count = checks.count(op, "project['directions']", project.get("directions", DIRECTIONS))
        return ProjectOptions(op, Batches(op, project["general"], "project['general']"), count)


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
                gradient_of(p).copy_(value)
        return torch.where(before == 0, 0.0, 1 - _norm(vector) / before)


def _norm(vector: Sequence[Tensor]) -> Tensor:
    """Over all tensors, on the first one's device; a model may lie on several."""
    norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in vector]
    return torch.stack([n.to(vector[0].device) for n in norms]).norm().float()


def _subtract(vector: list[Tensor], basis: Sequence[Sequence[Tensor]]) -> None:
    """Takes the basis out of a vector, twice: what one pass leaves is its own rounding's."""
    first = vector[0].device
    for _ in range(2):
        for direction in basis:
            along = torch.stack(
                [
                    torch.dot(v.flatten(), q.flatten()).double().to(first)
                    for v, q in zip(vector, direction, strict=True)
                ]
            ).sum()
            for v, q in zip(vector, direction, strict=True):
                v.sub_(q * along.to(v))


class Project(TrainerCallback):
    """Projects the gradient of every step, after accumulation, averaging over ranks and clipping.

    Args:
        trainer: a transformers Trainer, or one of TRL's, with the weights that the directions are
            those of.
        options: the general text.

    Raises:
        ValueError: no causal language model, no parameter to train, or text without a gradient.
    """

    def __init__(self, trainer: Any, options: ProjectOptions) -> None:
        self.trainer, self.options = trainer, options
        named = list(trainer.model.named_parameters())
        self.complement = Complement([p for _, p in named if p.requires_grad])
        if not self.complement.parameters:
            raise checks.fail(options.op, "project", "parameters that are trained", "none")
        self.removed: list[Tensor] = []  # the share of each step's gradient since the last log
        self._find()

    def _find(self) -> None:
        """Reads the general text and keeps the directions of its gradients."""
        replayed = ReplayOptions(self.options.op, self.options.batches, "lm", 1.0, 1, None)
        reader = Replay(self.trainer, replayed)
        try:
            with evaluated(self.trainer.model):
                for _ in range(self.options.directions):
                    self.complement.add(self._direction(reader, self.options.batches.take()))
        finally:
            self.options.batches.close()
        if not self.complement.basis:
            raise checks.fail(
                self.options.op,
                "project['general']",
                "text whose loss has a gradient in the parameters that are trained",
                "gradients of 0",
                "pass batches with tokens that count",
            )

    def _direction(self, reader: Replay, batch: Any) -> list[Tensor]:
        """A batch's gradient up to a factor, the same on every rank.

        Raises:
            ValueError: it is not finite.
        """
        accelerator = self.trainer.accelerator
        total, tokens = reader.summed(batch)
        # a mean over all ranks' tokens
        everywhere = accelerator.reduce(tokens.detach().clone(), reduction="sum")
        loss = total / everywhere.clamp(min=1)
        half = accelerator.mixed_precision == "fp16"
        for scale in FP16_SCALES if half else (1.0,):
            own = self._gradient(loss * scale, half)
            gradient = [accelerator.reduce(g, reduction="sum") for g in own]
            if bool(_norm(gradient).isfinite()):
                return gradient
        raise checks.fail(
            self.options.op,
            "project['general']",
            "text whose loss has a finite gradient at the weights of the moment",
            "nan or inf",
            "leave out the batches whose loss is not finite",
        )

    def _gradient(self, loss: Tensor, again: bool) -> list[Tensor]:
        """Of the loss in the parameters; 0 in those that it does not reach."""
        parameters = self.complement.parameters
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=again)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Refuses gradients that are not whole on each rank, and other parameters than it read.

        Raises:
            ValueError: parameters that are sharded or were made anew, or an optimizer of a part of
                them, whose part of the gradient is not perpendicular.
        """
        self.removed = []
        mine = {id(p) for p in self.complement.parameters}
        wrapped = self.trainer.model_wrapped
        there = {id(p) for p in wrapped.parameters() if p.requires_grad}
        if mine != there:
            raise checks.fail(
                self.options.op,
                "project",
                "the parameters that attach saw, whole on every rank",
                "others: frozen or not since then, sharded by FSDP, or made anew by model_init",
                "train with DDP or on one device and pass the model itself, attach once it is "
                "known which parameters are trained, or leave project out and use replay",
            )
        self._move_to_the_end()
        if optimizer is None:
            return
        taken = {id(p) for group in innermost(optimizer).param_groups for p in group["params"]}
        if mine - taken:
            raise checks.fail(
                self.options.op,
                "project",
                f"an optimizer of all {len(mine)} parameters that are trained",
                f"{type(innermost(optimizer)).__name__} of {len(mine & taken)} of them",
                "requires_grad_(False) on the others before attach; an optimizer that steps "
                "inside backward, as layer-wise ones do, can't be projected",
            )

    def _move_to_the_end(self) -> None:
        """Behind callbacks that the trainer was given since, which may add to a gradient."""
        handler = self.trainer.callback_handler
        # a new list: the old one is being iterated over
        handler.callbacks = [*(c for c in handler.callbacks if c is not self), self]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Projects what the optimizer is about to take."""
        self.removed.append(self.complement.project_())


class RemovedLog(TrainerCallback):
    """`project/removed`: the mean share of the gradient's norm that was taken out since a log.

    A callback of its own: it comes before the reporters, and the projection after all others.
    """

    def __init__(self, project: Project) -> None:
        self.project = project

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Publishes it over the steps whose gradient was finite; fp16 skips the others."""
        if logs is None or "loss" not in logs or not self.project.removed:
            return
        removed, self.project.removed = torch.stack(self.project.removed), []
        removed = removed[removed.isfinite()]
        if len(removed):
            publish(state, logs, {"project/removed": removed.mean()})


def add_project(handle: Handle, trainer: Any, options: ProjectOptions) -> None:
    """Puts a projection behind all that adds to a gradient, until the handle undoes it.

    Raises:
        ValueError: as `Project`; the trainer has one already.
    """
    handler = trainer.callback_handler
    if any(isinstance(c, Project) for c in handler.callbacks):
        raise checks.fail(
            options.op,
            "project",
            "a trainer without a projection",
            "one that has it already",
            "undo() that one first; its text may be longer",
        )
    callback = Project(trainer, options)
    handler.callbacks = [*handler.callbacks, callback]

    def restore() -> None:
        handler.callbacks = [c for c in handler.callbacks if c is not callback]

    handle.on_undo(restore)
    add_callback(handle, trainer, RemovedLog(callback))
