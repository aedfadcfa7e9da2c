"""beta * mean KL(policy, reference) in the loss of somebody else's trainer.

The KL is made of what the trainer's own forward computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.integrations._kl_events import KLEvents
from fasttax.integrations._kl_sums import CachedReference, Forward, ModelReference
from fasttax.integrations._models import backbone, causal_lm, head, hidden_states
from fasttax.integrations._trainer import add_callback, check_trainer
from fasttax.integrations.control import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.kl.call import KINDS

OP = "FullKL"
GENERATING = ("GRPOTrainer", "RLOOTrainer")
# GRPO losses that divide by the tokens of the whole accumulation window
TOKEN_LOSSES = ("cispo", "dapo", "vespo")


class FullKL(Handle):
    """Adds beta * KL(policy, reference) to a trainer's loss, exact over the vocabulary.

    The KL is averaged over the tokens that the trainer's loss counts. The policy's hidden states
    (or logits, where the model makes them anyway) are those of the trainer's own forward: there is
    no second one. The reference runs once a batch, without a graph; its hidden states are kept
    while the trainer goes over the batch again (GRPO, RLOO: num_iterations > 1). `undo()` takes
    everything back.

    Works in GRPO (where it takes the place of k3: the trainer's beta must be 0), RLOO, DPO, KTO,
    SFT and transformers' own Trainer. Under accumulation it is the mean over the window's tokens
    where the trainer's own loss is one (num_items_in_batch; GRPO's dapo, cispo and vespo), else the
    mean of the micro-batches' means. Evaluation losses stay the trainer's own.

    Args:
        trainer: one of those.
        ref_model: a causal language model with the policy's vocabulary (moved to the policy's
            device; run in eval mode and without a graph); None takes the trainer's own reference
            (`trainer.ref_model`, or under PEFT the model without its adapter); a TopKReference or
            the path of one needs no model in memory (not in GRPO and RLOO, whose sequences are
            new).
        beta: the coefficient, >= 0, or an `AdaptiveKL`, which every optimizer step updates with the
            mean over all ranks.
        kind: "policy_ref", "ref_policy" or "jsd", as in `token_kl`.
        temperature: of both distributions; None is the trainer's sampling temperature in GRPO and
            RLOO, else 1.
        jsd_beta: the reference's share of the mixture in "jsd".

    Logs `kl/<kind>`, the mean over the tokens since the last log; `kl/policy_ref`, `kl/ref_policy`
    and `entropy` (where the trainer has none of its own) over the tokens of the step that is
    logged; `kl/beta` under an AdaptiveKL. A TopKReference knows its `kind` alone.

    Raises:
        ValueError, TypeError: an argument does not fit; GRPO with beta != 0; DeepSpeed; a second
            FullKL on one trainer.
        RuntimeError: in training, when the policy's forward was not seen, so that the KL would
            silently be missing.
    """

    def __init__(
        self,
        trainer: Any,
        ref_model: nn.Module | TopKReference | str | os.PathLike[str] | None,
        beta: float | AdaptiveKL,
        kind: str = "policy_ref",
        *,
        temperature: float | None = None,
        jsd_beta: float = 0.5,
    ) -> None:
        super().__init__()
        _check(trainer)
        self.kind = checks.choice(OP, "kind", kind, KINDS)
        self.control = beta if isinstance(beta, AdaptiveKL) else None
        self._beta = 0.0 if isinstance(beta, AdaptiveKL) else checks.number(OP, "beta", beta, low=0)
        if temperature is None:
            temperature = trainer.temperature if _is_a(trainer, *GENERATING) else 1.0
        self.options: dict[str, Any] = {
            "kind": kind,
            "beta": KINDS[kind].check_beta(OP, "jsd_beta", jsd_beta),
            "temperature": checks.number(OP, "temperature", temperature, low=0, open_low=True),
        }
        self.trainer = trainer
        self.policy = causal_lm(OP, "trainer.model", trainer.model)
        self.ref = _reference_of(trainer, self.policy, ref_model)
        self.events = KLEvents(trainer, self.control)
        self._inputs: dict[str, Any] | None = None  # the batch whose loss is being computed
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None  # of the backbone
        self._sum: Tensor | None = None  # of the batch's KL, and its number of tokens
        self._count: Any = 0
        self.replace(trainer, "compute_loss", self._with_kl(trainer.compute_loss), "compute_loss")
        for module, hook in (
            (backbone(self.policy), self._see_backbone),
            (trainer.model, self._see_model),
        ):
            self.on_undo(module.register_forward_hook(hook, with_kwargs=True).remove)
        add_callback(self, trainer, self.events)

    def __repr__(self) -> str:
        ended = "" if self.active else ", undone"
        name = type(self.trainer).__name__
        return f"FullKL({name}, {self.ref}, beta={self.beta:g}, kind={self.kind!r}{ended})"

    @property
    def beta(self) -> float:
        """The coefficient, an AdaptiveKL's as it is at present."""
        return self._beta if self.control is None else self.control.beta

    # --- seeing the policy's forward --------------------------------------------------------------

    def _see_backbone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._inputs is not None and torch.is_grad_enabled():
            self._call = (args, kwargs, output)

    def _see_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Runs as the policy's forward ends, where FSDP2's head is still whole."""
        if self._inputs is None or self._call is None or not torch.is_grad_enabled():
            return
        (call_args, call_kwargs, states), self._call = self._call, None
        forward = Forward(
            args=call_args,
            kwargs=call_kwargs,
            output=states,
            logits=getattr(output, "logits", None),
            mask=_counted(self._inputs, kwargs, hidden_states(states).shape[1]),
            batch=self._inputs.get("completion_ids"),
        )
        log = self.events.log_is_due()
        with torch.autocast(forward.mask.device.type, enabled=False):
            values = self.ref.sums(forward, head(self.policy), self.options, log)
        tokens = forward.mask.sum()
        self._count = self._count + tokens
        self._sum = values[self.kind] if self._sum is None else self._sum + values[self.kind]
        self.events.record(values, tokens)

    # --- adding it to the loss --------------------------------------------------------------------

    def _with_kl(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def with_kl(
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            if not self.trainer.model.training or not torch.is_grad_enabled():
                return compute_loss(model, inputs, **options)
            self._inputs, self._call, self._sum, self._count = dict(inputs), None, None, 0
            self.events.asked = True
            try:
                result = compute_loss(model, inputs, **options)
            finally:
                self._inputs = self._call = None
            kl, self._sum = self._sum, None
            if kl is None:
                raise RuntimeError(
                    "FullKL: the policy's forward was not seen while the trainer computed its "
                    "loss, so the KL would be missing; make FullKL on the trainer that trains, "
                    "after it is built"
                )
            self.events.steer(kl, self._count)
            divisor = _divisor(self.trainer, inputs, self._count.clamp(min=1), num_items_in_batch)
            if not return_outputs:
                return result + self.beta * kl.to(result.dtype) / divisor
            loss, *others = result
            return (loss + self.beta * kl.to(loss.dtype) / divisor, *others)

        with_kl.fasttax_full_kl = True  # type: ignore[attr-defined]
        return with_kl


def _is_a(trainer: Any, *names: str) -> bool:
    """Whether one of the trainer's classes has such a name: TRL need not be imported for it."""
    return any(c.__name__ in names for c in type(trainer).__mro__)


