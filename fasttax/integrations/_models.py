"""What the integrations must know of a model: its parameters, its wrappers, its mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fasttax._base import checks
from fasttax._base.evaluation import evaluated, uncached
from fasttax.integrations._fsdp1 import refuse_fsdp1, wrapped_by

if TYPE_CHECKING:
    from fasttax.ewc.ewc import EWC


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
    """Without gradients and a cache, in eval mode; in the mode from before afterwards."""
    with torch.no_grad(), evaluated(model), uncached(model):
        yield
