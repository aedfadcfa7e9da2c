"""Layers that add a product of factors to a weight: what the factors are, and how they multiply.

PEFT's LoRA of linear layers, embeddings and convolutions (scale B A), of one parameter that holds
the weights of several experts (scale B A for each), and AdaLoRA (scale B diag(E) A). They are read
by what they have (lora_A, lora_B, scaling, active_adapters), without importing PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax import reference
from fasttax._base import dtensor, inner
from fasttax.ewc.names import active_adapters

#: b, a, scale, with scale * b @ a the update as a matrix; of K experts b and a are stacks of K
Factors = tuple[Tensor, Tensor, float]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# LoRA's variants that differ in how they train, and in nothing that they compute
SAME_UPDATE = ("MiCALinearVariant", "MiCAEmbeddingVariant")


# --- what a layer is ---------------------------------------------------------------------------


def is_embedding(module: Any) -> bool:
    """Whether a layer's weight is looked up."""
    return not is_of_parameter(module) and isinstance(module.base_layer, nn.Embedding)


def is_of_parameter(module: Any) -> bool:
    """Whether it is of one parameter of a module (target_parameters), such as fused experts."""
    return hasattr(module, "parameter_name")


def _is_adalora(module: Any) -> bool:
    return isinstance(getattr(module, "lora_E", None), nn.ParameterDict)


def is_packed(weight: Tensor) -> bool:
    """Whether only its own layer reads a weight: below 16 bits a value, or a tensor subclass."""
    narrow = not inner.is_float(weight) or weight.dtype.itemsize < 2
    return narrow or inner.lies_in_others(weight)


def _is_turned(module: Any) -> bool:
    """Whether the weight lies as (in, out), the transpose of B A.

    transformers' Conv1D, and embeddings.
    """
    conv1d = type(module.base_layer).__name__ == "Conv1D" and not is_of_parameter(module)
    return is_embedding(module) or conv1d


def has_factors(layer: Any) -> bool:
    """Whether a layer has what is read here."""
    factors = getattr(layer, "lora_embedding_A" if is_embedding(layer) else "lora_A", None)
    own = is_embedding(layer) or _is_adalora(layer)
    kind = nn.ParameterDict if own else nn.ModuleDict
    return isinstance(factors, kind) and all(hasattr(layer, n) for n in ("lora_B", "scaling"))


# --- its weight --------------------------------------------------------------------------------


def weight_of(module: Any) -> Any:
    """The frozen weight that the update moves, as it lies (4-bit ones packed); None for none."""
    if is_of_parameter(module):
        return getattr(module.get_base_layer(), module.parameter_name, None)
    return getattr(module.base_layer, "weight", None)


def weight_shape(module: Any) -> tuple[int, ...]:
    """Of the weight as a float tensor, also where it lies packed in 4 bits."""
    base, weight = module.base_layer, weight_of(module)
    if inner.is_float(weight) or not hasattr(base, "in_features"):
        return tuple(weight.shape)
    return base.out_features, base.in_features


def matrix_shape(module: Any) -> tuple[int, ...]:
    """The weight's as the matrix (or stack of them) that the factors multiply to."""
    shape = weight_shape(module)
    if is_of_parameter(module):
        return shape
    return shape[0], math.prod(shape[1:])


# --- its factors -------------------------------------------------------------------------------


def adapters_of(module: Any) -> list[str]:
    """The adapters that a layer's forward adds."""
    names = module.lora_embedding_A if is_embedding(module) else module.lora_A
    return [a for a in active_adapters(module) if a in names]


def _kinds(module: Any) -> tuple[tuple[str, ...], str]:
    """The names of the factors' dicts, and what follows an adapter's name in a factor's."""
    if is_embedding(module):
        return ("lora_embedding_A", "lora_embedding_B"), ""
    if _is_adalora(module):
        return ("lora_A", "lora_E", "lora_B"), ""
    return ("lora_A", "lora_B"), ".weight"


def named_factors(module: Any) -> dict[str, Tensor]:
    """The active adapters' factors by their names in the layer, A first and B last of each."""
    kinds, leaf = _kinds(module)
    out: dict[str, Tensor] = {}
    for adapter in adapters_of(module):
        for kind in kinds:
            part = getattr(module, kind)[adapter]
            out[f"{kind}.{adapter}{leaf}"] = part.weight if leaf else part
    return out


def updates(module: Any, factors: Mapping[str, Tensor]) -> list[Factors]:
    """(b, a, scale) of each active adapter, with b @ a of the matrix's shape.

    `factors` stand in for those of `named_factors`.
    """
    kinds, leaf = _kinds(module)
    out: list[Factors] = []
    for adapter in adapters_of(module):
        # FSDP2 shards the factors too; they are small
        a, *middle, b = (dtensor.whole(factors[f"{kind}.{adapter}{leaf}"]) for kind in kinds)
        scale = float(module.scaling[adapter])
        if middle:
            # as a tensor: reading the number would wait for the device
            rank = reference.wide(module.ranknum[adapter].detach() + 1e-5)
            a = reference.wide(a) * reference.wide(middle[0]) / rank
        out.append((*_as_matrices(module, b, a), scale))
    return out


def _as_matrices(module: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    if is_of_parameter(module) and weight_of(module).dim() == 3:
        count = weight_of(module).shape[0]
        a = a.reshape(count, -1, a.shape[-1])  # (experts, r, in)
        b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # (experts, out, r)
        lies_turned = getattr(module.get_base_layer(), "is_transposed", False)
        return (a.mT, b.mT) if lies_turned else (b, a)
    if _is_turned(module):
        return a.T, b.T
    return b.flatten(1), a.flatten(1)


def delta(module: Any, factors: Mapping[str, Tensor]) -> Tensor:
    """The dense update of these factors, in the weight's layout."""
    products = [scale * (b @ a) for b, a, scale in updates(module, factors)]
    return torch.stack(products).sum(0).reshape(weight_shape(module))


def inputs(module: Any, update: Tensor) -> int:
    """How many features a layer takes, by its dense update."""
    return update.shape[0] if _is_turned(module) else update.shape[1]
