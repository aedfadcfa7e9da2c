"""A Hold in files and in a trainer's checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttax._base import checks, dtensor, files, mapped
from fasttax._base.hashes import same_weights, weights_hash
from fasttax._base.packed import SPLIT, STORAGES, decode_anchor, encode_anchor
from fasttax.ewc.adapters import prove
from fasttax.ewc.factors import is_packed
from fasttax.ewc.fit import Target, differences, facts_of, match, shaped, unlike, watch_over
from fasttax.ewc.hold import Hold, check_width
from fasttax.ewc.kronecker import NOTHING, KroneckerHeld, sides_for
from fasttax.ewc.lora import LoraHeld
from fasttax.ewc.parts import Parts, check_parts
from fasttax.ewc.store import Held, Store, checked_anchor_dtype, encode_for

OFFLOAD = (None, "cpu")
STATE = ("strength", "storage", "metadata", "tensors")  # what a state must have


def _tensors(hold: Hold, held: Mapping[str, Held]) -> dict[str, Tensor]:
    """Of `held`, those of the store or what was gathered of them, and of all others."""
    out: dict[str, Tensor] = {}
    for h in held.values():
        out |= h.tensors()
    for weight in hold.kronecker:
        out |= weight.tensors()
    for update in hold.lora:
        out |= update.tensors()
    return out


def _facts(hold: Hold) -> dict[str, Any]:
    dtype = hold.anchor_dtype
    return {
        "strength": hold.strength,
        "storage": hold.storage,
        "offload": hold.store.offload,
        "anchor_dtype": str(dtype) if isinstance(dtype, torch.dtype) else dtype,
        "base_hash": _base_hash(hold.lora),
        "factored": {name: list(shape) for name, shape in hold.shapes().items()},
    }


def _base_hash(updates: Sequence[LoraHeld]) -> str | None:
    """Of the weights that LoRA updates are added to, as they were made; None of packed ones."""
    if not updates or any(is_packed(h.base) for h in updates):
        return None
    return weights_hash((h.name, h.base_sample) for h in updates)


def _check_base(op: str, argument: str, saved: str | None, updates: Sequence[LoraHeld]) -> None:
    """An error where updates are added to others than the weights that an anchor is relative to."""
    now = _base_hash(updates)
    if saved is not None and now is not None and not same_weights(saved, now):
        raise checks.fail(
            op,
            argument,
            f"an EWC whose LoRA updates are added to these base weights (hash {now})",
            f"one of others (hash {saved})",
            "put the adapter around the base model that it was made on, with the same init",
        )


def _dtype_of(text: str | None) -> torch.dtype | str | None:
    """The anchor_dtype that `_facts` wrote."""
    if not isinstance(text, str) or not text.startswith("torch."):
        return text
    found = getattr(torch, text.removeprefix("torch."), text)
    return found if isinstance(found, torch.dtype) else text


def _recipe(op: str, facts: Mapping[str, Any]) -> tuple[float, str, torch.dtype | str | None]:
    """The strength, storage and anchor_dtype that `_facts` wrote.

    Raises:
        TypeError, ValueError: one is none.
    """
    return (
        checks.number(op, "strength", facts["strength"], low=0),
        checks.choice(op, "storage", facts["storage"], STORAGES),
        checked_anchor_dtype(op, _dtype_of(facts.get("anchor_dtype"))),
    )


def anchor_hash(hold: Hold) -> str:
    """As FisherEstimate's model_hash: of the anchor, base weights standing for LoRA's."""
    anchors = (
        (h.name, dtensor.whole(dtensor.as_theta(h.decoded_anchor(), h.theta)))
        for h in hold.store.held.values()
    )
    factored = ((h.name, h.decoded_anchor()) for h in hold.kronecker)
    bases = ((h.name, dtensor.whole(h.base)) for h in hold.lora)
    return weights_hash((*anchors, *factored, *bases))


# --- files -------------------------------------------------------------------------------------


def save(hold: Hold, path: str | os.PathLike[str]) -> None:
    """Writes the whole tensors; every rank calls it, rank 0 writes."""
    thetas = [h.theta for h in hold.store.held.values()] + [h.theta for h in hold.kronecker]
    sharded = any(dtensor.is_sharded(theta) for theta in thetas)
    held = {name: _gathered(hold, h) for name, h in hold.store.held.items()}
    if not sharded or dist.get_rank() == 0:
        anchors = {name: h.anchor for name, h in held.items()}
        anchors |= {h.name: h.anchor for h in hold.kronecker}
        anchor = weights_hash(anchors.items())
        metadata = {**hold.metadata, "ewc": {**_facts(hold), "anchor_hash": anchor}}
        tensors = _tensors(hold, held)
        specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        mapped.write_streamed(path, "EWC", specs, metadata, tensors.items())
    if sharded:
        dist.barrier()


def _gathered(hold: Hold, h: Held) -> Held:
    """The whole of a sharded one, by way of floats: u8log's blocks do not meet at the seams."""
    if not dtensor.is_sharded(h.theta):
        return h
    fisher, anchor = (
        dtensor.whole(dtensor.as_theta(t, h.theta)) for t in (h.fisher.decode(), h.decoded_anchor())
    )
    stored = encode_for(h.theta, fisher, hold.storage)
    return Held(h.name, stored, h.theta, encode_anchor(anchor, _encoding(h.anchor)))


