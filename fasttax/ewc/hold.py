"""A Hold: parameters with Fisher, anchor and strength, and the three ways to apply the penalty.

EWC makes one; attach, files and AdamWEWC work on it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, dtensor
from fasttax._base.gradient import gradient_of
from fasttax._base.library import no_second_derivative
from fasttax._base.modes import compiling
from fasttax.ewc import ops
from fasttax.ewc.adapters import prove
from fasttax.ewc.drift import Drift
from fasttax.ewc.factors import weight_shape
from fasttax.ewc.kronecker import KroneckerHeld, Sides
from fasttax.ewc.lora import LoraHeld
from fasttax.ewc.store import Entry, Held, Item, Lists, Store
from fasttax.ewc.watch import Watch

Part = tuple[dtensor.Key, Tensor]  # of a sum: what it is summed over, and this rank's share


@dataclass(eq=False)
class Hold:
    """strength/2 * sum fisher * (theta - anchor)^2 over the parameters of `store` and `lora`.

    And of `kronecker`, whose Fisher is a product of factors in place of a weight for each value.
    `storage` and `anchor_dtype` say how new Fishers and anchors are encoded; `metadata` is where
    the Fisher comes from; `watch` sees whether the parameters are still the model's.
    """

    strength: float
    storage: str
    anchor_dtype: torch.dtype | str | None
    store: Store
    watch: Watch
    lora: list[LoraHeld] = field(default_factory=list)
    kronecker: list[KroneckerHeld] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        held = [h.theta for h in self.store.held.values()]
        held += [h.theta for h in self.kronecker]
        lora = f", {len(self.lora)} LoRA updates" if self.lora else ""
        factors = f", {len(self.kronecker)} by Kronecker factors" if self.kronecker else ""
        return (
            f"EWC({len(held)} tensors, {sum(t.numel() for t in held):,} parameters{factors}"
            f"{lora}, "
            f"strength={self.strength:g}, storage={self.storage})"
        )

    # --- copies ------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Hold:
        """The same over a copy of the model that is being made in the same call.

        Fisher and anchor are never written in place, so that both share them.

        Raises:
            TypeError: the model is not copied before it: a copy would act on parameters that no
                model has.
        """
        held = self.watch.held.values()
        modules = [h.module for h in self.lora]
        if any(id(x) not in memo for x in (self.watch.model, *held, *modules)):
            raise TypeError(
                "EWC: copy.deepcopy: expected the model in the same copy and before it, got the "
                "EWC alone; use copy.deepcopy((model, ewc)), or ewc.on(copied_model)"
            )
        copied = {name: memo[id(theta)] for name, theta in self.watch.held.items()}
        twin = Hold(
            self.strength,
            self.storage,
            self.anchor_dtype,
            self.store.over({id(theta): memo[id(theta)] for theta in held}),
            self.watch.on(memo[id(self.watch.model)], copied),
            [h.over(memo[id(h.module)]) for h in self.lora],
            [h.over(memo[id(h.theta)]) for h in self.kronecker],
            dict(self.metadata),
        )
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses pickling, which would act on copies of the parameters when it is read.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "EWC: pickle: expected state_dict() or save(path), got the EWC itself, which is bound "
            "to the live parameters of its model; read them with EWC.load(path, model), or with "
            "load_state_dict on an EWC of the model"
        )

    # --- what it holds -----------------------------------------------------------------------

    def check(self, op: str) -> None:
        """An error where what is held is not what the model computes with.

        Raises:
            ValueError: a parameter was replaced, or an adapter is on that can't be held.
        """
        if compiling():  # the trace would guard on every module
            return
        self.watch.check(op)
        for entry in self.store.held.values():
            check_width(op, "ewc", entry.name, entry.theta, entry.anchor)
        changed = [h for h in self.lora if h.changed()]
        for h in changed:
            h.look_again(op)
        prove(op, changed)

    def fill(self, items: Sequence[Item]) -> None:
        """Holds these parameters, and no others, in a store of their own.

        The items may read the store that was there before.
        """
        store = Store(self.store.offload)
        store.fill(items, self.storage, self.anchor_dtype)
        self.store = store

    def entries(self) -> list[Entry]:
        """Everything that has a Fisher of a weight for each value."""
        return [*self.store.held.values(), *(h for h in self.lora if h.sides is None)]

    def factored(self) -> dict[str, Sides]:
        """By name the Kronecker factors of everything that has them."""
        out = {h.name: h.sides for h in self.kronecker}
        return out | {h.name: h.sides for h in self.lora if h.sides is not None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights with Kronecker factors, by name."""
        out = {h.name: tuple(h.theta.shape) for h in self.kronecker}
        return out | {h.name: weight_shape(h.module) for h in self.lora if h.sides is not None}

    def names(self) -> list[str]:
        """Of everything held."""
        held = [h.name for h in self.kronecker] + [h.name for h in self.lora]
        return [*self.store.held, *held]

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, frozen ones included; of LoRA updates the trainable factors."""
        out = {name: h.theta for name, h in self.store.held.items()}
        out |= {h.name: h.theta for h in self.kronecker}
        for h in self.lora:
            out |= {f"{h.name} (LoRA {i})": p for i, p in enumerate(h.parameters())}
        return out

    def _like(self) -> Tensor:
        """A tensor where sums are to be."""
        for h in self.store.held.values():
            return dtensor.local(h.theta.detach())
        for weight in self.kronecker:
            return dtensor.local(weight.theta.detach())
        return torch.empty(0, dtype=torch.float32, device=self.lora[0].base.device)

    # --- the three ways to apply it ----------------------------------------------------------

    def total(self, parts: Sequence[Part]) -> Tensor:
        """The sum of the parts over all ranks; over sharded parameters a collective."""
        return dtensor.total(parts, self.store.meshes(), self._like())

    def penalty(self) -> Tensor:
        """The value, 0-d, differentiable by the trainable parameters."""
        self.check("EWC.penalty")
        parts: list[Part] = [(None, h.penalty(self.strength)) for h in self.lora]
        parts += [(None, h.penalty(self.strength)) for h in self._weights(None)]
        blocks = self.store.blocks()
        if self.store.offload is not None and torch.is_grad_enabled():
            for block in blocks:
                params = [dtensor.local(h.theta) for h in block]
                parts.append(
                    (dtensor.key_of(block[0].theta), _Streamed.apply(self, block, *params))
                )
        else:
            parts += [(x.key, self.value_of(x)) for x in self.store.stream(blocks)]
        return self.total(parts)

    def value_of(self, x: Lists) -> Tensor:
        """The penalty of one block."""
        return ops.penalty(x.params, x.anchors, x.fishers, x.scales, self.strength)

    def add_grad_(
        self, scale: float | Tensor = 1.0, only: Sequence[Tensor] | None = None
    ) -> Tensor:
        """p.grad += scale * strength * fisher * (theta - anchor); returns the penalty."""
        if isinstance(scale, Tensor):
            return self.total(self.add_grad_parts_(1.0, only, scale))
        return self.total(self.add_grad_parts_(scale, only))

    def add_grad_parts_(
        self,
        scale: float,
        only: Sequence[Tensor] | None,
        times: Tensor | None = None,
        uphill: Collection[int] = (),
    ) -> list[Part]:
        """`add_grad_` without the sum: this rank's parts of the penalty, for `total`.

        `times`, one value wherever it lies, multiplies `scale`. `uphill`: the ids of those of
        `only` whose optimizer maximizes, so that the gradient is subtracted.
        """
        self.check("EWC.add_grad_")
        if times is not None:
            one_value("EWC.add_grad_", "scale", times, times)
        touched = None if only is None else {id(p) for p in only}
        for name, p in self.parameters().items():
            if touched is None or id(p) in touched:
                refuse_lost("EWC.add_grad_", name, p)
                refuse_sparse("EWC.add_grad_", name, p)
        parts = self.add_product_grad_parts_(scale, only, times, uphill)
        with torch.no_grad():
            for sign, some in _by_sign(only, uphill):
                for x in self.store.stream(self.store.blocks(some)):
                    parts.append((x.key, self.add_grad_of_(x, sign * scale, times)))
        return parts

    def add_product_grad_parts_(
        self,
        scale: float,
        only: Sequence[Tensor] | None,
        times: Tensor | None,
        uphill: Collection[int],
    ) -> list[Part]:
        """`add_grad_parts_` of the LoRA updates and of weights with Kronecker factors.

        One call of all parameters that a step moves: the gradient of one factor is by the others
        as they are before it.
        """
        chosen = None if only is None else {id(p) for p in only}
        moved = [
            h for h in self.lora if chosen is None or any(id(p) in chosen for p in h.parameters())
        ]
        parts: list[Part] = [
            (None, h.add_grad_(self.strength, scale, chosen, times, uphill)) for h in moved
        ]
        with torch.no_grad():
            for h in self._weights(only):
                sign = -1.0 if id(h.theta) in uphill else 1.0
                parts.append((None, h.add_grad_(self.strength, sign * scale, times)))
        return parts

    def _weights(self, only: Sequence[Tensor] | None) -> list[KroneckerHeld]:
        """The trainable weights with factors, of `only` where given."""
        chosen = None if only is None else {id(p) for p in only}
        return [
            h
            for h in self.kronecker
            if h.theta.requires_grad and (chosen is None or id(h.theta) in chosen)
        ]

    def add_grad_of_(self, x: Lists, scale: float, times: Tensor | None = None) -> Tensor:
        """`add_grad_` of one block, called without grad mode; a missing p.grad is created."""
        grads = [dtensor.local(gradient_of(p)) for p in x.owners]
        factor = None if times is None else one_value("EWC.add_grad_", "scale", times, grads[0])
        with ops.contiguous({"grads": grads}) as flat:
            return ops.add_grad_(
                x.params,
                flat["grads"],
                x.anchors,
                x.fishers,
                x.scales,
                self.strength,
                scale,
                factor,
            )

    @torch.no_grad()
    def prox_(
        self, lr: float, only: Sequence[Tensor] | None = None, times: Tensor | None = None
    ) -> None:
        """Moves theta to anchor + (theta - anchor) / (1 + lr * strength * fisher).

        `times`, one value >= 0 wherever it lies, multiplies `lr`; nothing moves at 0.
        """
        op = "EWC.prox_"
        lr = checks.number(op, "lr", lr, low=0)
        self.refuse_prox_of_lora(op)
        self.check(op)
        touched = None if only is None else {id(p) for p in only}
        for name, p in self.parameters().items():
            if touched is None or id(p) in touched:
                refuse_copies(op, name, p)
        step = min(lr * self.strength, sys.float_info.max)  # finite: times a Fisher of 0 it is 0
        for x in self.store.stream(self.store.blocks(only)):
            params = [p.detach() for p in x.params]
            factor = None if times is None else one_value(op, "lr", times, params[0])
            with ops.contiguous({"params": params}) as flat:
                ops.prox_(flat["params"], x.anchors, x.fishers, x.scales, step, factor)
        for h in self._weights(only):
            h.prox_(step, times)

    def refuse_prox_of_lora(self, op: str) -> None:
        """An error where LoRA updates are held."""
        if self.lora:
            raise checks.fail(
                op,
                "mode",
                "'grad' (or .penalty(), .add_grad_()) for LoRA updates",
                "a proximal step",
                "the penalty on B A has no closed form in A and B",
            )

    # --- looking -----------------------------------------------------------------------------

    @torch.no_grad()
    def drift(self) -> Drift:
        """Sum fisher * (theta - anchor)^2 by parameter; over sharded ones a collective."""
        self.check("EWC.distance")
        found = {h.name: h.penalty(2.0) for h in self.lora}
        found |= {h.name: h.value(2.0) for h in self.kronecker}
        shares: dict[dtensor.Key, dict[str, Tensor]] = {}
        blocks = self.store.blocks(frozen=True)
        for block, x in zip(blocks, self.store.stream(blocks), strict=True):
            each = ops.penalties(x.params, x.anchors, x.fishers, x.scales, 2.0)
            shares.setdefault(x.key, {}).update(zip((h.name for h in block), each, strict=True))
        for key, values in shares.items():
            summed = dtensor.over_ranks(torch.stack(list(values.values())), key)
            found |= dict(zip(values, summed.unbind(), strict=True))
        return Drift({name: found[name] for name in self.names()})


def _by_sign(
    only: Sequence[Tensor] | None, uphill: Collection[int]
) -> list[tuple[float, Sequence[Tensor] | None]]:
    """`only` in two: what the gradient is added to, and what it is subtracted from."""
    if only is None or not uphill:
        return [(1.0, only)]
    down, up = ([p for p in only if (id(p) in uphill) is turned] for turned in (False, True))
    return [(1.0, down), (-1.0, up)]


def one_value(op: str, argument: str, value: Tensor, like: Tensor) -> Tensor:
    """One value as ops take it beside `like`: float32 or float64 on its device, with no sync.

    Raises:
        ValueError: it has not one element.
    """
    if value.numel() != 1:
        raise checks.fail(op, argument, "a number, or a tensor of one element", value)
    value = value.detach()
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    return ops.beside(value, like.device)


def check_width(op: str, argument: str, name: str, theta: Tensor, anchor: Tensor) -> None:
    """An error where a parameter was moved to float64, or from it, since it is held."""
    if (theta.dtype == torch.float64) != (anchor.dtype == torch.float64):
        raise checks.fail(
            op,
            argument,
            "parameters of float64, or of less, as they were when the EWC was made",
            f"{name} in {theta.dtype}",
            "make it anew on the model as it is: EWC(model, ewc.fisher, strength=ewc.strength, "
            "anchor=ewc.anchor)",
        )


def refuse_lost(op: str, name: str, p: Tensor) -> None:
    """An error where p.grad is not what is stepped by: DeepSpeed's ZeRO takes it as it comes.

    On every rank, also those whose share has nothing of the parameter: _hp_mapping is None there.
    """
    if under_zero(p):
        raise checks.fail(
            op,
            f"the gradient of {name}",
            "one that an optimizer reads from p.grad",
            "one that DeepSpeed's ZeRO takes away within the backward",
            "use fasttax.integrations.deepspeed.attach(engine, ewc), or in a Trainer "
            "fasttax.integrations.transformers.attach(trainer, ewc=ewc)",
        )


def under_zero(p: Tensor) -> bool:
    """Whether DeepSpeed steps a copy of the parameter, in float32 and in shares."""
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


def refuse_copies(op: str, name: str, p: Tensor) -> None:
    """An error where the parameter is written over by the copy that DeepSpeed steps."""
    if under_zero(p):
        raise checks.fail(
            op,
            name,
            "a parameter that an optimizer steps in place",
            "one that DeepSpeed's ZeRO writes over from a copy of its own at the next step",
            "use the gradient's mode: fasttax.integrations.deepspeed.attach(engine, ewc)",
        )


def refuse_sparse(op: str, name: str, p: Tensor) -> None:
    """An error where a parameter has a sparse gradient, which the penalty's dense one fills."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise checks.fail(
            op,
            f"the gradient of {name}",
            "a dense one",
            p.grad,
            "build its Embedding with sparse=False, or leave it out of the Fisher",
        )


class _Streamed(torch.autograd.Function):
    """A block's penalty that keeps no copy of its Fisher and anchor between forward and backward.

    Both bring them over anew.
    """

    @staticmethod
    def forward(ctx: Any, hold: Hold, block: list[Held], *params: Tensor) -> Tensor:
        ctx.hold, ctx.block = hold, block
        ctx.save_for_backward(*params)
        (value,) = [hold.value_of(x) for x in hold.store.stream([block])]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        checks.no_tangent("EWC.penalty", "the gradient of its result", grad)
        params = [p.detach().contiguous() for p in ctx.saved_tensors]
        (pulls,) = [
            torch.ops.fasttax.ewc_penalty_backward(
                grad.detach(), params, x.anchors, x.fishers, x.scales, ctx.hold.strength
            )
            for x in ctx.hold.store.stream([ctx.block])
        ]
        return None, None, *no_second_derivative(pulls, "EWC.penalty")