def _check(trainer: Any) -> None:
    """Refuses a trainer in which the KL would be wrong or missing."""
    check_trainer(OP, trainer, "a transformers.Trainer or one of TRL's")
    if trainer.args.n_gpu > 1:
        raise checks.fail(
            OP,
            "trainer",
            "one GPU a process",
            f"DataParallel over {trainer.args.n_gpu}",
            "launch with torchrun or accelerate",
        )
    if hasattr(trainer.compute_loss, "fasttax_full_kl"):
        raise checks.fail(
            OP,
            "trainer",
            "one without a FullKL",
            "one that has it already",
            "undo() that one first",
        )
    if _is_a(trainer, "GRPOTrainer") and trainer.beta != 0:
        raise checks.fail(
            OP,
            "trainer",
            "GRPO with beta=0.0, whose k3 estimate this takes the place of",
            f"beta={trainer.beta:g}",
            "pass GRPOConfig(beta=0.0) and the coefficient here",
        )


def _reference_of(trainer: Any, policy: Any, ref_model: Any) -> ModelReference | CachedReference:
    """What `ref_model` stands for."""
    if isinstance(ref_model, (str, os.PathLike)):
        ref_model = TopKReference.load(ref_model)
    if isinstance(ref_model, TopKReference):
        if _is_a(trainer, *GENERATING):
            raise checks.fail(
                OP,
                "ref_model",
                "a model: the sequences of GRPO and RLOO are new at every step",
                "a cached reference",
            )
        return CachedReference(ref_model)
    accelerator = trainer.accelerator
    keep = getattr(trainer, "num_iterations", 1) > 1
    if ref_model is None:
        ref_model = getattr(trainer, "ref_model", None)
    if ref_model is None:
        if not hasattr(trainer.model, "peft_config"):
            raise checks.fail(
                OP,
                "ref_model",
                "a model or a TopKReference",
                "None, and the trainer has neither a reference nor an adapter",
                "pass a frozen copy of the base model",
            )
        return ModelReference(policy, accelerator.autocast, adapter=trainer.model, keep=keep)
    if isinstance(ref_model, nn.Module):
        ref_model = accelerator.unwrap_model(ref_model)
    lm = causal_lm(OP, "ref_model", ref_model)
    if lm is policy:
        raise checks.fail(
            OP,
            "ref_model",
            "a model of its own",
            "the policy itself, from which it would never differ",
            "pass a frozen copy",
        )
    if not any(hasattr(p, "full_tensor") for p in lm.parameters()):
        lm.to(accelerator.device)
    return ModelReference(lm, accelerator.autocast, keep=keep)


