"""EWC on a model: hold the weights that matter for what it knows, let the rest move.

    penalty(theta) = strength/2 * sum fisher * (theta - anchor)^2

Kirkpatrick et al. 2017 (arXiv:1612.00796); online consolidation: Schwarz et al. 2018
(arXiv:1805.06370), Huszar 2018 (arXiv:1712.03847). The arithmetic is in `fasttax.functional.ewc`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, dtensor
from fasttax.ewc import files, ops
from fasttax.ewc.attach import Handle, attach, during_backward
from fasttax.ewc.drift import Drift
from fasttax.ewc.fit import Target, check_hash, differences, match, pick_anchor, survey
from fasttax.ewc.lora import LoraHeld
from fasttax.ewc.store import Item, Kept, Lists, Store, checked_anchor_dtype, encode_for
from fasttax.fisher.estimate import STORAGES, FisherEstimate

NORMALIZE = (None, "mean", "max")
OFFLOAD = (None, "cpu")


class EWC:
    """The EWC penalty of a model towards the weights it has now (or `anchor`).

    Args:
        model: the model to hold. Its parameters are read live; tied weights count once; frozen ones
            cost nothing. Names are matched without what DDP, torch.compile, activation
            checkpointing and PEFT insert. FSDP2 (DTensor) parameters are held by their local
            shards. A frozen weight under a PEFT LoRA layer is held by its update: the penalty is on
            delta W = scale B A summed over the active adapters, weighed by the base weight's
            Fisher, with gradients to A and B.
        fisher: a FisherEstimate, the path of one, or a mapping of parameter names to tensors >= 0.
            Parameters that it does not name (new heads, say) are left free; a name that the model
            lacks is an error.
        strength: finite, >= 0.
        anchor: mapping of names to tensors (a state_dict); None copies the present weights. Always
            a copy. A LoRA update's anchor is 0.
        storage: of the Fisher: "fp32", "bf16" or "u8log" (4, 2, 1 bytes a parameter).
        anchor_dtype: of the anchor: None keeps each parameter's dtype; a torch.dtype; "bf16+8", for
            float32 weights, is bfloat16 with 8 more bits (3 bytes, relative error < 1.6e-5).
            bfloat16 alone is exact only for bfloat16 checkpoints: at weight 2e-2 and drift 1e-4 its
            rounding is a third of the drift.
        offload: None, or "cpu" to keep Fisher and anchor off the parameters' device: beside a GPU
            in pinned host memory, copied over block by block while the block before is worked on;
            for parameters on the CPU in a memory-mapped file in the temporary folder (TMPDIR), read
            block by block and dropped again, so that they take no memory of the process.
        clamp: upper bound on Fisher values, or a pair (low, high).
        normalize: None, "mean" or "max": divide the Fisher by its overall mean or maximum, after
            clamping.
        rename: the Fisher's names -> the model's, for parameters or whole modules that were renamed
            since.

    Raises:
        ValueError, TypeError: names, shapes, values or options do not fit; name and shape
            differences come in one list. DoRA, FSDP1 and DeepSpeed ZeRO-3 are refused with the
            reason. (ZeRO-1 and 2: `loss + ewc.penalty()`.)
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherEstimate | str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        strength: float,
        anchor: Mapping[str, Tensor] | None = None,
        storage: str = "fp32",
        anchor_dtype: torch.dtype | str | None = None,
        offload: str | None = None,
        clamp: float | Sequence[float] | None = None,
        normalize: str | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        op = "EWC"
        if not isinstance(model, nn.Module):
            raise checks.fail(op, "model", "a torch.nn.Module", model, error=TypeError)
        self.strength = checks.number(op, "strength", strength, low=0)
        self.storage = checks.choice(op, "storage", storage, STORAGES)
        if offload not in OFFLOAD:
            raise checks.fail(op, "offload", "None or 'cpu'", repr(offload))
        if normalize not in NORMALIZE:
            raise checks.fail(op, "normalize", "None, 'mean' or 'max'", repr(normalize))
        self._anchor_dtype = checked_anchor_dtype(op, anchor_dtype)
        if isinstance(fisher, (str, os.PathLike)):
            fisher = FisherEstimate.load(fisher)
        if not isinstance(fisher, Mapping):
            raise checks.fail(
                op,
                "fisher",
                "a FisherEstimate, a path, or a mapping of parameter names to tensors",
                fisher,
                error=TypeError,
            )
        targets = match(op, model, _shapes(fisher), rename)
        anchors = {} if anchor is None else pick_anchor(op, anchor, targets)
        check_hash(op, fisher, targets, anchors)
        recipe = survey(op, fisher, [t.given for t in targets], clamp, normalize)
        self.metadata: dict[str, Any] = dict(getattr(fisher, "metadata", {}))
        self._fill(
            targets,
            offload,
            lambda t: recipe(fisher[t.given]),
            lambda t: anchors.get(t.name, t.theta),
        )

    def _fill(
        self,
        targets: Sequence[Target],
        offload: str | None,
        fisher_of: Callable[[Target], Tensor],
        anchor_of: Callable[[Target], Tensor],
    ) -> None:
        self.offload = offload
        self._lora = [
            LoraHeld(t.name, encode_for(t.theta, fisher_of(t), self.storage), t.lora)
            for t in targets
            if t.lora is not None
        ]
        self._store = Store(offload)

        def maker(t: Target) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: (fisher_of(t), anchor_of(t).detach().clone())

        items = [Item(t.name, t.theta, maker(t)) for t in targets if t.lora is None]
        self._store.fill(items, self.storage, self._anchor_dtype)

    def __repr__(self) -> str:
        held = sum(h.theta.numel() for h in self._store.held.values())
        lora = f", {len(self._lora)} LoRA updates" if self._lora else ""
        return f"EWC({len(self._store.held)} tensors, {held:,} parameters{lora}, strength={self.strength:g}, storage={self.storage})"

    # --- what it holds -----------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """The parameters held, by name, frozen ones included.

        Of LoRA updates the trainable factors.
        """
        out = {name: h.theta for name, h in self._store.held.items()}
        return out | {
            f"{h.name} (LoRA {i})": p for h in self._lora for i, p in enumerate(h.parameters())
        }

    @property
    def anchor(self) -> dict[str, Tensor]:
        """By name, as floats; this rank's shards of sharded parameters."""
        return {name: h.decoded_anchor() for name, h in self._store.held.items()}

    @property
    def fisher(self) -> FisherEstimate:
        """As stored; this rank's shards of sharded parameters."""
        return FisherEstimate({h.name: h.fisher for h in self.kept()}, self.metadata)

    def kept(self) -> list[Kept]:
        return [*self._store.held.values(), *self._lora]

    def _like(self) -> Tensor:
        """A tensor where sums are to be."""
        if self._store.held:
            return dtensor.local(next(iter(self._store.held.values())).theta.detach())
        return self._lora[0].module.base_layer.weight.new_empty(0, dtype=torch.float32)

    def _total(self, parts: list[tuple[dtensor.Key, Tensor]]) -> Tensor:
        return dtensor.total(parts, self._store.meshes(), self._like())

    # --- the three ways to apply it ------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """strength/2 * sum fisher * (theta - anchor)^2, 0-d, differentiable by the trainable
        parameters.

        Over sharded parameters a collective: every rank calls it. Each rank's gradient is that of
        its own shards.
        """
        parts: list[tuple[dtensor.Key, Tensor]] = [
            (None, h.penalty(self.strength)) for h in self._lora if h.parameters()
        ]
        blocks = self._store.blocks()
        if self.offload is not None and torch.is_grad_enabled():
            parts += [
                (
                    dtensor.key_of(b[0].theta),
                    _Streamed.apply(self, b, *[dtensor.local(h.theta) for h in b]),
                )
                for b in blocks
            ]
        else:
            parts += [
                (x.key, ops.penalty(x.params, x.anchors, x.fishers, x.scales, self.strength))
                for x in self._store.stream(blocks)
            ]
        return self._total(parts)

    def add_grad_(
        self, scale: float | Tensor = 1.0, *, only: Sequence[Tensor] | None = None
    ) -> Tensor:
        """p.grad += scale * strength * fisher * (theta - anchor) in one pass and with no graph.

        Returns the penalty, no sync.

        Args:
            scale: multiplies the gradient, not the value returned. A 0-d tensor (a GradScaler's
                scale on a GPU) is used without a sync.
            only: the parameters to touch; None is all trainable ones. A missing p.grad is created.

        Over sharded parameters a collective for the value: every rank calls it.
        """
        return self._total(self._add_grad_(self._store.blocks(only), scale, only))

    def _add_grad_(
        self, blocks: list[Any], scale: float | Tensor, only: Sequence[Tensor] | None
    ) -> list[tuple[dtensor.Key, Tensor]]:
        chosen = None if only is None else {id(p) for p in only}
        parts = [
            (None, h.add_grad_(self.strength, scale, chosen))
            for h in self._lora
            if chosen is None or chosen & {id(p) for p in h.parameters()}
        ]
        with torch.no_grad():
            return parts + [(x.key, self._add_block_(x, scale)) for x in self._store.stream(blocks)]

    def _add_block_(self, x: Lists, scale: float | Tensor) -> Tensor:
        for p in x.owners:
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
        grads = [dtensor.local(p.grad) for p in x.owners]
        params = [p.detach() for p in x.params]
        if not isinstance(scale, Tensor):
            return ops.add_grad_(
                params, grads, x.anchors, x.fishers, x.scales, self.strength, scale
            )
        pulls = torch.ops.fasttax.ewc_penalty_backward(
            scale.reshape(()).float(), params, x.anchors, x.fishers, x.scales, self.strength
        )
        torch._foreach_add_(grads, pulls)
        return ops.penalty(params, x.anchors, x.fishers, x.scales, self.strength)

    @torch.no_grad()
    def prox_(self, lr: float, *, only: Sequence[Tensor] | None = None) -> None:
        """Theta <- anchor + (theta - anchor) / (1 + lr * strength * fisher).

        Stable for any strength.

        The proximal step of the penalty in the Euclidean metric at step size lr; call it after the
        optimizer's step. (In Adam's metric: AdamWEWC.) LoRA updates have none: the penalty is not
        separable in A and B.
        """
        lr = checks.number("EWC.prox_", "lr", lr, low=0)
        self.refuse_prox_of_lora("EWC.prox_")
        for x in self._store.stream(self._store.blocks(only)):
            ops.prox_(
                [p.detach() for p in x.params], x.anchors, x.fishers, x.scales, lr * self.strength
            )

    def refuse_prox_of_lora(self, op: str) -> None:
        if self._lora:
            raise checks.fail(
                op,
                "mode",
                "'grad' (or .penalty(), .add_grad_()) for LoRA updates",
                "a proximal step",
                "the penalty on B A has no closed form in A and B",
            )

    def attach(self, optimizer: Any, mode: str = "grad", every: int = 1) -> Handle:
        """Applies the penalty at every optimizer step.

        Returns a handle with .remove() (also a context manager).

        mode "grad" adds the gradient before each step (it is not part of a clipping done earlier),
        "prox" runs `prox_` with each group's lr after it. `every=k` acts on every k-th step with k
        times the weight. Wrapped optimizers (with an `.optimizer` inside, as Accelerate's) are
        unwrapped; one that is no torch.optim.Optimizer but has param_groups and step() is wrapped
        itself, until .remove(). Under `maximize` the gradient is subtracted, so that it pulls to
        the anchor all the same.

        Raises:
            ValueError: a wrong mode or `every`, or an optimizer that holds none of the parameters
                covered here.
        """
        return attach(self, optimizer, mode, every)

    def during_backward(self, scale: float = 1.0) -> Handle:
        """Adds the gradient within the backward pass, block by block as the blocks' own gradients
        are complete, until .remove().

        For offload="cpu": while the pass goes on the next block is already under way. The penalty
        is then part of what is clipped. With k micro-batches a step pass scale=1/k (each backward
        adds once); with a GradScaler its scale. `handle.penalty` is the last pass's value (of this
        rank's shards).
        """
        return during_backward(self, scale)

    # --- looking and keeping -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def distance(self) -> Drift:
        """How far the weights have moved, weighed by the Fisher.

        Sum fisher * (theta - anchor)^2, in total, by parameter, module and layer.

        0-d tensors, no sync; over sharded parameters a collective.
        """
        per = {h.name: h.penalty(2.0) for h in self._lora}
        local: dict[dtensor.Key, dict[str, Tensor]] = {}
        blocks = self._store.blocks(frozen=True)
        for block, x in zip(blocks, self._store.stream(blocks), strict=True):
            for i, h in enumerate(block):
                value = ops.penalty(
                    [x.params[i]], [x.anchors[i]], [x.fishers[i]], x.scales[i : i + 1], 2.0
                )
                local.setdefault(x.key, {})[h.name] = value
        for key, values in local.items():
            summed = dtensor.over_ranks(torch.stack(list(values.values())), key)
            per |= dict(zip(values, summed.unbind(), strict=True))
        return Drift({h.name: per[h.name] for h in self.kept()})

    @torch.no_grad()
    def consolidate(
        self, fisher: FisherEstimate | Mapping[str, Tensor], decay: float = 1.0
    ) -> None:
        """Online EWC: anchor <- a copy of the present weights (at which `fisher` was estimated), F
        <- decay * F + fisher.

        The metadata's model_hash becomes that of the new anchor. A LoRA update's anchor becomes the
        present update (the penalty there is then 0 but for rounding: it is the norm of a difference
        of products).
        """
        op = "EWC.consolidate"
        decay = checks.number(op, "decay", decay, low=0)
        targets = [Target(h.name, h.name, h.theta, None) for h in self._store.held.values()]
        targets += [
            Target(h.name, h.name, h.module.base_layer.weight, h.module) for h in self._lora
        ]
        given = _shapes(fisher)
        wrong = [f"{n}: not held here" for n in given if n not in {t.name for t in targets}]
        wrong += [f"{t.name}: missing" for t in targets if t.name not in given]
        wrong += [
            f"{t.name}: shape {tuple(given[t.name].shape)}, the model has {t.shape}"
            for t in targets
            if t.name in given and tuple(given[t.name].shape) != t.shape
        ]
        differences(op, "fisher", wrong)
        check_hash(op, fisher, targets, {})
        survey(op, fisher, [t.name for t in targets], None, None)
        old, lora = self._store.held, {h.name: h for h in self._lora}

        def summed(t: Target) -> Tensor:
            part = decay * old[t.name].fisher.decode() + dtensor.part_of(
                fisher[t.name].detach().to(old[t.name].fisher.values.device), t.theta
            )
            return dtensor.as_theta(part, t.theta)

        for h in lora.values():
            h.consolidate(
                encode_for(
                    h.module.base_layer.weight,
                    decay * h.fisher.decode() + fisher[h.name].detach().to(h.fisher.values.device),
                    self.storage,
                )
            )
        store = Store(self.offload)
        items = [
            Item(t.name, t.theta, lambda t=t: (summed(t), t.theta.detach().clone()))
            for t in targets
            if t.lora is None
        ]  # type: ignore[misc]
        store.fill(items, self.storage, self._anchor_dtype)
        self._store = store
        counts: dict[str, Any] = {
            k: self.metadata[k] + fisher.metadata[k]
            for k in ("examples", "tokens")
            if isinstance(fisher, FisherEstimate) and k in self.metadata and k in fisher.metadata
        }
        self.metadata = {
            **self.metadata,
            **counts,
            "consolidated": self.metadata.get("consolidated", 1) + 1,
            "model_hash": files.anchor_hash(self),
        }

    @staticmethod
    @torch.no_grad()
    def combine(ewcs: Sequence[EWC]) -> EWC:
        """Several tasks as ONE quadratic, exactly.

        F = sum F_k, anchor = sum F_k anchor_k / sum F_k, F_k = strength_k fisher_k.

        The result has strength 1. The sum of the penalties differs from its penalty by a constant,
        which is dropped: gradients are those of the sum. Where every F_k is 0 the anchor is the
        first task's. Anchors are kept in float32 unless they are "bf16+8": a mean of bfloat16
        anchors is no bfloat16 number.
        """
        op = "EWC.combine"
        if isinstance(ewcs, EWC) or not ewcs or not all(isinstance(e, EWC) for e in ewcs):
            raise checks.fail(op, "ewcs", "a non-empty list of EWC", ewcs, error=TypeError)
        first = ewcs[0]
        for other in ewcs[1:]:
            if {n: id(h.theta) for n, h in other._store.held.items()} != {
                n: id(h.theta) for n, h in first._store.held.items()
            } or [id(h.module) for h in other._lora] != [id(h.module) for h in first._lora]:
                raise checks.fail(
                    op,
                    "ewcs",
                    "EWCs that hold the same parameters of one model",
                    f"{other} beside {first}",
                )
        if any(h.anchor is not None for e in ewcs for h in e._lora):
            raise checks.fail(
                op,
                "ewcs",
                "LoRA updates whose anchors are 0",
                "consolidated ones",
                "their Fisher-weighted mean has no low rank: merge the adapter",
            )

        def quadratic(name: str) -> tuple[Tensor, Tensor]:
            total, moment, fallback = (
                torch.zeros(()),
                torch.zeros(()),
                first._store.held[name].decoded_anchor().double(),
            )
            for e in ewcs:
                h = e._store.held[name]
                f = e.strength * h.fisher.decode().double()
                total, moment = total + f, moment + f * h.decoded_anchor().double().to(f.device)
            theta = first._store.held[name].theta
            return tuple(
                dtensor.as_theta(t, theta)
                for t in (total, torch.where(total > 0, moment / total, fallback))
            )  # type: ignore[return-value]

        result: EWC = object.__new__(EWC)
        result.strength, result.storage, result.offload = 1.0, first.storage, first.offload
        result._anchor_dtype = (
            first._anchor_dtype if isinstance(first._anchor_dtype, str) else torch.float32
        )
        result._store = Store(first.offload)
        items = [
            Item(name, h.theta, lambda name=name: quadratic(name))
            for name, h in first._store.held.items()
        ]  # type: ignore[misc]
        result._store.fill(items, result.storage, result._anchor_dtype)
        sums = [
            torch.stack([e.strength * e._lora[i].fisher.decode().double() for e in ewcs]).sum(0)
            for i in range(len(first._lora))
        ]
        result._lora = [
            LoraHeld(h.name, encode_for(h.module.base_layer.weight, f, result.storage), h.module)
            for h, f in zip(first._lora, sums, strict=True)
        ]
        result.metadata = {**first.metadata, "combined": len(ewcs)}
        result.metadata["model_hash"] = files.anchor_hash(result)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Fisher, anchor and strength to a safetensors file; a crash leaves the old file.

        Every rank calls it, rank 0 writes the whole.
        """
        files.save(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        offload: str | None = "as saved",
        rename: Mapping[str, str] | None = None,
    ) -> EWC:
        """The EWC written by `save`, on `model`, whose weights may have moved on.

        Names and shapes must fit.

        With offload="cpu" and the model on the CPU the file itself is mapped, and read block by
        block as it is needed: leave it in place.
        """
        result: EWC = object.__new__(EWC)
        files.load(result, path, model, offload, rename)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Strength, Fisher, anchor and provenance, for a trainer's checkpoint.

        tensors, numbers and strings alone. This rank's shards.
        """
        return files.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, on the same model; names and shapes must fit."""
        files.load_state_dict(self, state)


class _Streamed(torch.autograd.Function):
    """A block's penalty that keeps no copy of its Fisher and anchor between forward and backward.

    Both bring them over anew.
    """

    @staticmethod
    def forward(ctx: Any, ewc: EWC, block: list[Any], *params: Tensor) -> Tensor:
        ctx.ewc, ctx.block = ewc, block
        ctx.save_for_backward(*params)
        (value,) = [
            ops.penalty([p.detach() for p in params], x.anchors, x.fishers, x.scales, ewc.strength)
            for x in ewc._store.stream([block])
        ]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        params = [p.detach().contiguous() for p in ctx.saved_tensors]
        (pulls,) = [
            torch.ops.fasttax.ewc_penalty_backward(
                grad, params, x.anchors, x.fishers, x.scales, ctx.ewc.strength
            )
            for x in ctx.ewc._store.stream([ctx.block])
        ]
        return None, None, *pulls


def _shapes(fisher: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Names to things with a shape; a FisherEstimate's without decoding it."""
    if not isinstance(fisher, FisherEstimate):
        return fisher
    return {name: fisher.stored(name).values for name in fisher}
