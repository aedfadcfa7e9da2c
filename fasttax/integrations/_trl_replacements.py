"""fasttax's ops under TRL's signatures.

Each maker takes what TRL has, a counter of calls and the label to count under. A replacement is
called as TRL's own is, with any part of its arguments by name, and hands the same call on to TRL's
own where fasttax has no op for it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttax.integrations._trl_divergence import Divergence, divergence_loss, has_jsd, jsd_loss
from fasttax.integrations._trl_logprob import LogProb, selected_logp

Make = Callable[[Any, Counter[str], str], Any]


class Replaced:
    """What stands in TRL's place; `apply` where TRL has an autograd.Function.

    Args:
        run: (the arguments of a call by name) -> the result, or NotImplemented for TRL's own.
        signature: of TRL's own.
        own: TRL's own, to be called.
        calls: counts the calls that fasttax served.
        label: under which.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        signature: inspect.Signature,
        own: Callable[..., Any],
        calls: Counter[str],
        label: str,
    ) -> None:
        self.run, self.signature, self.own = run, signature, own
        self.calls, self.label = calls, label

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Fasttax's result, or TRL's own."""
        result = self.run(**self.signature.bind(*args, **kwargs).arguments)
        if result is NotImplemented:
            return self.own(*args, **kwargs)
        self.calls[self.label] += 1
        return result

    apply = __call__

    def __get__(self, instance: Any, owner: type) -> Any:
        """As a function in a class: the instance is the first argument."""
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)


def signature_of(original: Any) -> inspect.Signature:
    """Of a function, what a static method holds, or an autograd.Function's forward without ctx."""
    if isinstance(original, staticmethod):
        return inspect.signature(original.__func__)
    forward = getattr(original, "forward", None)
    if forward is None:
        return inspect.signature(original)
    whole = inspect.signature(forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def function(original: Any, run: Callable[..., Any], calls: Counter[str], label: str) -> Replaced:
    """In place of a function, a method or an autograd.Function."""
    own = getattr(original, "apply", original)
    return Replaced(run, signature_of(original), own, calls, label)


def logprob(original: Any, calls: Counter[str], label: str) -> Replaced:
    """Log-probs and entropy of hidden states under a head."""

    def run(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Any:
        if logit_scale <= 0:
            return NotImplemented
        return LogProb.apply(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            final_logit_softcapping,
            logit_scale,
            tuple(outputs),
        )

    return function(original, run, calls, label)


def divergence(original: Any, calls: Counter[str], label: str) -> Replaced:
    """Divergence and student's entropy of hidden states under two heads."""

    def run(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> Any:
        if student_logit_scale <= 0 or teacher_logit_scale <= 0:
            return NotImplemented
        return Divergence.apply(
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            beta,
            temperature,
            student_logit_scale,
            student_final_logit_softcapping,
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )

    return function(original, run, calls, label)


def whole_divergence(original: Any, calls: Counter[str], label: str) -> Replaced:
    """Distillation's loss, entropy and number of tokens."""

    def run(
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
            return NotImplemented
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

    return function(original, run, calls, label)


def jsd(original: Any, calls: Counter[str], label: str) -> staticmethod[..., Any]:
    """GKD's and GOLD's generalised JSD of logits."""

    def run(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        logits_are_probs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if logits_are_probs or not has_jsd(reduction, num_items_in_batch):
            return NotImplemented
        return jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )

    own = original.__func__
    return staticmethod(Replaced(run, signature_of(original), own, calls, label))


def selective(original: Any, calls: Counter[str], label: str) -> Replaced:
    """Log-probs of logits at one index a token."""

    def run(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Any:
        if index.dim() != logits.dim() - 1:  # several indices a token
            return NotImplemented
        return selected_logp(logits, index, temperature, row_mask)

    return function(original, run, calls, label)


def online(original: Any, calls: Counter[str], label: str) -> Replaced:
    """OnlineDPO's forward, whose log-probs TRL takes from a whole log-softmax."""

    def run(
        self: Any,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        vision_inputs: Any = None,
    ) -> Any:
        if vision_inputs is not None or prompt_ids.shape[1] == 0:
            return NotImplemented
        cut = max(prompt_ids.shape[1] + completion_ids.shape[1] - self.max_length, 0)
        ids = torch.cat((prompt_ids[:, cut:], completion_ids), 1)
        mask = torch.cat((prompt_mask[:, cut:], completion_mask), 1)
        logits = model(ids, attention_mask=mask).logits[:, -completion_ids.shape[1] - 1 : -1]
        return selected_logp(logits, completion_ids, 1.0, None)

    return function(original, run, calls, label)
