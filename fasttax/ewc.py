"""EWC on a model: hold the weights that matter for what it knows, let the rest move.

    penalty(theta) = strength/2 * sum fisher * (theta - anchor)^2

Kirkpatrick et al. 2017 (arXiv:1612.00796); online consolidation: Schwarz et al. 2018 (arXiv:1805.06370), Huszar 2018
(arXiv:1712.03847). The arithmetic is in `fasttax.functional.ewc`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax import _checks, _files
from fasttax._attach import Handle, attach
from fasttax.estimate import STORAGES, FisherEstimate, Stored, encode
from fasttax.functional import ewc as ops

NORMALIZE = (None, "mean", "max")


@dataclass(frozen=True)
class Drift:
    """sum fisher * (theta - anchor)^2 in total and per parameter, 0-d tensors; the penalty is strength/2 times the total."""

    total: Tensor
    per_parameter: dict[str, Tensor]


@dataclass
class _Held:
    """One held parameter: the live tensor, its Fisher as stored, its anchor."""

    theta: Tensor
    fisher: Stored
    anchor: Tensor


class EWC:
    """The EWC penalty of a model towards the weights it has now (or `anchor`).

    Args:
        model: the model to hold. Its parameters are read live; tied weights count once; frozen ones cost nothing.
        fisher: a FisherEstimate, the path of one, or a mapping of parameter names to tensors >= 0. Parameters that it does
            not name are left free; a name that the model lacks is an error.
        strength: finite, >= 0.
        anchor: mapping of names to tensors (a state_dict); None copies the present weights. Always a copy.
        storage: of the Fisher: "fp32", "bf16" or "u8log" (4, 2, 1 bytes a parameter).
        anchor_dtype: of the anchor; None keeps each parameter's dtype. bfloat16 is exact only for bfloat16 checkpoints.
        offload: None, or "cpu" to keep Fisher and anchor in host memory and bring them over parameter by parameter.
        clamp: upper bound on Fisher values, or a pair (low, high).
        normalize: None, "mean" or "max": divide the Fisher by its overall mean or maximum, after clamping.

    Raises:
        ValueError, TypeError: names, shapes, values or options do not fit; name and shape differences come in one list.
    """

    def __init__(self, model: nn.Module, fisher: FisherEstimate | str | os.PathLike[str] | Mapping[str, Tensor], *, strength: float,
                 anchor: Mapping[str, Tensor] | None = None, storage: str = "fp32", anchor_dtype: torch.dtype | None = None,
                 offload: str | None = None, clamp: float | Sequence[float] | None = None, normalize: str | None = None) -> None:  # fmt: skip
        op = "EWC"
        if not isinstance(model, nn.Module):
            raise _checks.fail(op, "model", "a torch.nn.Module", model, error=TypeError)
        self.strength = _checks.number(op, "strength", strength, low=0)
        _checks.choice(op, "storage", storage, STORAGES)
        if offload not in (None, "cpu"):
            raise _checks.fail(op, "offload", "None or 'cpu'", repr(offload))
        if normalize not in NORMALIZE:
            raise _checks.fail(op, "normalize", "None, 'mean' or 'max'", repr(normalize))
        if anchor_dtype is not None and anchor_dtype not in _checks.FLOATS:
            raise _checks.fail(op, "anchor_dtype", "a floating-point torch.dtype", anchor_dtype)
        self.storage, self.offload = storage, offload
        if isinstance(fisher, (str, os.PathLike)):
            fisher = FisherEstimate.load(fisher)
        if not isinstance(fisher, Mapping):
            raise _checks.fail(op, "fisher", "a FisherEstimate, a path, or a mapping of parameter names to tensors", fisher, error=TypeError)
        params = _match(op, model, fisher, anchor)
        _check_hash(op, fisher, {n: p if anchor is None else anchor[n] for n, p in params.items()})
        prepared = _prepare(op, {name: fisher[name].detach() for name in params}, clamp, normalize)
        self.metadata = dict(getattr(fisher, "metadata", {}))
        self._held = {}
        for name, theta in params.items():
            home = torch.device("cpu") if offload == "cpu" else theta.device
            source = theta if anchor is None else anchor[name]
            dtype = torch.float64 if theta.dtype == torch.float64 else anchor_dtype or theta.dtype
            kept = source.detach().to(device=home, dtype=dtype, copy=True).contiguous()
            f = prepared[name].to(home)
            stored = Stored(f.double()) if theta.dtype == torch.float64 else encode(f, storage)
            self._held[name] = _Held(theta, stored, kept)

    def __repr__(self) -> str:
        held = sum(h.theta.numel() for h in self._held.values())
        return f"EWC({len(self._held)} tensors, {held:,} parameters, strength={self.strength:g}, storage={self.storage})"

    # --- what it holds -----------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """The parameters held, by name, frozen ones included."""
        return {name: h.theta for name, h in self._held.items()}

    @property
    def anchor(self) -> dict[str, Tensor]:
        return {name: h.anchor for name, h in self._held.items()}

    @property
    def fisher(self) -> FisherEstimate:
        return FisherEstimate({name: h.fisher for name, h in self._held.items()}, self.metadata)

    def _lists(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        held = [self._held[n] for n in names]
        params = [h.theta for h in held]
        anchors = [h.anchor.to(h.theta.device, non_blocking=True) for h in held]
        fishers = [h.fisher.values.to(h.theta.device, non_blocking=True) for h in held]
        if self.storage != "u8log":
            return params, anchors, fishers, []
        empty = torch.empty(0)
        scales = [(empty if h.fisher.scales is None else h.fisher.scales).to(h.theta.device, non_blocking=True) for h in held]
        return params, anchors, fishers, scales

    def _groups(self, only: Sequence[Tensor] | None = None, frozen: bool = False) -> list[list[str]]:
        """Names by dtype class and device: one call each. Offloaded: one call a parameter, so that few are on the device."""
        wanted = None if only is None else {id(p) for p in only}
        groups: dict[Any, list[str]] = {}
        for name, h in self._held.items():
            if (h.theta.requires_grad or frozen) and (wanted is None or id(h.theta) in wanted):
                key: Any = (h.theta.device, h.theta.dtype == torch.float64)
                groups.setdefault((key, name) if h.anchor.device != h.theta.device else key, []).append(name)
        return list(groups.values())

    # --- the three ways to apply it ------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """strength/2 * sum fisher * (theta - anchor)^2, 0-d, differentiable by the trainable parameters."""
        parts = [ops.penalty(*self._lists(names), self.strength) for names in self._groups()]
        return _total(parts, self._held)

    def add_grad_(self, scale: float = 1.0, *, only: Sequence[Tensor] | None = None) -> Tensor:
        """p.grad += scale * strength * fisher * (theta - anchor) in one pass and with no graph; returns the penalty, no sync.

        Args:
            scale: multiplies the gradient, not the value returned (a GradScaler's scale, say).
            only: the parameters to touch; None is all trainable ones. A missing p.grad is created.
        """
        parts = []
        for names in self._groups(only):
            params, anchors, fishers, scales = self._lists(names)
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            grads = [p.grad for p in params if p.grad is not None]
            parts.append(ops.add_grad_(params, grads, anchors, fishers, scales, self.strength, scale))
        return _total(parts, self._held)

    def prox_(self, lr: float, *, only: Sequence[Tensor] | None = None) -> None:
        """theta <- anchor + (theta - anchor) / (1 + lr * strength * fisher): stable for any strength.

        The proximal step of the penalty in the Euclidean metric at step size lr; call it after the optimizer's step.
        """
        lr = _checks.number("EWC.prox_", "lr", lr, low=0)
        for names in self._groups(only):
            ops.prox_(*self._lists(names), lr * self.strength)

    def attach(self, optimizer: Any, mode: str = "grad", every: int = 1) -> Handle:
        """Applies the penalty at every optimizer step; returns a handle with .remove() (also a context manager).

        mode "grad" adds the gradient before each step (it is not part of a clipping done earlier), "prox" runs `prox_` with
        each group's lr after it. `every=k` acts on every k-th step with k times the weight. Wrapped optimizers (with an
        `.optimizer` inside, as Accelerate's) are unwrapped.

        Raises:
            ValueError: a wrong mode or `every`, or an optimizer that holds none of the parameters covered here.
        """
        return attach(self, optimizer, mode, every)

    # --- looking and keeping -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def distance(self) -> Drift:
        """How far the weights have moved, weighed by the Fisher: sum fisher * (theta - anchor)^2, and each parameter's part."""
        per = {}
        for names in self._groups(frozen=True):
            for name in names:
                params, anchors, fishers, scales = self._lists([name])
                per[name] = ops.penalty(params, anchors, fishers, scales, 2.0)
        return Drift(_total(list(per.values()), self._held), per)

    @torch.no_grad()
    def consolidate(self, fisher: FisherEstimate | Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Online EWC: anchor <- a copy of the present weights (at which `fisher` was estimated), F <- decay * F + fisher."""
        decay = _checks.number("EWC.consolidate", "decay", decay, low=0)
        model = {name: h.theta for name, h in self._held.items()}
        _compare("EWC.consolidate", "fisher", fisher, model, subset=False)
        _compare("EWC.consolidate", "fisher", fisher, model, subset=True)
        _check_hash("EWC.consolidate", fisher, model)
        new = _prepare("EWC.consolidate", {n: fisher[n].detach() for n in model}, None, None)
        for name, h in self._held.items():
            total = decay * h.fisher.decode() + new[name].to(h.fisher.values.device)
            h.fisher = Stored(total.double()) if h.theta.dtype == torch.float64 else encode(total, self.storage)
            h.anchor.copy_(h.theta)

    @staticmethod
    @torch.no_grad()
    def combine(ewcs: Sequence[EWC]) -> EWC:
        """Several tasks as ONE quadratic, exactly: F = sum F_k, anchor = sum F_k anchor_k / sum F_k, F_k = strength_k fisher_k.

        The result has strength 1. The sum of the penalties differs from its penalty by a constant, which is dropped: gradients
        are those of the sum. Where every F_k is 0 the anchor is the first task's.
        """
        if not ewcs or not all(isinstance(e, EWC) for e in ewcs):
            raise _checks.fail("EWC.combine", "ewcs", "a non-empty list of EWC", ewcs, error=TypeError)
        first = ewcs[0]
        for other in ewcs[1:]:
            if {n: id(h.theta) for n, h in other._held.items()} != {n: id(h.theta) for n, h in first._held.items()}:
                raise _checks.fail("EWC.combine", "ewcs", "EWCs that hold the same parameters of one model", f"{other} beside {first}")
        result = object.__new__(EWC)
        result.strength, result.storage, result.offload = 1.0, first.storage, first.offload
        result.metadata = {**first.metadata, "combined": len(ewcs)}
        result._held = {}
        for name, h in first._held.items():
            pairs = [(e.strength * e._held[name].fisher.decode().double(), e._held[name].anchor.double()) for e in ewcs]
            total = torch.stack([f for f, _ in pairs]).sum(0)
            mean = torch.stack([f * a for f, a in pairs]).sum(0) / total
            anchor = torch.where(total > 0, mean, pairs[0][1])
            wide = h.theta.dtype == torch.float64
            # a mean of bf16 anchors is no bf16 number: keep it in float32
            anchor = anchor if wide else anchor.float()
            result._held[name] = _Held(h.theta, Stored(total) if wide else encode(total, result.storage), anchor)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Fisher, anchor and strength to a safetensors file; a crash leaves the old file."""
        tensors = {f"anchor.{n}": h.anchor for n, h in self._held.items()} | {f"fisher.{n}": h.fisher.values for n, h in self._held.items()}
        tensors |= {f"scales.{n}": h.fisher.scales for n, h in self._held.items() if h.fisher.scales is not None}
        extra = {"strength": self.strength, "storage": self.storage, "offload": self.offload, "anchor_hash": _files.weights_hash(self.anchor.items())}
        _files.write(path, "EWC", tensors, {**self.metadata, "ewc": extra})

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module) -> EWC:
        """The EWC written by `save`, on `model`, whose weights may have moved on; names and shapes must fit."""
        tensors, metadata = _files.read(path, "EWC")
        extra = metadata.pop("ewc")
        anchors = {n.removeprefix("anchor."): t for n, t in tensors.items() if n.startswith("anchor.")}
        if _files.weights_hash(anchors.items()) != extra["anchor_hash"]:
            raise ValueError(f"EWC.load: {path}: the anchor does not match its hash; the file is damaged, write it anew with .save()")
        missing = [n for n in anchors if f"fisher.{n}" not in tensors]
        if missing:
            raise ValueError(f"EWC.load: {path}: no Fisher for {', '.join(missing[:5])}; the file is damaged, write it anew with .save()")
        stored = {n: Stored(tensors[f"fisher.{n}"], tensors.get(f"scales.{n}")) for n in anchors}
        _prepare("EWC.load", {n: s.decode() for n, s in stored.items()}, None, None)
        _compare("EWC.load", "fisher", {n: s.values for n, s in stored.items()}, anchors, subset=False)
        params = _match("EWC.load", model, {n: a for n, a in anchors.items()}, None)
        result = object.__new__(EWC)
        result.strength, result.storage, result.offload, result.metadata = extra["strength"], extra["storage"], extra["offload"], metadata
        result._held = {}
        for name, theta in params.items():
            home = torch.device("cpu") if result.offload == "cpu" else theta.device
            scales = stored[name].scales
            moved = Stored(stored[name].values.to(home), None if scales is None else scales.to(home))
            result._held[name] = _Held(theta, moved, anchors[name].to(home))
        return result


# --- fitting a Fisher to a model -----------------------------------------------------------------------------------------


def _compare(op: str, what: str, given: Mapping[str, Tensor], model: Mapping[str, Tensor], subset: bool) -> None:
    differences = [f"{n}: not a parameter of the model" for n in given if n not in model] if subset else []
    differences += [] if subset else [f"{n}: missing" for n in model if n not in given]
    differences += [f"{n}: shape {tuple(t.shape)}, the model has {tuple(model[n].shape)}" for n, t in given.items() if n in model and t.shape != model[n].shape]
    if differences:
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        raise ValueError(f"{op}: {what}: expected names and shapes of the model's parameters, got {len(differences)} differences:\n  "
                         + "\n  ".join(differences[:20]) + more + "\nestimate the Fisher on this model, or drop or rename the entries")  # fmt: skip


def _match(op: str, model: nn.Module, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's parameters that `fisher` names, tied ones once, after all checks."""
    every = dict(model.named_parameters(remove_duplicate=False))
    if not len(fisher):
        raise _checks.fail(op, "fisher", "at least one parameter", "an empty mapping")
    _compare(op, "fisher", fisher, every, subset=True)
    params: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name in fisher:
        theta = every[name]
        if type(theta.data).__name__ == "DTensor":
            raise _checks.fail(op, "model", "parameters that are plain tensors", f"{name} as a DTensor", "build the EWC before fully_shard")
        if not theta.is_floating_point():
            raise _checks.fail(op, "model", "floating-point parameters", f"{name} of dtype {theta.dtype}", "leave it out of the Fisher")
        if id(theta) in seen:
            raise _checks.fail(op, "fisher", "tied weights once", f"{seen[id(theta)]} and {name}, one parameter", "drop one of the two")
        seen[id(theta)] = name
        params[name] = theta
    if anchor is not None:
        _compare(op, "anchor", {n: anchor[n] for n in params if n in anchor}, params, subset=False)
    return params


def _check_hash(op: str, fisher: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> None:
    expected = getattr(fisher, "metadata", {}).get("model_hash")
    if expected is not None and expected != (found := _files.weights_hash(anchors.items())):
        raise ValueError(
            f"{op}: fisher: expected one estimated at the anchor's weights (hash {found}), got one estimated at others (hash {expected}); "
            "estimate it on this model, pass those weights as anchor=, or pass dict(fisher) to use it all the same"
        )


def _prepare(op: str, fisher: dict[str, Tensor], clamp: float | Sequence[float] | None, normalize: str | None) -> dict[str, Tensor]:
    bad = [n for n, f in fisher.items() if not bool(torch.isfinite(f).all()) or bool((f < 0).any())]
    if bad:
        raise _checks.fail(op, "fisher", "finite values >= 0", "others in " + ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""),
                           "estimate it again in float32 and on finite losses")  # fmt: skip
    if clamp is not None:
        pair = (0.0, clamp) if not isinstance(clamp, Sequence) else tuple(clamp)
        if len(pair) != 2:
            raise _checks.fail(op, "clamp", "a number or a pair (low, high)", clamp)
        low, high = (_checks.number(op, "clamp", bound, low=0) for bound in pair)
        fisher = {n: f.clamp(low, high) for n, f in fisher.items()}
    if normalize is not None:
        count = sum(f.numel() for f in fisher.values())
        divisor = sum(float(f.double().sum()) for f in fisher.values()) / count if normalize == "mean" else max(float(f.max()) for f in fisher.values())
        if divisor == 0:
            raise _checks.fail(op, "normalize", "a Fisher that is not 0 everywhere", repr(normalize), "pass normalize=None")
        fisher = {n: f / divisor for n, f in fisher.items()}
    return fisher


def _total(parts: list[Tensor], held: Mapping[str, _Held]) -> Tensor:
    if not parts:
        device = next(iter(held.values())).theta.device
        return torch.zeros((), device=device)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
