"""Several tasks in one quadratic: a Hold takes over a new Fisher, or becomes the sum of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fasttax._base import checks, dtensor
from fasttax.ewc.files import anchor_hash
from fasttax.ewc.fit import Target, check_hash, differences, shapes_of, survey, unlike
from fasttax.ewc.hold import Hold
from fasttax.ewc.kronecker import Sides, held_at, sides_for
from fasttax.ewc.lora import LoraHeld
from fasttax.ewc.names import Names
from fasttax.ewc.store import Item, Store, encode_for
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.factor import nearest
from fasttax.fisher.kronecker import KroneckerEstimate


def consolidate(hold: Hold, fisher: FisherEstimate | Mapping[str, Tensor], decay: float) -> None:
    """Anchor <- the present weights, F <- decay * F + fisher (online EWC)."""
    op = "EWC.consolidate"
    decay = checks.number(op, "decay", decay, low=0)
    hold.check(op)
    names = _by_short_name(hold, fisher)
    _refuse_other_factors(op, hold.factored(), fisher, names)

    def target(name: str, theta: Tensor, lora: nn.Module | None = None) -> Target:
        return Target(names.get(name, name), name, name, theta, lora)

    plain = [target(h.name, h.theta) for h in hold.store.held.values()]
    weights = [target(h.name, h.theta) for h in hold.kronecker]
    targets = [*plain, *weights, *(target(h.name, h.base, h.module) for h in hold.lora)]
    shapes = shapes_of(fisher)
    given = {name: shapes[theirs] for name, theirs in names.items()}
    differences(op, "fisher", unlike({t.name: t for t in targets}, given, "the model has"))
    check_hash(op, fisher, targets, {})
    survey(op, fisher, names.values(), None, None)

    def summed(t: Target) -> tuple[Tensor, Tensor]:
        old = hold.store.held[t.name].fisher
        new = dtensor.part_of(fisher[t.given].detach().to(old.values.device), t.theta)
        return dtensor.as_theta(decay * old.decode() + new, t.theta), t.theta.detach().clone()

    off: dict[str, float] = {}

    def merged(name: str, theta: Tensor, old: Sides) -> Sides:
        assert isinstance(fisher, KroneckerEstimate)
        new = sides_for(theta, fisher.sides(names[name]))
        both, off[name] = nearest([(decay, sides_for(theta, old)), (1.0, new)])
        return both

    for w in hold.kronecker:
        start = dtensor.whole(w.theta.detach())
        fresh = held_at(w.name, w.theta, w.sides, start, hold.anchor_dtype)
        w.take(merged(w.name, w.theta, w.sides), fresh.anchor)
    for h in hold.lora:
        if h.sides is not None:
            h.sides = merged(h.name, h.base, h.sides)
        else:
            new = fisher[names[h.name]].detach().to(h.fisher.values.device)
            h.fisher = encode_for(h.base, decay * h.fisher.decode() + new, hold.storage)
        h.stay()
    if off:
        hold.metadata["kronecker_error"] = max(off.values())
    hold.fill([Item(t.name, t.theta, partial(summed, t)) for t in plain])
    found = getattr(fisher, "metadata", {})
    for count in ("examples", "tokens"):
        if count in hold.metadata and count in found:
            hold.metadata[count] += found[count]
    hold.metadata["consolidated"] = hold.metadata.get("consolidated", 1) + 1
    hold.metadata["model_hash"] = anchor_hash(hold)


def _refuse_other_factors(
    op: str, factored: Mapping[str, Sides], fisher: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    """Refuses a Fisher whose Kronecker factors are of other weights, or cut down otherwise."""
    theirs: dict[str, Sides] = {}
    if isinstance(fisher, KroneckerEstimate):
        theirs = {n: fisher.sides(given) for n, given in names.items() if given in fisher.factors}
    mixed = sorted(factored.keys() ^ theirs.keys())
    mixed += [n for n in factored if n in theirs and _cut(theirs[n]) != _cut(factored[n])]
    if mixed:
        raise checks.fail(
            op,
            "fisher",
            "Kronecker factors, cut down alike, of the weights that have them here, no others",
            f"differences at {', '.join(mixed[:5])}",
            "estimate with the same structure= and max_dim=, or of a KroneckerEstimate take "
            ".to_diagonal()",
        )


def _cut(sides: Sides) -> list[tuple[int, ...]]:
    """The shapes, which say whether factors are whole, blocks or a diagonal."""
    return [tuple(t.shape) for t in sides]


def _by_short_name(hold: Hold, fisher: Mapping[str, Tensor]) -> dict[str, str]:
    """The Fisher's names by those that the hold has, without what wrappers insert."""
    names = Names(hold.watch.model)
    found = {given: names.find(given) for given in fisher}
    return {given if whole is None else names.short(whole): given for given, whole in found.items()}


