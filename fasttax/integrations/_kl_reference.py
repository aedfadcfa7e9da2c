"""What `ref_model` stands for: a model, the policy without its adapter, or a top-k file."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from fasttax._base import checks
from fasttax.integrations._heads import vocabulary
from fasttax.integrations._kl_cached import CachedReference
from fasttax.integrations._kl_sums import Asker, ModelReference, vocabularies_differ
from fasttax.integrations._models import causal_lm
from fasttax.integrations.reference import TopKReference

Reference = ModelReference | CachedReference
RefModel = nn.Module | TopKReference | str | os.PathLike[str] | None


def loaded(ref_model: Any) -> Any:
    """A path's TopKReference; anything else as it is."""
    if isinstance(ref_model, (str, os.PathLike)):
        return TopKReference.load(ref_model)
    return ref_model


def reference_of(
    asker: Asker,
    trainer: Any,
    policy: Any,
    ref_model: Any,
    temperature: float,
    *,
    keep: bool = False,
) -> Reference:
    """The reference that `ref_model` means in this trainer.

    None is the trainer's own reference, or under PEFT the model without its adapter.

    Args:
        asker: who asks for it, for errors.
        trainer: whose device and precision it takes.
        policy: the language model that is trained.
        ref_model: a model, a TopKReference, or None.
        temperature: of both distributions.
        keep: as in `ModelReference`.

    Raises:
        ValueError, TypeError: there is none, or it does not fit the policy.
    """
    accelerator = trainer.accelerator
    if isinstance(ref_model, TopKReference):
        return CachedReference(ref_model, policy, temperature, accelerator.autocast, asker)
    if ref_model is None:
        ref_model = getattr(trainer, "ref_model", None)
    if ref_model is None:
        if not hasattr(trainer.model, "peft_config"):
            raise checks.fail(
                *asker,
                "a model or a TopKReference",
                "None, and the trainer has neither a reference nor an adapter",
                "pass a frozen copy of the base model",
            )
        return ModelReference(policy, accelerator.autocast, adapter=trainer.model, keep=keep)
    if isinstance(ref_model, nn.Module):
        ref_model = accelerator.unwrap_model(ref_model)
    lm = causal_lm(*asker, ref_model)
    if lm is policy:
        raise checks.fail(
            *asker,
            "a model of its own",
            "the policy itself, from which it would never differ",
            "pass a frozen copy",
        )
    own, other = vocabulary(policy), vocabulary(lm)
    if own is not None and other is not None and own != other:
        raise vocabularies_differ(own, other, asker)
    if not any(hasattr(p, "full_tensor") for p in lm.parameters()):
        lm.to(accelerator.device)
    return ModelReference(lm, accelerator.autocast, keep=keep)