def _encoding(anchor: Tensor) -> torch.dtype | str:
    """How an anchor that lies encoded was encoded."""
    return SPLIT if anchor.dtype == torch.uint8 else anchor.dtype


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    offload: str | None,
    rename: Mapping[str, str] | None,
) -> Hold:
    """The Hold of a file, on `model`; offload "as saved" takes the file's own."""
    op = "EWC.load"
    with files.opened(path, "EWC") as (file, metadata):
        tensors, in_file = files.checked(file), mapped.Mapped(file)
    facts = metadata.pop("ewc", None)
    if not isinstance(facts, dict) or not {"strength", "storage", "offload"} <= {*facts}:
        raise _damaged(op, path, "no strength, storage and offload in its header")
    try:
        parts = Parts.of(tensors)
    except ValueError as error:
        raise _damaged(op, path, str(error)) from None
    if not same_weights(weights_hash(parts.anchors.items()), str(facts.get("anchor_hash"))):
        raise _damaged(op, path, "the anchor does not match its hash")
    missing = [n for n in parts.anchors if n not in parts.fishers and n not in parts.sides]
    if missing:
        raise _damaged(op, path, f"no Fisher for {', '.join(missing[:5])}")
    try:
        strength, storage, dtype = _recipe(op, facts)
        factored = _mapping(op, facts, "factored") if "factored" in facts else {}
        saved = facts["offload"]
        if saved not in OFFLOAD:
            raise checks.fail(op, "offload", "None or 'cpu'", repr(saved))
    except (TypeError, ValueError) as error:
        raise _damaged(op, path, str(error)) from None
    if offload == "as saved":
        offload = saved
    if offload not in OFFLOAD:
        raise checks.fail(op, "offload", "None, 'cpu', or 'as saved'", repr(offload))
    targets = match(op, model, _shapes(op, path, parts, factored), rename)
    watch = watch_over(model, targets)
    hold = Hold(
        strength, storage, dtype, Store(offload), watch, metadata=facts_of(metadata, targets)
    )
    plain = [t for t in targets if t.lora is None]
    missing = [t.given for t in plain if t.given not in parts.anchors]
    if missing:
        raise _damaged(op, path, f"no anchor for {', '.join(missing[:5])}")
    check_parts(op, "path", {t.given: t.shape for t in targets}, parts)
    _refuse_other_precision(op, "path", {t.given: t.theta for t in plain}, parts)
    _hold_updates(op, hold, targets, parts)
    _check_base(op, "path", facts.get("base_hash"), hold.lora)
    hold.kronecker = [_factored(t, parts) for t in plain if t.given in parts.sides]
    plain = [t for t in plain if t.given not in parts.sides]
    if offload == "cpu" and not hold.kronecker and all(_lies_in_file(t) for t in plain):
        del tensors, parts
        hold.store.adopt(in_file, {t.name: t.theta for t in plain})
    else:
        hold.store.put([_held(hold, t, parts) for t in plain])
    return hold


