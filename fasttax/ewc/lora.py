"""EWC on LoRA: the penalty on the update of a frozen base weight.

The update is delta W = sum of scale B A over the active adapters, as `factors` reads them;
`adapters` finds the layers and proves them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttax import reference
from fasttax._base import checks, dtensor, inner
from fasttax._base.gradient import gradient_of
from fasttax._base.packed import Stored
from fasttax.ewc import factors, ops
from fasttax.ewc.factors import CONVOLUTIONS, SAME_UPDATE, Factors
from fasttax.ewc.kronecker import Sides, low_rank, sides_for, tensors_of
from fasttax.ewc.store import Entry, has_moved

# LoraConfig's init_lora_weights that leave the base weight as it is and start from B = 0, or from
# any B and A: the base weight is then the anchor. Others (pissa, olora, corda, loftq, lora_ga, ...)
# take scale B A out of it, so that the anchor is the sum.
BASE_KEPT = (True, False, None, "gaussian", "eva", "mica")
SAMPLES = 256  # of a base weight, to see that it is the same


def moved_bases(model: nn.Module) -> set[str]:
    """The adapters whose initialisation took their update out of the base weights."""
    found: set[str] = set()
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            inits = {a: getattr(c, "init_lora_weights", True) for a, c in configs.items()}
            found |= {a for a, init in inits.items() if init not in BASE_KEPT}
    return found


def _is_dora(module: Any, adapter: str) -> bool:
    magnitudes = getattr(module, "lora_magnitude_vector", None) or {}
    used = getattr(module, "use_dora", None) or {}
    return adapter in magnitudes or used.get(adapter, False)


def _name_of(variant: Any) -> str:
    """A LoRA variant's: PEFT keeps it as a class or as an instance."""
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__


