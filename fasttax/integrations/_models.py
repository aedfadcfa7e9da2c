"""What the integrations must know of a language model: parameters, backbone, head, tempering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fasttax._base import checks

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
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise checks.fail(
            op,
            "model",
            "plain, DDP or FSDP2 parameters",
            "FSDP1's flattened ones",
            "use FSDP2 (fsdp_version=2)",
        )
    live = {id(p) for p in model.parameters()}
    strangers = [name for name, p in held.items() if id(p) not in live]
    if (
        strangers
        and any(hasattr(p, "full_tensor") for p in model.parameters())
        and not any(hasattr(p, "full_tensor") for p in held.values())
    ):
        return type(ewc)(
            model, dict(ewc.fisher), strength=ewc.strength, anchor=ewc.anchor, storage=ewc.storage
        )
    if strangers:
        raise checks.fail(
            op,
            "ewc",
            "parameters of the model being trained",
            f"{len(strangers)} that are not, as {strangers[0]}",
            "build the EWC on the model that the trainer trains",
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


@dataclass(frozen=True)
class Head:
    """The head's weight (V, H), its bias (V,), and what its logits meet before the temperature."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def causal_lm(op: str, argument: str, model: Any) -> Any:
    """The transformers model inside DDP, PEFT or nothing, with a backbone and a head."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "peft_config") and callable(base := getattr(model, "get_base_model", None)):
        model = base()
    output = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or not callable(output) or output() is None:
        raise checks.fail(
            op,
            argument,
            "a transformers causal language model with an output head",
            type(model).__name__,
            error=TypeError,
        )
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The module of a causal language model that makes the hidden states of its head."""
    found = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(found, nn.Module):
        raise checks.fail(
            "FullKL",
            "model",
            "a model whose backbone is its base_model",
            type(model).__name__,
            error=TypeError,
        )
    return found


def head(model: Any) -> Head:
    """Read while the model's forward runs, where sharded heads are whole."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    return Head(
        weight=_whole(layer.weight),
        bias=_whole(getattr(layer, "bias", None)),
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _whole(tensor: Any) -> Any:
    """A tensor as it is, all of a sharded one, None for None."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by, under the name that its family has for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scale = getattr(config, "logits_scaling", None)
    if scale is None:
        return 1.0
    # HyperCLOVA X multiplies by it, Granite divides
    return float(scale) if config.model_type == "hyperclovax" else 1.0 / float(scale)


def hidden_states(output: Any) -> Tensor:
    """A backbone's last hidden states (B, T, H), whatever form its output has."""
    states: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return states


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode, and in the mode from before afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