def moved(hold: Hold, model: nn.Module) -> Hold:
    """The same Fishers and anchors on `model`, whose names and shapes must be those held."""
    op = "EWC.on"
    held = {name: _gathered(hold, h) for name, h in hold.store.held.items()}
    parts = Parts.of(_tensors(hold, held))
    targets = match(op, model, _shapes(op, "model", parts, hold.shapes()), None)
    twin = Hold(
        hold.strength,
        hold.storage,
        hold.anchor_dtype,
        Store(hold.store.offload),
        watch_over(model, targets),
        metadata=facts_of(hold.metadata, targets),
    )
    for t in targets:
        if t.given in parts.anchors:
            check_width(op, "model", t.name, t.theta, parts.anchors[t.given])
    _hold_updates(op, twin, targets, parts)
    _check_base(op, "model", _base_hash(hold.lora), twin.lora)
    plain = [t for t in targets if t.lora is None]
    twin.kronecker = [_factored(t, parts) for t in plain if t.given in parts.sides]
    twin.store.put([_held(twin, t, parts) for t in plain if t.given not in parts.sides])
    return twin


def _shapes(
    op: str, where: str | os.PathLike[str], parts: Parts, factored: Mapping[str, Any]
) -> dict[str, Tensor]:
    """By name what has the shape of the parameter."""
    shapes = {n: s.values for n, s in parts.fishers.items()}
    if set(factored) != set(parts.sides):
        raise _damaged(op, where, "shapes of other weights than its Kronecker factors")
    for name, shape in factored.items():
        if not isinstance(shape, Sequence) or not all(type(n) is int and n >= 0 for n in shape):
            raise _damaged(op, where, f"no shape of {name}")
    return shapes | {n: shaped(factored[n]) for n in parts.sides}


def _factored(t: Target, parts: Parts) -> KroneckerHeld:
    """A weight with Kronecker factors, where the model has it."""
    anchor = parts.anchors[t.given].to(t.theta.device)
    return KroneckerHeld(t.name, t.theta, sides_for(t.theta, parts.sides[t.given]), anchor)


def _hold_updates(op: str, hold: Hold, targets: Sequence[Target], parts: Parts) -> None:
    """Holds the LoRA updates among the targets."""
    for t in targets:
        if t.lora is not None:
            update = parts.updates.get(t.given)
            fisher, sides = parts.fishers.get(t.given, NOTHING), parts.sides.get(t.given)
            held = LoraHeld(t.name, fisher, t.lora, update, sides, hold.store.offload)
            _settle(held)
            if t.given in parts.anchors:  # made on the model before the adapter
                held.start_at(op, decode_anchor(parts.anchors[t.given], torch.Size(t.shape)))
            hold.lora.append(held)
    prove(op, hold.lora)


