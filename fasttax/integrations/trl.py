"""fasttax in TRL: its fused ops in place of TRL's own, and an exact KL to the reference.

from fasttax.integrations.trl import FullKL, FusedGKDMixin, patch

with patch():                          # or handle = patch("sft", "gkd"); handle.undo()
    trainer.train()

FullKL(trainer, ref_model, beta=0.1)   # beta * KL(policy || ref) in the loss of GRPO, RLOO, DPO,
KTO, SFT
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax.integrations import _trl_ops as ops
from fasttax.integrations._handle import Handle

try:
    import trl

    from fasttax.integrations._full_kl import FullKL as FullKL
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.trl: {error.name} is not installed; run `pip install "
        "'fasttax[trl]'`",
        name=error.name,
    ) from error

__all__ = ["FullKL", "FusedGKDMixin", "Patch", "patch"]

TESTED = "1.16"
REDUCTIONS = ("batchmean", "sum", "mean")
LOGPROB = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
DIVERGENCE = (
    "ctx",
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
    "beta",
    "temperature",
    "student_logit_scale",
    "student_final_logit_softcapping",
    "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)
LOSS = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)
JSD = (
    "student_logits",
    "teacher_logits",
    "labels",
    "beta",
    "temperature",
    "reduction",
    "num_items_in_batch",
)
GOLD_JSD = (*JSD[:-1], "logits_are_probs", "num_items_in_batch")
SELECTIVE = ("logits", "index", "temperature", "row_mask")
ONLINE = (
    "self",
    "model",
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "vision_inputs",
)


class Patch(Handle):
    """What `patch` did: `.replaced` names it, `.calls` counts how often each replacement ran,
    `.undo()` puts TRL's own back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: list[str] = []
        self.calls: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced) if self.active else 'undone'})"


def patch(*trainers: Any, any_version: bool = False, quiet: bool = False) -> Patch:
    """Puts fasttax's ops in place of TRL's for the trainers named.

    log-probs and entropy from hidden states (SFT, DPO, KTO, GRPO, RLOO), divergence from hidden
    states (Distillation), divergence of logits (GKD, GOLD), log-probs of logits (ORPO, CPO with
    SimPO, OnlineDPO).

    Replaces names in TRL's modules, for every trainer in the process, until `undo()`. Losses,
    metrics and gradients stay TRL's up to rounding, under autocast too. What has no fasttax op goes
    on to TRL's: GOLD's `logits_are_probs` (ULD), an unreduced JSD.

    Args:
        trainers: names (or TRL's: "SFT", "SFTTrainer") among "sft", "dpo", "kto", "grpo", "rloo",
            "distillation", "gkd", "gold", "orpo", "cpo", "online_dpo", or trainers, or their
            classes; none is all of them.
        any_version: also patch a TRL other than 1.16; signatures are checked all the same.
        quiet: do not print what was replaced to stderr.

    Returns:
        A `Patch`, also a context manager.

    Raises:
        ValueError: a name that is none of these, or a trainer that has no op to replace.
        RuntimeError: another version of TRL, another signature than TRL 1.16's, or a patch that is
            still in place; nothing is replaced then.
    """
    names = {_name_of(t) for t in trainers} or set(CHOICES)
    if not any_version and not re.match(rf"{re.escape(TESTED)}(\.|$)", trl.__version__):
        raise RuntimeError(
            f"patch: trl: expected version {TESTED}, whose ops these replacements were tested "
            f"against, got {trl.__version__}; "
            f"install trl=={TESTED}.*, or pass any_version=True to go by the signatures alone"
        )
    chosen = [target for target in TARGETS if names & set(target.trainers)]
    found = [(target, *target.find()) for target in chosen]
    handle = Patch()
    for target, owner, original in found:
        handle.replace(
            owner, target.name, target.make(original, handle.calls, target.label), target.label
        )
        handle.replaced.append(target.label)
    if not quiet:
        print(f"fasttax: replaced {', '.join(handle.replaced)}", file=sys.stderr)
    return handle