def _counted(inputs: dict[str, Any], kwargs: dict[str, Any], T: int) -> Tensor:
    """The tokens that the trainer's loss counts, (B, T) by the position that predicts.

    Args:
        inputs: the trainer's batch.
        kwargs: of the model's forward.
        T: positions of the backbone, which prompt-learning PEFT's virtual tokens are in front of.
    """
    labels = kwargs.get("labels", inputs.get("labels"))
    if kwargs.get("shift_labels") is not None:
        mask: Tensor = kwargs["shift_labels"] != -100
    elif labels is None:
        raise checks.fail(
            OP,
            "trainer",
            "a batch with labels, by which the loss counts tokens",
            f"keys {sorted(map(str, inputs))}",
        )
    else:
        mask = nn.functional.pad(labels[:, 1:] != -100, (T - labels.shape[1], 1))
    tools = inputs.get("tool_mask")
    if tools is not None:  # GRPO: 0 for tokens that a tool wrote
        mask = mask & nn.functional.pad(tools != 0, (T - 1 - tools.shape[1], 1), value=True)
    return mask


def _divisor(trainer: Any, inputs: dict[str, Any], tokens: Tensor, num_items: Any) -> Any:
    """What makes the sum over a micro-batch's tokens the trainer's kind of mean.

    Args:
        trainer: whose loss the KL is added to.
        inputs: its batch.
        tokens: of the micro-batch, at least 1.
        num_items: the tokens of the accumulation window over all ranks, where Trainer counts them.
    """
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        # as Trainer.training_step decides
        takes_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if num_items is None or not takes_items:
            return tokens
        items = torch.as_tensor(num_items, device=tokens.device).clamp(min=1)
        if not trainer.args.average_tokens_across_devices:
            return items
        return items / (trainer.accelerator.num_processes // trainer.get_tp_size())
    if not scaled:
        return tokens  # training_step divides by the micro-batches
    steps = trainer.current_gradient_accumulation_steps
    of_window = getattr(trainer, "loss_type", None) in TOKEN_LOSSES
    if of_window and "num_items_in_batch" in inputs:
        # the generation batch's tokens, over all ranks
        items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        return items * steps / trainer.args.steps_per_generation
    return tokens * steps
