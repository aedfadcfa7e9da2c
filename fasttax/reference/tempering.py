"""How logits become the two distributions that an op compares, and an op's options in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax.reference.numbers import wide

# the tail of the ops' schemas: token_stats takes both sides, token_kl more
SIDES = (
    "float scale, float ref_scale, float softcap, float ref_softcap, "
    "float inv_temperature, float ref_inv_temperature"
)
OPTIONS = f"int kind, float beta, {SIDES}, bool inf_mask"


@dataclass(frozen=True)
class Side:
    """One model's way from raw logits to those of its distribution; a softcap of 0 is none."""

    scale: float = 1.0
    softcap: float = 0.0
    inv_temperature: float = 1.0

    def temper(self, logits: Tensor) -> Tensor:
        """The tempered logits softcap * tanh(logits * scale / softcap) / temperature, wide."""
        x = wide(logits)
        if self.softcap > 0:
            capped = self.softcap * torch.tanh(x * (self.scale / self.softcap))
            return capped * self.inv_temperature
        return x * (self.scale * self.inv_temperature)

    @property
    def frame_scale(self) -> float:
        """What makes tempered logits of capped ones, or of raw ones without a softcap."""
        return self.inv_temperature * (1.0 if self.softcap > 0 else self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of `temper` by the logits: a number where there is no softcap."""
        slope = self.scale * self.inv_temperature
        if self.softcap > 0:
            return (1 - torch.tanh(wide(logits) * (self.scale / self.softcap)) ** 2) * slope
        return slope


@dataclass(frozen=True)
class Tempering:
    """What token_kl does with raw logits: which divergence, and each model's side of it.

    The order of an op's options is known here alone.
    """

    kind: int
    beta: float
    policy: Side
    ref: Side
    inf_mask: bool  # drop entries where either row is -inf, and renormalise

    def args(self) -> tuple[Any, ...]:
        """token_kl's options."""
        return (self.kind, self.beta, *self.sides(), self.inf_mask)

    def sides(self) -> tuple[float, ...]:
        """token_stats' options for the rows of both models."""
        return _in_turn(self.policy, self.ref)

    def alone(self, side: Side) -> tuple[float, ...]:
        """token_stats' options for the rows of one model, whose `side` stands for both."""
        return _in_turn(side, side)

    @classmethod
    def none(cls, kind: int) -> Tempering:
        """Logits that are taken as they are."""
        return cls(kind, 0.5, Side(), Side(), inf_mask=False)

    @classmethod
    def of_args(cls, args: Sequence[Any]) -> Tempering:
        """The inverse of `args`."""
        kind, beta, *sides, inf_mask = args
        return cls.of_sides(sides, kind, beta, inf_mask)

    @classmethod
    def of_sides(
        cls, sides: Sequence[float], kind: int = 0, beta: float = 0.5, inf_mask: bool = False
    ) -> Tempering:
        """The inverse of `sides`, with token_kl's other options."""
        return cls(kind, beta, Side(*sides[0::2]), Side(*sides[1::2]), inf_mask)


def _in_turn(policy: Side, ref: Side) -> tuple[float, ...]:
    return (
        policy.scale,
        ref.scale,
        policy.softcap,
        ref.softcap,
        policy.inv_temperature,
        ref.inv_temperature,
    )
