"""An EWC over parameters that a launcher has cut into flat shares: DeepSpeed's ZeRO-3, FSDP1.

The EWC is made of whole parameters before; each rank then takes its share of Fisher and anchor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax._base.packed import Stored
from fasttax.ewc import ops
from fasttax.ewc.drift import Drift
from fasttax.ewc.hold import Hold
from fasttax.ewc.store import Held, encode_for


@dataclass(frozen=True)
class Share:
    """This rank's share of a parameter, flat; of some there may be nothing."""

    name: str
    theta: Tensor  # the model's own parameter, whose shape is not this share's everywhere
    fisher: Stored
    anchor: Tensor

    @classmethod
    def of(cls, held: Held, fisher: Tensor, anchor: Tensor, storage: str) -> Share:
        """With the share of a Fisher and an anchor that were decoded."""
        return cls(held.name, held.theta, encode_for(held.theta, fisher, storage), anchor)


def trainable(op: str, hold: Hold, under: str, way_out: str) -> list[Held]:
    """The held parameters that are trained.

    Raises:
        ValueError: LoRA updates or Kronecker factors, which need whole matrices.
    """
    if hold.lora or hold.kronecker:
        raise checks.fail(
            op,
            "ewc",
            f"an EWC of plain parameters and diagonal Fishers under {under}",
            "LoRA updates" if hold.lora else "Kronecker factors",
            f"both need whole matrices: {way_out}",
        )
    return [h for h in hold.store.held.values() if h.theta.requires_grad]


class Shares(ABC):
    """strength/2 * sum fisher * (theta - anchor)^2 over this rank's shares and those of the others.

    Where a share is filled up Fisher and anchor are 0, so that nothing is added there.
    """

    def __init__(self, hold: Hold, shares: Sequence[Share]) -> None:
        self.hold, self.shares = hold, list(shares)

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The weights of each share, flat."""

    @abstractmethod
    def over_ranks(self, values: Tensor) -> Tensor:
        """Their sums over the ranks that share the parameters."""

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Over all ranks; a collective."""
        values = self.values()
        return self.over_ranks(ops.penalty(values, *self.beside(values), self.hold.strength))

    @torch.no_grad()
    def distance(self) -> Drift:
        """Sum fisher * (theta - anchor)^2 by parameter, over all ranks; a collective."""
        values = self.values()
        found = ops.penalties(values, *self.beside(values), 2.0)
        sums = self.over_ranks(torch.stack(found)).unbind()
        return Drift({s.name: value for s, value in zip(self.shares, sums, strict=True)})

    def beside(self, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Anchors, Fishers and u8log's scales, where the weights are."""
        device = values[0].device
        empty = torch.empty(0, device=device)
        packed = any(s.fisher.scales is not None for s in self.shares)
        scales = [empty if s.fisher.scales is None else s.fisher.scales for s in self.shares]
        return (
            [s.anchor.to(device) for s in self.shares],
            [s.fisher.values.to(device) for s in self.shares],
            [t.to(device) for t in scales] if packed else [],
        )
