"""The names in TRL that `patch` replaces: the signature each must have, and its replacement.

A replacement has TRL's signature and hands on to TRL's own what fasttax has no op for.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor

from fasttax.integrations._trl_divergence import Divergence, divergence_loss, has_jsd, jsd_loss
from fasttax.integrations._trl_logprob import LogProb, selected_logp

TESTED = "1.16"  # the TRL whose signatures these are
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
        return LogProb.apply(
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
        return Divergence.apply(*args)

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
        return divergence_loss(
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
        if others.get("logits_are_probs") or not has_jsd(reduction, num_items_in_batch):
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
        return jsd_loss(
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
        return selected_logp(logits, index, temperature, row_mask)

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
        ids = torch.cat((prompt_ids[:, cut:], completion_ids), 1)
        mask = torch.cat((prompt_mask[:, cut:], completion_mask), 1)
        logits = model(ids, attention_mask=mask).logits[:, -completion_ids.shape[1] - 1 : -1]
        return selected_logp(logits, completion_ids, 1.0, None)

    return _forward


@dataclass(frozen=True)
class Target:
    """A name in TRL, the signature that it must have, and its replacement.

    `make` takes (what TRL has there, a counter of calls, the label to count under).
    """

    trainers: tuple[str, ...]
    module: str
    owner: str  # a class in the module, or "" for the module itself
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Any, Counter[str], str], Any]

    @property
    def label(self) -> str:
        """The whole dotted name."""
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
        found = tuple(inspect.signature(_function_of(original)).parameters)
        if found != self.parameters:
            raise RuntimeError(
                f"patch: {self.label}: expected the signature ({', '.join(self.parameters)}) of "
                f"trl {TESTED}, got ({', '.join(found)}) in trl {trl.__version__}; install "
                f"trl=={TESTED}.*"
            )
        return owner, original


def _function_of(original: Any) -> Callable[..., Any]:
    """The function whose signature counts: a static method's, an autograd.Function's forward."""
    if isinstance(original, staticmethod):
        return original.__func__
    function: Callable[..., Any] = getattr(original, "forward", original)
    return function


TARGETS = (
    Target(
        ("sft", "dpo", "kto", "grpo", "rloo"),
        "trl.trainer.utils",
        "",
        "_ChunkedLogProbFunction",
        LOGPROB,
        _logprob,
    ),
    Target(
        ("distillation",),
        "trl.trainer.distillation_trainer",
        "",
        "ChunkedDivergenceFunction",
        DIVERGENCE,
        _divergence,
    ),
    Target(
        ("distillation",),
        "trl.trainer.distillation_trainer",
        "",
        "_chunked_divergence_loss",
        LOSS,
        _divergence_loss,
    ),
    Target(
        ("gkd",),
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer",
        "generalized_jsd_loss",
        JSD,
        _jsd,
    ),
    Target(
        ("gold",),
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer",
        "generalized_jsd_loss",
        GOLD_JSD,
        _jsd,
    ),
    Target(
        ("orpo",),
        "trl.experimental.orpo.orpo_trainer",
        "",
        "selective_log_softmax",
        SELECTIVE,
        _selective,
    ),
    Target(
        ("cpo",),
        "trl.experimental.cpo.cpo_trainer",
        "",
        "selective_log_softmax",
        SELECTIVE,
        _selective,
    ),
    Target(
        ("online_dpo",),
        "trl.experimental.online_dpo.online_dpo_trainer",
        "OnlineDPOTrainer",
        "_forward",
        ONLINE,
        _online,
    ),
)
