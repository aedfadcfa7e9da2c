"""lora="delta_w": the Fisher of W + scale B A at the base weights, in place of the factors'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, dtensor, inner
from fasttax.fisher.ops import sum_dtype
from fasttax.fisher.plan import Use
from fasttax.fisher.rules import rule_of
from fasttax.fisher.rules.conv import ConvTap
from fasttax.fisher.rules.embedding import EmbeddingTap
from fasttax.fisher.rules.linear import Conv1DTap, LinearTap
from fasttax.fisher.sums import Slot

LORA = ("factors", "delta_w")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(place, layer) of the layers that add factors lora_A and lora_B to a `base_layer`."""
    for where, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and (
            hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A")
        ):
            yield where, module


def base_weights(
    op: str, model: nn.Module, chosen: dict[str, nn.Parameter], slots: dict[str, Slot]
) -> dict[str, Use]:
    """Puts base weights in place of the adapter factors that add to them.

    Factors leave `chosen` and `slots`, base weights enter `slots` by their names. All that these
    need are the base layer's input and output gradient.

    Returns:
        name -> the base weight's use.

    Raises:
        ValueError: a layer is none of base(x) + scale B A x, or there is none.
    """
    found: dict[str, Use] = {}
    for where, layer in lora_layers(model):
        factors = [n for n in chosen if n.startswith(f"{where}.lora_")]
        if not factors:
            continue
        shape = _shape(layer.base_layer)
        if shape is None or not _is_additive(layer):
            raise checks.fail(
                op,
                "lora",
                "layers that compute base(x) + scale B A x with lora='delta_w'",
                f"{where} ({type(layer).__name__})",
                "leave it out with params=, or use lora='factors'",
            )
        base_where = f"{where}.base_layer"
        name = f"{base_where}.weight"
        slots[name] = _slot(model, layer.base_layer, shape, chosen[factors[0]].device)
        rule = rule_of(layer.base_layer) or LinearTap  # a packed linear layer of any class
        found[name] = Use(base_where, layer.base_layer, "weight", rule)
        for gone in factors:
            del chosen[gone], slots[gone]
        chosen.pop(name, None)
    if not found:
        raise checks.fail(
            op,
            "lora",
            "a model with LoRA layers among params with lora='delta_w'",
            "none",
            "use lora='factors' (the default), or params= that name the adapters",
        )
    return found


def _is_additive(layer: Any) -> bool:
    """Whether no factor is of a variant that scales the sum, as DoRA."""
    variants = getattr(layer, "use_dora", None) or {}
    if isinstance(variants, dict):
        return not any(variants.values())
    return not variants


def _shape(base: Any) -> torch.Size | None:
    """The weight's shape as the layer computes with it, whatever it is packed in."""
    rule = rule_of(base)
    dense = rule is LinearTap and inner.is_float(base.weight)
    if dense or rule in (EmbeddingTap, Conv1DTap, ConvTap):
        return base.weight.shape
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return torch.Size((base.out_features, base.in_features))
    return None


def _slot(model: nn.Module, base: Any, shape: torch.Size, device: torch.device) -> Slot:
    """What is summed: of the weight itself where it has that shape and no other module has it."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return Slot(shape, torch.float32, device)
    users = sum(p is weight for m in model.modules() for p in m.parameters(recurse=False))
    # subclasses (torchao's) know few ops
    plain = type(weight) in (Tensor, nn.Parameter) or dtensor.is_sharded(weight)
    itself = None
    if plain and weight.is_floating_point() and weight.shape == shape and users == 1:
        itself = weight
    return Slot(shape, sum_dtype(weight.dtype), device, itself)