def combine(holds: Sequence[Hold]) -> Hold:
    """F = sum strength_k fisher_k, anchor = sum F_k anchor_k / sum F_k, at strength 1."""
    op = "EWC.combine"
    first = holds[0]
    for other in holds[1:]:
        if _owners(other) != _owners(first):
            raise checks.fail(
                op,
                "ewcs",
                "EWCs that hold the same parameters of one model",
                f"{other} beside {first}",
            )
    if any(hold.factored() for hold in holds):
        raise checks.fail(
            op,
            "ewcs",
            "diagonal Fishers",
            "Kronecker factors, whose sum has no anchor in closed form",
            "consolidate() one task after the other",
        )
    if any(h.anchor is not None for hold in holds for h in hold.lora):
        raise checks.fail(
            op,
            "ewcs",
            "LoRA updates whose anchors are 0",
            "consolidated ones, or of an init that starts from others (pissa, olora, corda, ...)",
            "their Fisher-weighted mean has no low rank: merge the adapter",
        )
    # a mean of bfloat16 anchors is no bfloat16 number
    dtype = first.anchor_dtype if isinstance(first.anchor_dtype, str) else torch.float32
    result = Hold(1.0, first.storage, dtype, Store(first.store.offload), first.watch)
    result.fill(
        [
            Item(name, h.theta, partial(_quadratic, holds, name))
            for name, h in first.store.held.items()
        ]
    )
    for i, h in enumerate(first.lora):
        fishers = [hold.lora[i].fisher.to(h.base.device) for hold in holds]
        terms = [
            hold.strength * f.decode().double() for hold, f in zip(holds, fishers, strict=True)
        ]
        fisher = encode_for(h.base, torch.stack(terms).sum(0), result.storage)
        result.lora.append(LoraHeld(h.name, fisher, h.module, offload=first.store.offload))
        result.lora[-1].follow()
    result.metadata = {**first.metadata, "combined": len(holds)}
    result.metadata["model_hash"] = anchor_hash(result)
    return result


def _owners(hold: Hold) -> tuple[dict[str, int], list[int]]:
    held = {name: id(h.theta) for name, h in hold.store.held.items()}
    return held, [id(h.module) for h in hold.lora]


def _quadratic(holds: Sequence[Hold], name: str) -> tuple[Tensor, Tensor]:
    """The Fisher and the anchor of one parameter's sum; the first anchor where every F_k is 0."""
    first = holds[0].store.held[name]
    start = first.decoded_anchor().double()
    total, moment = torch.zeros_like(start), torch.zeros_like(start)
    for hold in holds:
        h = hold.store.held[name]
        f = hold.strength * h.fisher.decode().double()
        total = total.to(f.device) + f
        moment = moment.to(f.device) + f * h.decoded_anchor().double().to(f.device)
    anchor = torch.where(total > 0, moment / total, start.to(total.device))
    return dtensor.as_theta(total, first.theta), dtensor.as_theta(anchor, first.theta)
