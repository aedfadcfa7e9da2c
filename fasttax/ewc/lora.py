"""EWC on LoRA: the penalty on the update of a frozen base weight, delta W = sum of scale B A over
the active adapters.

Recognised by what PEFT's layers have (lora_A, lora_B, scaling, active_adapters), without importing
PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax import reference
from fasttax._base import checks, dtensor
from fasttax.ewc import ops
from fasttax.ewc.store import Kept
from fasttax.fisher.estimate import Stored


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers by the name of the base weight they move."""
    found = {}
    for name, module in model.named_modules():
        if (
            hasattr(module, "lora_A")
            and hasattr(module, "lora_B")
            and hasattr(module, "scaling")
            and hasattr(module, "base_layer")
        ):
            found[f"{name}.weight"] = module
    return found


def _base(module: Any) -> nn.Module:
    return module.base_layer


def _is_embedding(module: Any) -> bool:
    return isinstance(_base(module), nn.Embedding)


def _is_turned(module: Any) -> bool:
    """Whether the weight lies as (in, out), the transpose of B A.

    transformers' Conv1D, and embeddings.
    """
    return _is_embedding(module) or type(_base(module)).__name__ == "Conv1D"


def weight_shape(module: Any) -> tuple[int, ...]:
    """Of the weight as a float tensor, also where it lies packed in 4 bits."""
    base: Any = _base(module)
    if base.weight.is_floating_point() or not hasattr(base, "in_features"):
        return tuple(base.weight.shape)
    return base.out_features, base.in_features


def _adapters(module: Any) -> list[str]:
    if getattr(module, "disable_adapters", False):
        return []
    names = module.lora_embedding_A if _is_embedding(module) else module.lora_A
    return [a for a in module.active_adapters if a in names]


def refuse_unsupported(op: str, name: str, module: Any) -> None:
    base = _base(module)
    if not (
        isinstance(base, (nn.Linear, nn.Embedding))
        or type(base).__name__ == "Conv1D"
        or (hasattr(base, "in_features") and hasattr(base, "out_features"))
    ):
        raise checks.fail(
            op,
            "model",
            "LoRA on Linear, Conv1D or Embedding",
            f"{name}, a {type(base).__name__}",
            "leave it out of the Fisher",
        )
    if getattr(module, "merged", False):
        raise checks.fail(
            op,
            "model",
            "LoRA updates apart from their base weight",
            f"a merged {name}",
            "call unmerge_adapter() first",
        )
    for adapter in _adapters(module):
        if adapter in (getattr(module, "lora_magnitude_vector", None) or {}) or (
            getattr(module, "use_dora", None) or {}
        ).get(adapter, False):
            raise checks.fail(
                op,
                "model",
                "plain LoRA",
                f"DoRA in {name} (adapter {adapter!r}): it rescales each row of the base weight by "
                "a learned "
                "magnitude, so that scale B A is not the weight's change and its penalty would be "
                "of another quantity",
                "train with use_dora=False, or leave it out of the Fisher",
            )
        if not _is_embedding(module) and getattr(module.lora_B[adapter], "bias", None) is not None:
            raise checks.fail(
                op,
                "model",
                "LoRA without a bias of its own",
                f"lora_bias in {name}",
                "train with lora_bias=False",
            )


@dataclass
class LoraHeld(Kept):
    """A base weight's Fisher and the layer whose update it weighs.

    `anchor` is the update to stay at, as (b, a) with b @ a, None for 0.
    """

    module: Any
    anchor: tuple[Tensor, Tensor] | None = None

    def parameters(self) -> list[Tensor]:
        """The trainable factors."""
        source = (
            ("lora_embedding_A", "lora_embedding_B")
            if _is_embedding(self.module)
            else ("lora_A", "lora_B")
        )
        tensors = [getattr(self.module, s)[a] for a in _adapters(self.module) for s in source]
        return [
            p
            for p in (t if isinstance(t, Tensor) else t.weight for t in tensors)
            if p.requires_grad
        ]

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(b, a, scale) with the update minus the anchor = scale * b @ a, of the weight's shape.

        Several adapters and the anchor stand side by side.
        """
        pairs = []
        for adapter in _adapters(self.module):
            if _is_embedding(self.module):
                a, b = self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter]
            else:
                a, b = self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight
            # FSDP2 shards the factors too; they are small
            a, b = (
                dtensor.whole(a),
                dtensor.whole(b),
            )
            pairs.append(
                (a.T, b.T, self.module.scaling[adapter])
                if _is_turned(self.module)
                else (b, a, self.module.scaling[adapter])
            )
        if self.anchor is not None:
            pairs.append((-self.anchor[0], self.anchor[1], 1.0))
        if not pairs:
            return None
        if len(pairs) == 1:
            return pairs[0]
        return (
            torch.cat([b * scale for b, _, scale in pairs], 1),
            torch.cat([a for _, a, _ in pairs], 0),
            1.0,
        )

    def penalty(self, strength: float) -> Tensor:
        """Differentiable by the factors."""
        factors = self.factors()
        device = self.module.base_layer.weight.device
        if factors is None:
            return torch.zeros((), device=device)
        b, a, scale = factors
        gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        scales = None if self.fisher.scales is None else self.fisher.scales.to(device)
        return ops.lora_penalty(
            a, b, self.fisher.values.to(device), scales, float(scale), strength, gradient
        )[0]

    def add_grad_(self, strength: float, scale: float | Tensor, only: set[int] | None) -> Tensor:
        """Adds scale * d penalty to the factors' gradients; returns the penalty."""
        params = [p for p in self.parameters() if only is None or id(p) in only]
        with torch.enable_grad():
            value = self.penalty(strength)
            grads: Sequence[Tensor] = torch.autograd.grad(value, params) if params else ()
        for p, g in zip(params, grads, strict=True):
            p.grad = (
                (g * scale).to(p.dtype)
                if p.grad is None
                else p.grad.add_((g * scale).to(p.grad.dtype))
            )
        return value.detach()

    def consolidate(self, fisher: Stored) -> None:
        """Stay at the present update, weighed by `fisher`."""
        base = LoraHeld(self.name, self.fisher, self.module).factors()
        self.fisher = fisher
        self.anchor = (
            None
            if base is None
            else (
                reference.wide((base[0] * base[2]).detach()).clone(),
                reference.wide(base[1].detach()).clone(),
            )
        )
