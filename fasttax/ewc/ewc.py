"""EWC on a model: hold the weights that matter for what it knows, let the rest move.

    penalty(theta) = strength/2 * sum fisher * (theta - anchor)^2

Kirkpatrick et al. 2017 (arXiv:1612.00796); online consolidation: Schwarz et al. 2018
(arXiv:1805.06370), Huszar 2018 (arXiv:1712.03847). The arithmetic is in `fasttax.functional.ewc`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax._base.packed import STORAGES
from fasttax.ewc import files, tasks
from fasttax.ewc.attach import Attached, attach, during_backward
from fasttax.ewc.begin import begin
from fasttax.ewc.drift import Drift
from fasttax.ewc.fit import (
    check_hash,
    facts_of,
    match,
    pick_anchor,
    refuse_wider_anchor,
    shapes_of,
    survey,
    watch_over,
)
from fasttax.ewc.hold import Hold
from fasttax.ewc.kronecker import refuse_for_factors
from fasttax.ewc.store import Store, checked_anchor_dtype
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.kronecker import KroneckerEstimate, load_estimate

NORMALIZE = (None, "mean", "max")


class EWC:
    """The EWC penalty of a model towards the weights it has now (or `anchor`).

    Args:
        model: the model to hold. Its parameters are read live; tied weights count once; frozen ones
            cost nothing. Names are matched without what DataParallel, DDP, torch.compile,
            activation checkpointing and PEFT insert. FSDP2 (DTensor) parameters are held by their
            local shards. A frozen weight under a PEFT LoRA layer is held by its update: the penalty
            is that of the merged weight W + delta W, delta W = scale B A summed over the adapters
            that are active at the time, weighed by the base weight's Fisher, with gradients to A
            and B (AdaLoRA: also to E); of fused experts each has its own. One layer of each kind is
            seen to compute with that weight; whatever else moves a held weight is refused.
        fisher: a FisherEstimate or KroneckerEstimate, the path of one, or a mapping of parameter
            names to tensors >= 0. Of Kronecker factors A and G the penalty of a weight is
            strength/2 * <D, G D A>, D = theta - anchor: two products a layer, in float32 whatever
            `storage` is of the diagonals; a LoRA update's takes no dense matrix.
            Parameters that it does not name (new heads, say) are left free; a name that the model
            lacks is an error. Of a mapping the tensors are copied.
        strength: finite, >= 0.
        anchor: mapping of names to tensors (a state_dict); None copies the present weights. Always
            a copy. A LoRA update's anchor is 0, the base weight alone, but the present update where
            the Fisher is the adapted model's (lora="delta_w": names with base_layer) or where the
            adapter's init took its start out of the base weight (pissa, olora, corda, ...). A base
            weight given here must be one of the two.
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
            differences come in one list. DoRA, IA3, LoHa, LoKr, VeRA, OFT and other adapters over a
            held weight, frozen weights under a learned prompt, FSDP1, and what DeepSpeed's ZeRO-3
            has scattered, are refused with the reason. (`integrations.deepspeed.attach`.)

    It is bound to the model's own parameters: where one was replaced since (a new head, a resized
    embedding, load_state_dict(assign=True)) every use is a ValueError that names it.
    copy.deepcopy((model, ewc)) copies both, in this order; alone it can't be copied or pickled.

    Example:
        >>> ewc = fasttax.EWC(model, fisher, strength=10.0)
        >>> model(**batch).loss.backward()
        >>> penalty = ewc.add_grad_()
        >>> optimizer.step()
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
        strength = checks.number(op, "strength", strength, low=0)
        storage = checks.choice(op, "storage", storage, STORAGES)
        if offload not in files.OFFLOAD:
            raise checks.fail(op, "offload", "None or 'cpu'", repr(offload))
        if normalize not in NORMALIZE:
            raise checks.fail(op, "normalize", "None, 'mean' or 'max'", repr(normalize))
        dtype = checked_anchor_dtype(op, anchor_dtype)
        if isinstance(fisher, (str, os.PathLike)):
            fisher = load_estimate(fisher)
        if not isinstance(fisher, Mapping):
            raise checks.fail(
                op,
                "fisher",
                "a FisherEstimate, a KroneckerEstimate, a path, or a mapping of parameter names to "
                "tensors",
                fisher,
                error=TypeError,
            )
        if isinstance(fisher, KroneckerEstimate):
            refuse_for_factors(op, clamp, offload)
        targets = match(op, model, shapes_of(fisher), rename)
        refuse_wider_anchor(op, dtype, targets)
        anchors = {} if anchor is None else pick_anchor(op, anchor, targets)
        check_hash(op, fisher, targets, anchors)
        recipe = survey(op, fisher, [t.given for t in targets], clamp, normalize)

        #: what applies the penalty; optimizers and files work on it
        self.hold = Hold(strength, storage, dtype, Store(offload), watch_over(model, targets))
        self.hold.metadata = facts_of(getattr(fisher, "metadata", {}), targets)
        begin(op, self.hold, targets, fisher, anchors, recipe)

    @classmethod
    def _of(cls, hold: Hold) -> EWC:
        ewc = cls.__new__(cls)
        ewc.hold = hold
        return ewc

    def __repr__(self) -> str:
        return repr(self.hold)

    # --- what it holds -----------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """The penalty's factor; what is attached follows a change."""
        return self.hold.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.hold.strength = checks.number("EWC", "strength", value, low=0)

    @property
    def storage(self) -> str:
        """Of the Fisher, and of those that it is yet to take over: "fp32", "bf16" or "u8log"."""
        return self.hold.storage

    @storage.setter
    def storage(self, value: str) -> None:
        self.hold.storage = checks.choice("EWC", "storage", value, STORAGES)

    @property
    def offload(self) -> str | None:
        """None, or "cpu"."""
        return self.hold.store.offload

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the Fisher comes from, as FisherEstimate's."""
        return self.hold.metadata

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self.hold.metadata = value

    def parameters(self) -> dict[str, Tensor]:
        """The parameters held, by name, frozen ones included; of LoRA the trainable factors."""
        return self.hold.parameters()

    @property
    def anchor(self) -> dict[str, Tensor]:
        """By name, as floats; this rank's shards of sharded parameters."""
        out = {name: h.decoded_anchor() for name, h in self.hold.store.held.items()}
        return out | {h.name: h.decoded_anchor() for h in self.hold.kronecker}

    @property
    def fisher(self) -> FisherEstimate | KroneckerEstimate:
        """As stored; this rank's shards of sharded parameters, of Kronecker factors the whole."""
        estimate = FisherEstimate({h.name: h.fisher for h in self.hold.entries()}, self.metadata)
        factored = self.hold.factored()
        if not factored:
            return estimate
        # sides are (rows, columns): (G, A) of weights that lie as (out, in)
        facts = {k: v for k, v in self.metadata.items() if k not in ("shapes", "turned")}
        turned = self.metadata.get("turned", [])
        factors = {n: (l, r) if n in turned else (r, l) for n, (l, r) in factored.items()}
        shapes = {n: list(shape) for n, shape in self.hold.shapes().items()}
        return KroneckerEstimate(factors, estimate, {**facts, "turned": turned, "shapes": shapes})

    # --- the three ways to apply it ----------------------------------------------------------

    def penalty(self) -> Tensor:
        """strength/2 * sum fisher * (theta - anchor)^2, 0-d, differentiable.

        Its gradient goes to the trainable parameters. Over sharded parameters a collective: every
        rank calls it. Each rank's gradient is that of its own shards.
        """
        return self.hold.penalty()

    def add_grad_(
        self, scale: float | Tensor = 1.0, *, only: Iterable[Tensor] | None = None
    ) -> Tensor:
        """p.grad += scale * strength * fisher * (theta - anchor) in one pass and with no graph.

        Returns the penalty, no sync.

        Args:
            scale: multiplies the gradient, not the value returned. A 0-d tensor (a GradScaler's
                scale on a GPU) is used without a sync.
            only: the parameters to touch, as module.parameters(); None is all trainable ones. A
                missing p.grad is created.

        Over sharded parameters a collective for the value: every rank calls it.
        """
        op = "EWC.add_grad_"
        if not isinstance(scale, Tensor):
            scale = checks.number(op, "scale", scale)
        return self.hold.add_grad_(scale, _listed(op, only))

    def prox_(self, lr: float, *, only: Iterable[Tensor] | None = None) -> None:
        """Theta <- anchor + (theta - anchor) / (1 + lr * strength * fisher).

        Stable for any strength. It is the proximal step of the penalty in the Euclidean metric at
        step size lr; call it after the optimizer's step. (In Adam's metric: AdamWEWC.) LoRA updates
        have none: the penalty is not separable in A and B.
        """
        self.hold.prox_(lr, _listed("EWC.prox_", only))

    def attach(self, optimizer: Any, mode: str = "grad", every: int = 1) -> Attached:
        """Applies the penalty at every optimizer step.

        Returns a handle with .remove() (also a context manager).

        mode "grad" adds the gradient before each step (it is not part of a clipping done earlier),
        "prox_euclidean" (or "prox") runs `prox_` with each group's lr after it; AdamWEWC's
        "prox_adam" is another step, in Adam's metric. `every=k` acts on every k-th step with k
        times the weight; a step that a GradScaler leaves out counts where a fused optimizer leaves
        it out itself. Wrapped optimizers (with an `.optimizer` inside, as Accelerate's) are
        unwrapped; one that is no torch.optim.Optimizer but has param_groups and step() is wrapped
        itself, until .remove(). Under `maximize` the gradient is subtracted, so that it pulls to
        the anchor all the same.

        Raises:
            ValueError: a wrong mode or `every`, an optimizer that steps none of the parameters
                covered here, or one at whose steps they are held already.
        """
        return attach(self.hold, optimizer, mode, every)

    def during_backward(self, scale: float = 1.0) -> Attached:
        """Adds the gradient within the backward pass, block by block, until .remove().

        Each block follows its own gradients. For offload="cpu": while the pass goes on the next
        block is already under way. The penalty is then part of what is clipped. With k
        micro-batches a step pass scale=1/k (each backward adds once); with a GradScaler its scale.
        `handle.penalty` is the last pass's value (of this rank's shards).
        """
        return during_backward(self.hold, scale)

    def on(self, model: nn.Module) -> EWC:
        """The same on `model`, whose parameters have these names and shapes.

        For a copy of the model, parameters that were assigned anew, or shards that FSDP2 put in
        their place. Fisher, anchor, strength and all options are kept; anchors of LoRA updates are
        those of the layers here.

        Raises:
            ValueError: names or shapes differ.
        """
        return self._of(files.moved(self.hold, model))

    # --- looking and keeping -----------------------------------------------------------------

    def distance(self) -> Drift:
        """How far the weights have moved, weighed by the Fisher.

        Sum fisher * (theta - anchor)^2, in total, by parameter, module and layer. 0-d tensors, no
        sync; over sharded parameters a collective.
        """
        return self.hold.drift()

    @torch.no_grad()
    def consolidate(
        self, fisher: FisherEstimate | Mapping[str, Tensor], decay: float = 1.0
    ) -> None:
        """Online EWC: F <- decay * F + fisher, anchor <- a copy of the present weights.

        `fisher` was estimated at these. The metadata's model_hash becomes that of the new anchor. A
        LoRA update's anchor becomes the present update (the penalty there is then 0 but for
        rounding: it is the norm of a difference of products).
        """
        tasks.consolidate(self.hold, fisher, decay)

    @classmethod
    @torch.no_grad()
    def combine(cls, ewcs: Iterable[EWC]) -> EWC:
        """Several tasks as ONE quadratic, exactly.

        F = sum F_k, anchor = sum F_k anchor_k / sum F_k, F_k = strength_k fisher_k.

        The result has strength 1. The sum of the penalties differs from its penalty by a constant,
        which is dropped: gradients are those of the sum. Where every F_k is 0 the anchor is the
        first task's. Anchors are kept in float32 unless they are "bf16+8": a mean of bfloat16
        anchors is no bfloat16 number.

        Raises:
            TypeError, ValueError: no list of EWC, or of others than the same parameters, or of LoRA
                updates whose anchors are not 0.
        """
        return cls._of(tasks.combine(_holds("EWC.combine", ewcs)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Fisher, anchor and strength to a safetensors file; a crash leaves the old file.

        Every rank calls it, rank 0 writes the whole.
        """
        files.save(self.hold, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        offload: str | None = "as saved",
        rename: Mapping[str, str] | None = None,
    ) -> EWC:
        """The EWC written by `save`, on `model`, whose weights may have moved on.

        Names and shapes must fit. With offload="cpu" and the model on the CPU the file itself is
        mapped, and read block by block as it is needed: leave it in place.
        """
        return cls._of(files.load(path, model, offload, rename))

    def state_dict(self) -> dict[str, Any]:
        """Strength, Fisher, anchor and provenance, for a trainer's checkpoint.

        Tensors, numbers and strings alone. This rank's shards.
        """
        return files.state_dict(self.hold)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, on the same model; names and shapes must fit."""
        files.load_state_dict(self.hold, state)


def _listed(op: str, only: Iterable[Tensor] | None) -> list[Tensor] | None:
    """The parameters of an iterable, which is gone through more than once."""
    if only is None:
        return None
    listed = list(only) if isinstance(only, Iterable) else [only]
    if isinstance(only, Tensor) or not all(isinstance(p, Tensor) for p in listed):
        expected, way_out = (
            "parameters, as [p] or module.parameters()",
            "for names: ewc.parameters()",
        )
        raise checks.fail(op, "only", expected, only, way_out, TypeError)
    return listed


def _holds(op: str, ewcs: Iterable[EWC]) -> list[Hold]:
    given = list(ewcs) if isinstance(ewcs, Iterable) else []
    if not given or not all(isinstance(e, EWC) for e in given):
        raise checks.fail(op, "ewcs", "a non-empty list of EWC", ewcs, error=TypeError)
    return [e.hold for e in given]
