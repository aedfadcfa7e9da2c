"""EWC on LoRA: the penalty on the update of a frozen base weight.

The update is delta W = sum of scale B A over the active adapters. Its layers are recognised by what
PEFT's have (lora_A, lora_B, scaling, active_adapters), without importing PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax import reference
from fasttax._base import checks, dtensor
from fasttax._base.packed import Stored
from fasttax.ewc import ops
from fasttax.ewc.store import Entry

MARKS = ("lora_A", "lora_B", "scaling", "base_layer")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers by the name of the base weight they move."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if all(hasattr(module, mark) for mark in MARKS)
    }


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


def _is_dora(module: Any, adapter: str) -> bool:
    magnitudes = getattr(module, "lora_magnitude_vector", None) or {}
    used = getattr(module, "use_dora", None) or {}
    return adapter in magnitudes or used.get(adapter, False)


def refuse_unsupported(op: str, name: str, module: Any) -> None:
    """An error where the weight's change is not scale B A, or B A is not of the weight's shape."""
    base = _base(module)
    linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    known = isinstance(base, (nn.Linear, nn.Embedding)) or type(base).__name__ == "Conv1D"
    if not (known or linear):
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
        if _is_dora(module, adapter):
            raise checks.fail(
                op,
                "model",
                "plain LoRA",
                f"DoRA in {name} (adapter {adapter!r}): it rescales each row of the base weight by "
                "a learned magnitude, so that scale B A is not the weight's change and its penalty "
                "would be of another quantity",
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
class LoraHeld(Entry):
    """A base weight's Fisher and the layer whose update it weighs.

    `anchor` is the update to stay at, as (b, a) with b @ a, None for 0.
    """

    module: Any
    anchor: tuple[Tensor, Tensor] | None = None

    @property
    def base(self) -> Tensor:
        """The frozen weight that the update moves, as it lies (4-bit ones packed)."""
        return self.module.base_layer.weight

    def parameters(self) -> list[Tensor]:
        """The trainable factors."""
        return [
            p for adapter in _adapters(self.module) for p in self._own(adapter) if p.requires_grad
        ]

    def _own(self, adapter: str) -> tuple[Tensor, Tensor]:
        """An adapter's A and B, the model's own tensors."""
        m = self.module
        if _is_embedding(m):
            return m.lora_embedding_A[adapter], m.lora_embedding_B[adapter]
        return m.lora_A[adapter].weight, m.lora_B[adapter].weight

    def _update(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """(b, a, scale) with the adapter's update = scale * b @ a, of the weight's shape."""
        # FSDP2 shards the factors too; they are small
        a, b = (dtensor.whole(p) for p in self._own(adapter))
        scale = float(self.module.scaling[adapter])
        return (a.T, b.T, scale) if _is_turned(self.module) else (b, a, scale)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(b, a, scale) with the update minus the anchor = scale * b @ a, of the weight's shape.

        Several adapters and the anchor stand side by side. None where there is nothing.
        """
        updates = [self._update(adapter) for adapter in _adapters(self.module)]
        if self.anchor is not None:
            b, a = self.anchor
            updates.append((-b, a, 1.0))
        if len(updates) <= 1:
            return next(iter(updates), None)
        left = torch.cat([b * scale for b, _, scale in updates], 1)
        return left, torch.cat([a for _, a, _ in updates], 0), 1.0

    def penalty(self, strength: float) -> Tensor:
        """strength/2 * sum fisher * (update - anchor)^2, differentiable by the factors."""
        factors, device = self.factors(), self.base.device
        if factors is None:
            return torch.zeros((), device=device)
        b, a, scale = factors
        gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        fisher = self.fisher.to(device)
        return ops.lora_penalty(a, b, fisher.values, fisher.scales, scale, strength, gradient)[0]

    def add_grad_(self, strength: float, scale: float | Tensor, only: set[int] | None) -> Tensor:
        """Adds scale * d penalty to the factors' gradients; returns the penalty.

        `only`: the ids of the parameters to touch, None for all.
        """
        params = [p for p in self.parameters() if only is None or id(p) in only]
        with torch.enable_grad():
            value = self.penalty(strength)
            grads: Sequence[Tensor] = torch.autograd.grad(value, params) if params else ()
        for p, g in zip(params, grads, strict=True):
            if p.grad is None:
                p.grad = (g * scale).to(p.dtype)
            else:
                p.grad.add_((g * scale).to(p.grad.dtype))
        return value.detach()

    def consolidate(self, fisher: Stored) -> None:
        """Stay at the present update, weighed by `fisher`."""
        self.fisher, self.anchor = fisher, None
        now = self.factors()
        if now is not None:
            b, a, scale = now
            self.anchor = (
                reference.wide((b * scale).detach()).clone(),
                reference.wide(a.detach()).clone(),
            )
