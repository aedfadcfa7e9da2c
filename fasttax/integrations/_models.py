"""What the integrations must know of a model: its EWC, its parameters, its wrappers, its mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fasttax._base import checks
from fasttax._base.hashes import same_weights, weights_hash
from fasttax._base.modes import evaluated
from fasttax._base.uncached import uncached
from fasttax.ewc.ewc import EWC
from fasttax.integrations._fsdp1 import refuse_fsdp1, wrapped_by

WHERE = ("pre_clip", "post_clip")  # where a callback adds the penalty's gradient


def check_ewc(op: str, ewc: Any) -> None:
    """Refuses what is no EWC.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(ewc, EWC):
        raise checks.fail(op, "ewc", "a fasttax.EWC", ewc, error=TypeError)


def anchor_hash(ewc: EWC) -> str:
    """What a trainer's checkpoint keeps of an EWC."""
    return weights_hash(ewc.anchor.items())


def check_anchor(op: str, ewc: EWC, saved: str | None) -> None:
    """Refuses another anchor than the one that a checkpoint was trained with, by its hash.

    Raises:
        ValueError: it is another.
    """
    now = anchor_hash(ewc)
    if not same_weights(saved, now):
        raise checks.fail(
            op,
            "ewc",
            f"the anchor that the checkpoint was trained with (hash {saved})",
            f"another (hash {now})",
            "build the EWC on the base model, before the checkpoint's weights are loaded, or load "
            "it with EWC.load",
        )


def on_model(op: str, ewc: EWC, model: Any) -> EWC:
    """The EWC on the parameters that are trained.

    It is `ewc` itself, or where FSDP2 put sharded parameters in their place one made anew on those.
    A penalty on other parameters would have its gradient where nobody steps, and is an error.

    Args:
        op: the caller, for errors.
        ewc: an `fasttax.EWC`.
        model: the model that a trainer trains, wrapped or not.

    Raises:
        ValueError: FSDP1, parameters that are not the model's, or none that is trained.
    """
    held = ewc.parameters()
    refuse_fsdp1(op, "model", model)
    for module in wrapped_by("FSDPModule", model):  # an evaluation's forward leaves whole ones
        module.reshard()
    live = {id(p) for p in model.parameters()}
    watched = ewc.hold.watch.held  # base weights under LoRA, too
    strangers = [name for name, p in watched.items() if id(p) not in live]
    if (
        strangers
        and any(hasattr(p, "full_tensor") for p in model.parameters())
        and not any(hasattr(watched[name], "full_tensor") for name in strangers)
    ):
        return ewc.on(model)
    if strangers:
        raise checks.fail(
            op,
            "ewc",
            "parameters of the model being trained",
            f"{len(strangers)} that are not, as {strangers[0]}",
            "build the EWC on the model that the trainer trains (ewc.on(model) where names and "
            "shapes fit)",
        )
    if not any(p.requires_grad for p in held.values()):
        raise checks.fail(
            op,
            "ewc",
            "at least one trainable parameter",
            f"{len(held)} frozen ones, whose penalty has no gradient",
            "under PEFT hold the adapter's parameters (DiagonalFisher(model, lora='factors'))",
        )
    return ewc


def causal_lm(op: str, argument: str, model: Any) -> Any:
    """The transformers model inside DDP, PEFT or nothing, which makes logits over a vocabulary."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "peft_config") and callable(base := getattr(model, "get_base_model", None)):
        model = base()
    output = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or not callable(output) or not _predicts(model):
        raise checks.fail(
            op,
            argument,
            "a transformers causal language model with an output head",
            type(model).__name__,
            "pass one of the classes that AutoModelForCausalLM, AutoModelForSeq2SeqLM or "
            "AutoModelForImageTextToText make",
            error=TypeError,
        )
    return model


def _predicts(model: Any) -> bool:
    """Whether a transformers model predicts tokens: by its head, or as it can generate."""
    if model.get_output_embeddings() is not None:
        return True
    generates = getattr(model, "can_generate", None)
    return callable(generates) and bool(generates())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients and a cache, in eval mode, and in the mode from before afterwards."""
    with evaluated(model), torch.no_grad(), uncached(model):
        yield