def refuse_unsupported(op: str, name: str, module: Any) -> None:
    """An error where the weight's change is not scale B A, or B A is not of the weight's shape."""
    base = module.base_layer
    linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    known = isinstance(base, (nn.Linear, nn.Embedding)) or type(base).__name__ == "Conv1D"
    convolved = isinstance(base, CONVOLUTIONS) and base.groups == 1
    if not (known or linear or convolved or factors.is_of_parameter(module)):
        groups = " in groups" if isinstance(base, CONVOLUTIONS) else ""
        raise checks.fail(
            op,
            "model",
            "LoRA on Linear, Conv1D, Embedding, convolutions without groups, or one parameter",
            f"{name}, a {type(base).__name__}{groups}",
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
    for adapter in factors.adapters_of(module):
        _refuse_variant(op, name, module, adapter)


def _refuse_variant(op: str, name: str, module: Any, adapter: str) -> None:
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
    variant = (getattr(module, "lora_variant", None) or {}).get(adapter)
    if variant is not None and _name_of(variant) not in SAME_UPDATE:
        raise checks.fail(
            op,
            "model",
            "plain LoRA, whose update is scale B A",
            f"{_name_of(variant)} in {name} (adapter {adapter!r})",
            "train with plain LoRA, or leave it out of the Fisher",
        )
    own_bias = None
    if not factors.is_embedding(module):
        own_bias = getattr(module.lora_B[adapter], "bias", None)
    if own_bias is not None:
        raise checks.fail(
            op,
            "model",
            "LoRA without a bias of its own",
            f"lora_bias in {name}",
            "train with lora_bias=False",
        )


def _some_of(weight: Tensor) -> Tensor:
    values = dtensor.whole(weight).reshape(-1)
    return values[:: max(1, values.numel() // SAMPLES)].clone()


def _codes(packed: Tensor) -> Tensor:
    """(16,) how often each 4-bit code stands in the bytes, in whatever order they lie."""
    by_byte = torch.bincount(packed.reshape(-1), minlength=256).view(16, 16)
    return by_byte.sum(0) + by_byte.sum(1)


@dataclass
class LoraHeld(Entry):
    """A base weight's Fisher and the layer whose update it weighs.

    `anchor` is the update to stay at, as (b, a) with b @ a, None for 0. `sides` are the Fisher's
    Kronecker factors, of the weight's rows and columns, where it has those in place of `fisher`.
    Under `offload` the Fisher stays in the host's memory and comes over for each penalty.
    """

    module: Any
    anchor: tuple[Tensor, Tensor] | None = None
    sides: Sides | None = None
    offload: str | None = None
    proven: set[tuple[str, ...]] = field(init=False)  # adapters, together, that were looked at
    # the layer's adapters then, active or not, each with its own modules or parameters; None: those
    # of the first look
    present_then: list[tuple[str, weakref.ref[Any]]] | None = field(init=False, default=None)
    base_sample: Tensor = field(init=False)  # of the base weight as it was made

    def __post_init__(self) -> None:
        self.proven = {tuple(self.adapters())}
        self.present_then = self._all_adapters()
        self.base_sample = self._sample()

    def over(self, module: Any) -> LoraHeld:
        """The same over a copy of the layer, which may be under construction."""
        twin = copy.copy(self)
        twin.module, twin.proven, twin.present_then = module, set(self.proven), None
        return twin

    # --- the layer -------------------------------------------------------------------------------

    def adapters(self) -> list[str]:
        """The active ones."""
        return factors.adapters_of(self.module)

    @property
    def base(self) -> Tensor:
        """The frozen weight that the update moves, as it lies (4-bit ones packed)."""
        weight: Tensor = factors.weight_of(self.module)
        return weight

    def parameters(self) -> list[Tensor]:
        """The trainable factors."""
        return [p for p in factors.named_factors(self.module).values() if p.requires_grad]

    def changed(self) -> bool:
        """Whether the layer's adapters are others than those looked at, or merged.

        One that is not active counts too: it may have moved the base weight as it came, and one of
        a name that was seen before may be of another sort.
        """
        merged = getattr(self.module, "merged", False)
        return bool(merged) or tuple(self.adapters()) not in self.proven or self._others()

    def _others(self) -> bool:
        now = self._all_adapters()
        if self.present_then is None:
            self.present_then = now
        then = self.present_then
        pairs = zip(then, now, strict=False)
        same = all(a[0] == b[0] and a[1]() is b[1]() is not None for a, b in pairs)
        return len(then) != len(now) or not same

    def _all_adapters(self) -> list[tuple[str, weakref.ref[Any]]]:
        found = []
        for kind in getattr(self.module, "adapter_layer_names", ()):
            held = getattr(self.module, kind, None)
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
                found += [(f"{kind}.{name}", weakref.ref(part)) for name, part in held.items()]
        return found

    def base_moved(self) -> bool:
        """Whether the base weight is another one than when this was made.

        An adapter that is added later may take its update out of it. Merging and unmerging round.
        """
        now = self._sample()
        then = self.base_sample.to(now.device)
        if factors.is_packed(self.base):
            return not torch.equal(now, then)
        bound = 1e-2 * float(then.abs().max()) if then.numel() else 0.0
        return bool(((now - then).abs() > bound).any())

    def _sample(self) -> Tensor:
        """Some values of the base weight; of one that lies in several tensors, bytes of each.

        Of 4-bit codes all, in no order: on a CPU bitsandbytes lays them out anew at the first
        forward without a gradient.
        """
        parts = inner.parts(self.base.detach())
        if inner.in_four_bits(self.base) or (len(parts) == 1 and parts[0].dtype == torch.uint8):
            return _codes(dtensor.whole(parts[0]).view(torch.uint8))
        samples = [_some_of(part) for part in parts]
        if len(samples) == 1:
            return samples[0]
        return torch.cat([s.reshape(-1).view(torch.uint8) for s in samples])

    def look_again(self, op: str) -> None:
        """Checks adapters that were not active before; `adapters.prove` is to follow.

        Raises:
            ValueError: the layer is merged, another adapter is no plain LoRA, or has moved the base
                weight.
        """
        refuse_unsupported(op, self.name, self.module)
        if self.base_moved():
            raise checks.fail(
                op,
                "ewc",
                f"the base weight that {self.name} had when the EWC was made",
                "another one: an adapter that was added later has taken its update out of it",
                "add the adapter first, and make the EWC then",
            )
        if self._others():
            self.proven, self.present_then = set(), self._all_adapters()
        self.proven.add(tuple(self.adapters()))

    # --- the update ------------------------------------------------------------------------------

    def _updates(self) -> list[Factors]:
        return factors.updates(self.module, factors.named_factors(self.module))

    def present(self, only: set[str] | None = None) -> tuple[Tensor, Tensor] | None:
        """The update as it is, (b, a) with b @ a, one adapter beside the other; None for none.

        Args:
            only: the adapters that count; the rest is 0.
        """
        updates = self._updates()
        if not updates:
            return None
        counts = [1.0 if only is None or a in only else 0.0 for a in self.adapters()]
        pairs = zip(updates, counts, strict=True)
        left = [reference.wide(b) * (scale * count) for (b, _, scale), count in pairs]
        right = [reference.wide(a) for _, a, _ in updates]
        return torch.cat(left, -1).detach().clone(), torch.cat(right, -2).detach().clone()

    def moved(self) -> Factors | None:
        """(b, a, scale) with the update minus the anchor = scale * b @ a, of the weight's shape.

        None where there is nothing. With B A - B0 A0 = (B - B0) A + B0 (A - A0) the difference is
        exactly 0 at an anchor of the same rank, and has no cancellation near it.
        """
        updates = self._updates()
        if self.anchor is None and len(updates) <= 1:
            return next(iter(updates), None)
        left = [reference.wide(b) * scale for b, _, scale in updates]
        right = [reference.wide(a) for _, a, _ in updates]
        if self.anchor is None:
            return torch.cat(left, -1), torch.cat(right, -2), 1.0
        b0, a0 = self.anchor
        if not updates:
            return -b0, a0, 1.0
        b, a = torch.cat(left, -1), torch.cat(right, -2)
        if b.shape != b0.shape:
            return torch.cat((b, -b0), -1), torch.cat((a, a0), -2), 1.0
        return torch.cat((b - b0, b0), -1), torch.cat((a, a - a0), -2), 1.0

    # --- the penalty -----------------------------------------------------------------------------

    def follow(self) -> None:
        """Goes where the base weight is, for good: trainers move their models."""
        device = self.base.device
        home = device if self.offload is None else torch.device("cpu")
        with torch.inference_mode(False):
            if has_moved(self.fisher.values, home):
                self.fisher = self.fisher.to(home)
            if self.sides is not None and has_moved(self.sides[0], device):
                self.sides = sides_for(self.base, self.sides)
            if self.anchor is not None and has_moved(self.anchor[0], device):
                b0, a0 = self.anchor
                self.anchor = b0.to(device), a0.to(device)

    def penalty(self, strength: float) -> Tensor:
        """strength/2 * sum fisher * (update - anchor)^2, differentiable by the factors."""
        self.follow()
        moved = self.moved()
        if moved is None:
            return torch.zeros((), dtype=torch.float32, device=self.base.device)
        b, a, scale = moved
        if self.sides is not None:
            return 0.5 * strength * low_rank(b, a, scale, sides_for(self.base, self.sides))
        gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        values = [
            ops.lora_penalty(one_a, one_b, f.values, f.scales, scale, strength, gradient)[0]
            for one_a, one_b, f in self._matrices(a, b, self.fisher.to(self.base.device))
        ]
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def _matrices(
        self, a: Tensor, b: Tensor, fisher: Stored
    ) -> Iterator[tuple[Tensor, Tensor, Stored]]:
        """(a, b, fisher) of each matrix that the factors multiply to."""
        if b.dim() == 3:
            return zip(a.unbind(), b.unbind(), fisher.unbind(), strict=True)
        shape = factors.matrix_shape(self.module)
        return iter([(a, b, Stored(fisher.values.reshape(shape), fisher.scales))])

    def add_grad_(
        self,
        strength: float,
        scale: float,
        only: set[int] | None,
        times: Tensor | None,
        uphill: Collection[int],
    ) -> Tensor:
        """Adds scale * times * d penalty to the factors' gradients; returns the penalty.

        `only`: the ids of the parameters to touch, None for all; `uphill`: of those that it is
        subtracted from.
        """
        params = [p for p in self.parameters() if only is None or id(p) in only]
        with torch.enable_grad():
            value = self.penalty(strength)
            grads: Sequence[Tensor] = torch.autograd.grad(value, params) if params else ()
        for p, g in zip(params, grads, strict=True):
            pull = g * (-scale if id(p) in uphill else scale)
            if times is not None:
                pull = pull * ops.beside(times.detach().reshape(()), g.device)
            grad = gradient_of(p)
            grad.add_(pull.to(grad.dtype))
        return value.detach()

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it."""
        out = self.fisher.tensors(self.name)
        if self.sides is not None:
            out = tensors_of(self.name, self.sides)
        if self.anchor is not None:
            out[f"lora_b.{self.name}"], out[f"lora_a.{self.name}"] = self.anchor
        return out

    def stay(self) -> None:
        """The anchor becomes the present update."""
        self.anchor = self.present()

    # --- the anchor ------------------------------------------------------------------------------

    def start_here(self, only: set[str] | None) -> None:
        """Stay at the present update; of adapters other than `only`, where given, at 0."""
        present = self.present(only)
        moved = present is not None and bool(present[0].any()) and bool(present[1].any())
        self.anchor = present if moved else None

    def start_at(self, op: str, weight: Tensor) -> None:
        """Stay at the update that brings the base weight to `weight`: none, or the present one.

        Raises:
            ValueError: it is neither; another one has no low rank.
        """
        if factors.is_packed(self.base):
            raise checks.fail(
                op,
                "anchor",
                f"none for {self.name}, whose base weight is packed and can't be compared with it",
                weight,
                "leave that name out of anchor=: the update is then held at 0",
            )
        base = dtensor.whole(self.base.detach())
        start = dtensor.whole(weight.detach()).to(base.device)
        # one unit in the last place of each; factors are rounded to the base's dtype as it is
        eps = torch.finfo(base.dtype).eps
        bound = eps * base.double().abs()
        bound += torch.finfo(start.dtype).eps * start.double().abs()
        distance = start.double() - base.double()
        if bool((distance.abs() <= bound).all()):
            self.anchor = None
            return
        now = self.present()
        if now is not None:
            b, a = (t.double() for t in now)
            bound += max(eps, 1e-6) * (b.abs() @ a.abs()).reshape(base.shape)
            if bool(((distance - (b @ a).reshape(base.shape)).abs() <= bound).all()):
                self.anchor = now
                return
        raise checks.fail(
            op,
            "anchor",
            f"{self.name} as its base weight is, or as the adapter makes it at present",
            f"one up to {float(distance.abs().max()):.3g} away from the base weight",
            "the update that leads to it has no low rank: make the EWC before the first step, or "
            "leave that name out of anchor= to hold the weight where it is",
        )