def _damaged(op: str, path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(f"{op}: {path}: {what}; the file is damaged, write it anew with .save()")


def _lies_in_file(t: Target) -> bool:
    """Whether the file's tensors are the parameter's as they lie, under its name."""
    return t.theta.device.type == "cpu" and t.given == t.name and not dtensor.is_sharded(t.theta)


def _held(hold: Hold, t: Target, parts: Parts) -> Held:
    fisher, anchor = parts.fishers[t.given], parts.anchors[t.given]
    if dtensor.is_sharded(t.theta):
        whole = decode_anchor(anchor, torch.Size(t.shape))
        part = dtensor.part_of(whole, t.theta)
        fisher = encode_for(t.theta, dtensor.part_of(fisher.decode(), t.theta), hold.storage)
        anchor = encode_anchor(part, _encoding(anchor))
    return Held(t.name, fisher, t.theta, anchor)


def _settle(h: LoraHeld) -> None:
    """Where the weight is, the factors in its penalty's dtype."""
    if h.sides is not None:
        h.sides = sides_for(h.base, h.sides)
    h.follow()


# --- a trainer's checkpoint --------------------------------------------------------------------


def state_dict(hold: Hold) -> dict[str, Any]:
    """Copies of everything; this rank's shards. No types but those that torch.load reads."""
    tensors = _tensors(hold, hold.store.held)
    copies = {n: t.detach().clone() for n, t in tensors.items()}
    return {**_facts(hold), "metadata": json.loads(json.dumps(hold.metadata)), "tensors": copies}


def load_state_dict(hold: Hold, state: Mapping[str, Any]) -> None:
    """Takes over what `state_dict` gave; a state that does not fit changes nothing."""
    op = "EWC.load_state_dict"
    if not isinstance(state, Mapping) or not all(key in state for key in STATE):
        got = f"keys {sorted(map(str, state))[:10]}" if isinstance(state, Mapping) else state
        raise checks.fail(op, "state", "what EWC.state_dict() gave", got)
    tensors, metadata = (_mapping(op, state, key) for key in ("tensors", "metadata"))
    for name, t in tensors.items():
        checks.tensor(op, f"state['tensors'][{name!r}]", t, (*checks.FLOATS, torch.uint8))
    try:
        parts = Parts.of(tensors)
    except ValueError as error:
        raise ValueError(f"{op}: state: {error}; write it anew with .state_dict()") from None
    held = {h.name: h.fisher.values for h in hold.entries()}
    held |= {name: shaped(shape) for name, shape in hold.shapes().items()}
    factored = _mapping(op, state, "factored") if "factored" in state else {}
    given = _shapes(op, "state", parts, factored)
    differences(op, "state", unlike(held, given, "held with"))
    strength, storage, dtype = _recipe(op, state)
    shapes = {name: tuple(values.shape) for name, values in held.items()}
    check_parts(op, "state", shapes, parts)
    differing = set(hold.factored()) ^ set(parts.sides)
    differences(op, "state", [f"{name}: Kronecker factors in one alone" for name in differing])
    own = [*hold.store.held, *(h.name for h in hold.kronecker)]
    missing = [name for name in own if name not in parts.anchors]
    differences(op, "state", [f"anchor.{name}: missing" for name in missing])
    _check_base(op, "state", state.get("base_hash"), hold.lora)
    thetas = {name: h.theta for name, h in hold.store.held.items()}
    _refuse_other_precision(op, "state", thetas, parts)
    store = Store(hold.store.offload)
    store.put(
        [
            Held(name, parts.fishers[name], h.theta, parts.anchors[name])
            for name, h in hold.store.held.items()
        ]
    )
    hold.strength, hold.storage, hold.anchor_dtype = strength, storage, dtype
    hold.metadata, hold.store = dict(metadata), store
    for weight in hold.kronecker:
        weight.take(sides_for(weight.theta, parts.sides[weight.name]), parts.anchors[weight.name])
    for h in hold.lora:
        h.fisher, h.anchor = parts.fishers.get(h.name, NOTHING), parts.updates.get(h.name)
        h.sides = parts.sides.get(h.name)
        _settle(h)


def _mapping(op: str, state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = state[key]
    if not isinstance(value, Mapping):
        raise checks.fail(op, f"state[{key!r}]", "a mapping", value, error=TypeError)
    return value


def _refuse_other_precision(
    op: str, argument: str, thetas: Mapping[str, Tensor], parts: Parts
) -> None:
    """Refuses tensors of float64 for a parameter of less, and the other way round."""
    for name, theta in thetas.items():
        fisher = parts.sides[name][0] if name in parts.sides else parts.fishers[name].values
        for what, t in (("fisher", fisher), ("anchor", parts.anchors[name])):
            if (t.dtype == torch.float64) != (theta.dtype == torch.float64):
                raise checks.fail(
                    op,
                    argument,
                    f"{what}.{name} in the precision of a {theta.dtype} parameter",
                    t,
                    "make it of an EWC on a model in this dtype",
                )
