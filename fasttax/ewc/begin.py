"""What a new EWC holds of the parameters that its Fisher names, and where it holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fasttax._base import dtensor
from fasttax.ewc.adapters import prove
from fasttax.ewc.fit import Recipe, Target
from fasttax.ewc.hold import Hold
from fasttax.ewc.kronecker import NOTHING, Sides, held_at, sides_for
from fasttax.ewc.lora import LoraHeld, moved_bases
from fasttax.ewc.store import Item, encode_for
from fasttax.fisher.kronecker import KroneckerEstimate


def begin(
    op: str,
    hold: Hold,
    targets: Sequence[Target],
    fisher: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    recipe: Recipe,
) -> None:
    """Fills a hold.

    Args:
        op: for errors.
        hold: with nothing in it.
        targets: what `fit.match` found.
        fisher: by the targets' given names.
        anchors: by their names; the present weights where there is none.
        recipe: of the Fisher's values.

    Raises:
        ValueError: a LoRA layer computes with another update than its factors', or its anchor is
            none that the update can have.
    """
    sides: dict[str, Sides] = {}
    if isinstance(fisher, KroneckerEstimate):
        sides = {n: recipe.sides(fisher.sides(n)) for n in fisher.factors}
    moved = moved_bases(hold.watch.model)
    for t in targets:
        if t.lora is not None:
            update = _update(hold, t, fisher, recipe, sides.get(t.given))
            hold.lora.append(update)
            if t.name in anchors:
                update.start_at(op, anchors[t.name])
            else:
                update.start_here(None if t.of_the_adapted else moved)
    prove(op, hold.lora)

    def values(t: Target) -> tuple[Tensor, Tensor]:
        start = anchors.get(t.name, t.theta)
        return recipe(fisher[t.given]), start.detach().clone()

    items = []
    for t in targets:
        if t.lora is not None:
            continue
        if t.given in sides:
            start = dtensor.whole(anchors.get(t.name, t.theta).detach())
            factors = sides_for(t.theta, sides[t.given])
            hold.kronecker.append(held_at(t.name, t.theta, factors, start, hold.anchor_dtype))
        else:
            items.append(Item(t.name, t.theta, partial(values, t)))
    hold.fill(items)


def _update(
    hold: Hold, t: Target, fisher: Mapping[str, Tensor], recipe: Recipe, sides: Sides | None
) -> LoraHeld:
    """The LoRA update of a weight, under its Fisher."""
    if sides is not None:
        return LoraHeld(t.name, NOTHING, t.lora, sides=sides_for(t.theta, sides))
    stored = encode_for(t.theta, recipe(fisher[t.given]), hold.storage)
    return LoraHeld(t.name, stored, t.lora, offload=hold.store.offload)
