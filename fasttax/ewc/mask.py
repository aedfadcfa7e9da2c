"""FisherMask: the weights that matter most do not move, or move less; the others train freely."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax._base.dtensor import is_sharded
from fasttax._base.handle import Handle
from fasttax.ewc.attach import innermost
from fasttax.ewc.fit import match, shapes_of, watch_over
from fasttax.fisher.estimate import FisherEstimate

OP = "FisherMask"
ANEW = "make the mask anew, of the model as it is"
HALF = 1 << 16  # a float32's bits are looked through in two halves


class FisherMask:
    """The `share` of weights with the largest Fisher, held in place by what each step did.

    `attach(optimizer)` has every step end with theta <- before + scale (theta - before) for the
    masked weights: at scale 0 they keep their bits, whatever weight decay and momentum do. The
    others are the optimizer's alone. EWC pulls all weights back a little; this leaves most alone.

    Args:
        model: whose parameters the Fisher names.
        fisher: a FisherEstimate, the path of one, or a mapping of parameter names to tensors >= 0.
        share: of all covered weights together, in (0, 1]. Of equal Fishers the first in the
            order of `fisher` count. Weights whose Fisher is 0 are never masked: nothing says that
            they matter.
        scale: of a masked weight's step, from 0 (frozen) to below 1.

    The mask takes one byte a covered weight, and a step keeps a copy of the masked ones.

    Raises:
        ValueError: names or shapes that are none of the model's (all are listed), negative Fishers,
            weights under adapters, sharded ones.

    Example:
        >>> with fasttax.FisherMask(model, fisher, share=0.1).attach(optimizer):
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherEstimate | str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        share: float,
        scale: float = 0.0,
    ) -> None:
        self.share = checks.number(OP, "share", share, low=0, high=1, open_low=True)
        self.scale = checks.number(OP, "scale", scale, low=0)
        if self.scale >= 1:
            raise checks.fail(OP, "scale", "a number >= 0 and < 1", self.scale)
        if isinstance(fisher, (str, os.PathLike)):
            fisher = FisherEstimate.load(fisher)
        if not isinstance(fisher, Mapping):
            raise checks.fail(
                OP, "fisher", "a FisherEstimate, a path, or a mapping", fisher, error=TypeError
            )
        self._thetas: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        targets = match(OP, model, shapes_of(fisher), None)
        for target in targets:
            _refuse(target.name, target.theta, target.lora)
            self._thetas[target.name] = target.theta
            values[target.name] = _checked(target.given, fisher[target.given])
        self._watch = watch_over(model, targets)
        wanted = round(self.share * sum(v.numel() for v in values.values()))
        self.masks = {
            name: mask.to(self._thetas[name].device) for name, mask in top(values, wanted).items()
        }
        self._attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    @property
    def masked(self) -> int:
        """The number of masked weights."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def __repr__(self) -> str:
        every = sum(mask.numel() for mask in self.masks.values())
        return f"FisherMask({self.masked:,} of {every:,} weights, scale {self.scale:g})"

    def attach(self, optimizer: torch.optim.Optimizer) -> Handle:
        """Has every step of the optimizer keep to the mask, until the handle's `undo()`.

        A step's last word is the mask's, whatever else is attached (EWC's proximal step, say). A
        wrapped optimizer (with an `.optimizer` inside, as Accelerate's) is unwrapped.

        Raises:
            ValueError: the optimizer holds none of the covered parameters, has no hooks, or has
                this mask already; also at a step where one of them is not the model's any more.
        """
        op = "FisherMask.attach"
        optimizer = innermost(optimizer, op, "pass the torch.optim.Optimizer that it steps")
        self._watch.check(op, "mask", ANEW)
        if not self._stepped_by(optimizer):
            raise checks.fail(
                op,
                "optimizer",
                "one that holds parameters of the mask",
                "none of them",
                "make it of this model's parameters",
            )
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise checks.fail(op, "optimizer", "a torch.optim.Optimizer", type(optimizer).__name__)
        if optimizer in self._attached:
            raise checks.fail(
                op,
                "optimizer",
                "one that this mask is not attached to",
                "the one that it is attached to",
                "each step would be scaled twice: undo() the first handle before",
            )
        before: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, mask, what it was
        last: list[Any] = []  # the hook after the others

        def keep(*_: Any) -> None:
            self._watch.check(OP, "mask", ANEW)
            release()
            last.append(optimizer.register_step_post_hook(put_back))
            found = self._stepped_by(optimizer)
            before[:] = [(p, mask, p.detach()[mask]) for p, mask in found]

        @torch.no_grad()
        def put_back(*_: Any) -> None:
            for p, mask, old in before:
                p[mask] = old + self.scale * (p[mask] - old) if self.scale else old
            before.clear()

        def release() -> None:
            while last:
                last.pop().remove()

        handle = Handle()
        handle.on_undo(release)
        with handle.or_undone():
            handle.put(optimizer.register_step_pre_hook, keep)
            handle.on_undo(lambda: self._attached.discard(optimizer))
            self._attached.add(optimizer)
        return handle

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        """The covered parameters that it holds by now, with their masks, which are beside them."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = {name: p for name, p in self._thetas.items() if id(p) in held}
        self.masks |= {name: self.masks[name].to(p.device) for name, p in found.items()}
        return [(p, self.masks[name]) for name, p in found.items()]


def top(fishers: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the `count` largest values over all tensors, or of as many as are > 0.

    The threshold is found without sorting: bits of floats >= 0 are in the order of the values, so
    that two histograms over 16 of them each give it exactly.
    """
    high = torch.zeros(HALF, dtype=torch.int64, device="cpu")
    for value in fishers.values():
        high += torch.bincount(_bits(value) >> 16, minlength=HALF).cpu()
    upper, above = _bucket(high, count)
    low = torch.zeros(HALF, dtype=torch.int64, device="cpu")
    for value in fishers.values():
        bits = _bits(value)
        low += torch.bincount(bits[bits >> 16 == upper] & (HALF - 1), minlength=HALF).cpu()
    lower, below = _bucket(low, count - above)
    threshold, room = (upper << 16) + lower, count - above - below
    masks: dict[str, Tensor] = {}
    for name, value in fishers.items():
        bits = _bits(value)
        mask = bits > threshold
        if threshold > 0 and room > 0:
            equal = (bits == threshold).nonzero()[:room, 0]
            mask[equal] = True
            room -= len(equal)
        masks[name] = mask.view(value.shape)
    return masks


def _bits(value: Tensor) -> Tensor:
    """Of float32 values >= 0, as integers in their order; -0 is 0."""
    flat = value.reshape(-1).to(torch.float32).abs().contiguous()
    return flat.view(torch.int32).long()


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """(the bucket of the count-th largest, how many lie above it)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(max(count, 1), device="cpu")))
    place = min(place, len(histogram) - 1)
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, above


def _checked(name: str, value: Tensor) -> Tensor:
    """A Fisher's values, finite and >= 0."""
    value = value.detach()
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise checks.fail(
            OP, f"fisher[{name!r}]", "finite values >= 0", "others", "estimate it anew"
        )
    return value


def _refuse(name: str, theta: Tensor, lora: nn.Module | None) -> None:
    """What cannot be held weight by weight."""
    if lora is not None:
        raise checks.fail(
            OP,
            "fisher",
            "weights that are trained themselves",
            f"{name!r}, which an adapter moves",
            "merge the adapter, or take EWC, which holds the merged weight",
        )
    if is_sharded(theta):
        raise checks.fail(
            OP, "model", "whole parameters", f"{name!r}, a shard", "take EWC, which works on shards"
        )