def _name_of(trainer: Any) -> str:
    if isinstance(trainer, str):
        spelled = {name: choice for choice, name in CHOICES.items()} | {
            name.removesuffix("Trainer"): choice for choice, name in CHOICES.items()
        }
        return checks.choice("patch", "trainers", spelled.get(trainer, trainer), tuple(CHOICES))
    classes = {
        c.__name__ for c in (trainer if isinstance(trainer, type) else type(trainer)).__mro__
    }
    for name, class_name in CHOICES.items():
        if class_name in classes:
            return name
    raise checks.fail(
        "patch",
        "trainers",
        f"one of {', '.join(map(repr, CHOICES))}, or a trainer of these kinds",
        trainer,
    )


# --- the replacements ------------------------------------------------------------------------------------------------------


class _Apply:
    """Stands where TRL has an autograd.Function and calls `.apply`."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.apply = run


def _logprob(original: Any, calls: Counter[str], label: str) -> _Apply:
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Any:
        if logit_scale <= 0:
            return original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                softcap,
                logit_scale,
                outputs,
            )
        calls[label] += 1
        return ops.LogProb.apply(
            hidden, weight, bias, targets, temperature, softcap, logit_scale, tuple(outputs)
        )

    return _Apply(apply)


def _divergence(original: Any, calls: Counter[str], label: str) -> _Apply:
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_scale: float = 1.0,
        teacher_softcap: float | None = None,
    ) -> Any:
        args = (
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            beta,
            temperature,
            student_scale,
            student_softcap,
            teacher_scale,
            teacher_softcap,
        )
        if student_scale <= 0 or teacher_scale <= 0:
            return original.apply(*args)
        calls[label] += 1
        return ops.Divergence.apply(*args)

    return _Apply(apply)


def _divergence_loss(original: Any, calls: Counter[str], label: str) -> Callable[..., Any]:
    def _chunked_divergence_loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Any = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> Any:
        if student_logit_scale <= 0 or teacher_logit_scale <= 0:
            return original(
                student_hidden_states,
                teacher_hidden_states,
                student_lm_head_weight,
                teacher_lm_head_weight,
                completion_mask,
                beta,
                num_items_in_batch,
                student_lm_head_bias,
                teacher_lm_head_bias,
                student_logit_scale,
                teacher_logit_scale,
                student_final_logit_softcapping,
                teacher_final_logit_softcapping,
                temperature,
            )
        calls[label] += 1
        return ops.divergence_loss(
            (student_hidden_states, student_lm_head_weight, student_lm_head_bias),
            (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias),
            completion_mask,
            num_items_in_batch,
            beta,
            temperature,
            student_logit_scale,
            student_final_logit_softcapping,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )

    return _chunked_divergence_loss


def _jsd(original: Any, calls: Counter[str], label: str) -> staticmethod[..., Any]:
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Any = None,
        **others: Any,
    ) -> Any:
        if others.get("logits_are_probs") or (
            reduction not in REDUCTIONS and num_items_in_batch is None
        ):
            return original.__func__(
                student_logits,
                teacher_logits,
                labels=labels,
                beta=beta,
                temperature=temperature,
                reduction=reduction,
                num_items_in_batch=num_items_in_batch,
                **others,
            )
        calls[label] += 1
        return ops.jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )

    return staticmethod(generalized_jsd_loss)


def _selective(original: Any, calls: Counter[str], label: str) -> Callable[..., Any]:
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Any:
        if index.dim() != logits.dim() - 1:  # several indices a token
            return original(logits, index, temperature, row_mask)
        calls[label] += 1
        return ops.selected_logp(logits, index, temperature, row_mask)

    return selective_log_softmax


def _online(original: Any, calls: Counter[str], label: str) -> Callable[..., Any]:
    def _forward(
        self: Any,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        vision_inputs: Any = None,
    ) -> Any:
        if vision_inputs is not None or prompt_ids.shape[1] == 0:
            return original(
                self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs
            )
        calls[label] += 1
        cut = max(prompt_ids.shape[1] + completion_ids.shape[1] - self.max_length, 0)
        ids, mask = (
            torch.cat((prompt_ids[:, cut:], completion_ids), 1),
            torch.cat((prompt_mask[:, cut:], completion_mask), 1),
        )
        logits = model(ids, attention_mask=mask).logits[:, -completion_ids.shape[1] - 1 : -1]
        return ops.selected_logp(logits, completion_ids, 1.0, None)

    return _forward


@dataclass(frozen=True)
class _Target:
    """A name in TRL, the signature it must have, and what makes its replacement from (original,
    counter, label).
    """

    trainers: tuple[str, ...]
    module: str
    owner: str  # a class in the module, or "" for the module itself
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Any, Counter[str], str], Any]

    @property
    def label(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.name)))

    def find(self) -> tuple[Any, Any]:
        """The owner of the name and what it is bound to, checked."""
        module = importlib.import_module(self.module)
        owner = getattr(module, self.owner) if self.owner else module
        original = vars(owner).get(self.name)
        if original is None:
            raise RuntimeError(
                f"patch: {self.label}: expected the op of trl {TESTED}, got nothing of that name "
                f"in trl {trl.__version__}"
            )
        if isinstance(original, _Apply) or getattr(original, "__module__", "") == __name__:
            raise RuntimeError(
                f"patch: {self.label} is patched by fasttax already; undo() that patch first"
            )
        function = (
            original.__func__
            if isinstance(original, staticmethod)
            else getattr(original, "forward", original)
        )
        found = tuple(inspect.signature(function).parameters)
        if found != self.parameters:
            raise RuntimeError(
                f"patch: {self.label}: expected the signature ({', '.join(self.parameters)}) of "
                f"trl {TESTED}, got ({', '.join(found)}) "
                f"in trl {trl.__version__}; install trl=={TESTED}.*"
            )
        return owner, original


CHOICES = {
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
    "distillation": "DistillationTrainer",
    "gkd": "GKDTrainer",
    "gold": "GOLDTrainer",
    "orpo": "ORPOTrainer",
    "cpo": "CPOTrainer",
    "online_dpo": "OnlineDPOTrainer",
}
TARGETS = (
    _Target(
        ("sft", "dpo", "kto", "grpo", "rloo"),
        "trl.trainer.utils",
        "",
        "_ChunkedLogProbFunction",
        LOGPROB,
        _logprob,
    ),
    _Target(
        ("distillation",),
        "trl.trainer.distillation_trainer",
        "",
        "ChunkedDivergenceFunction",
        DIVERGENCE,
        _divergence,
    ),
    _Target(
        ("distillation",),
        "trl.trainer.distillation_trainer",
        "",
        "_chunked_divergence_loss",
        LOSS,
        _divergence_loss,
    ),
    _Target(
        ("gkd",),
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer",
        "generalized_jsd_loss",
        JSD,
        _jsd,
    ),
    _Target(
        ("gold",),
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer",
        "generalized_jsd_loss",
        GOLD_JSD,
        _jsd,
    ),
    _Target(
        ("orpo",),
        "trl.experimental.orpo.orpo_trainer",
        "",
        "selective_log_softmax",
        SELECTIVE,
        _selective,
    ),
    _Target(
        ("cpo",),
        "trl.experimental.cpo.cpo_trainer",
        "",
        "selective_log_softmax",
        SELECTIVE,
        _selective,
    ),
    _Target(
        ("online_dpo",),
        "trl.experimental.online_dpo.online_dpo_trainer",
        "OnlineDPOTrainer",
        "_forward",
        ONLINE,
        _online,
    ),
)


class FusedGKDMixin:
    """fasttax's divergence in one trainer class, with nothing patched.

    `class Trainer(FusedGKDMixin, GKDTrainer): ...`, or GOLDTrainer.

    Overrides the public static method `generalized_jsd_loss`. (GOLD's cross-tokenizer loss calls
    GOLDTrainer's by name: `patch("gold")`.)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [c.__name__ for c in cls.__mro__]
        if not any(
            name in order[order.index("FusedGKDMixin") :] for name in ("GKDTrainer", "GOLDTrainer")
        ):
            bases = ", ".join(b.__name__ for b in cls.__bases__)
            raise checks.fail(
                "FusedGKDMixin",
                "bases",
                "(FusedGKDMixin, GKDTrainer) or (FusedGKDMixin, GOLDTrainer)",
                f"({bases})",
                error=TypeError,
            )

    @staticmethod
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        *,
        logits_are_probs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if logits_are_probs or (reduction not in REDUCTIONS and num_items_in_batch is None):
            from trl.experimental.gold import (
                GOLDTrainer,  # GKD's is the same but for logits_are_probs
            )

            return GOLDTrainer.generalized_jsd_loss(
                student_logits,
                teacher_logits,
                labels=labels,
                beta=beta,
                temperature=temperature,
                reduction=reduction,
                logits_are_probs=logits_are_probs,
                num_items_in_batch=num_items_in_batch,
            )
        return ops.jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )
