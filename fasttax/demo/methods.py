"""The ways to align that the demo compares, and the grid of strengths of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PLAIN, STOP, MERGE = "plain", "stop", "merge"
SHARES = (0.6, 0.75, 0.9)  # of plain fine-tuning's gain, at which methods are compared
TARGET = 0.75


@dataclass(frozen=True)
class Method:
    """A way to align.

    Attributes:
        title: in tables.
        parts: the fields of `Recipe` that a strength sets, in its order; empty for what is made of
            the plain run without training.
    """

    title: str
    parts: tuple[str, ...] = ()


METHODS = {
    "lr": Method("lower learning rate", ("lr",)),
    STOP: Method("plain, stopped early"),
    MERGE: Method("merge.linear of plain and base"),
    "ewc": Method("EWC, diagonal", ("ewc",)),
    "kron": Method("EWC, Kronecker", ("kron",)),
    "kl": Method("KL on the answers", ("kl",)),
    "kl_ewc": Method("KL + EWC (diagonal)", ("kl", "ewc")),
    "lm": Method("replay, LM loss", ("lm",)),
    "replay_kl": Method("replay, KL to the base", ("replay_kl",)),
    "kl_lm": Method("KL + replay (LM loss)", ("kl", "lm")),
}
Strength = tuple[float, ...]  # a number for each part; of "stop" a step, of "merge" an alpha
Grids = Mapping[str, tuple[Strength, ...]]


@dataclass(frozen=True)
class Recipe:
    """What holds the model, and how strongly; 0 is without.

    Attributes:
        method: a key of METHODS, or "plain".
        lr: a factor of the peak learning rate.
        kl: weight of KL(policy || base) over the answers' batch.
        ewc: strength of the diagonal EWC.
        kron: strength of the Kronecker-factored EWC.
        lm: weight of the LM loss of general text.
        replay_kl: weight of KL(policy || base) on general text.
    """

    method: str = PLAIN
    lr: float = 1.0
    kl: float = 0.0
    ewc: float = 0.0
    kron: float = 0.0
    lm: float = 0.0
    replay_kl: float = 0.0

    @property
    def replays(self) -> bool:
        """Whether a step reads general text."""
        return bool(self.lm or self.replay_kl)

    @property
    def label(self) -> str:
        """The method's parts with their numbers."""
        if self.method == PLAIN:
            return PLAIN
        parts = METHODS[self.method].parts
        return ", ".join(f"{name} {getattr(self, name):g}" for name in parts)


def recipe(method: str, strength: Strength) -> Recipe:
    """A method at a point of its grid."""
    return Recipe(method, **dict(zip(METHODS[method].parts, strength, strict=True)))


def numbers(method: str) -> int:
    """How many numbers a strength of the method has."""
    return max(1, len(METHODS[method].parts))


def title(method: str) -> str:
    """Of a method or of the plain run."""
    return METHODS[method].title if method in METHODS else "plain fine-tuning"


def trained(grids: Grids) -> Iterable[Recipe]:
    """The runs that are trained beside the plain one, method by method."""
    for method, strengths in grids.items():
        if METHODS[method].parts:
            yield from (recipe(method, strength) for strength in strengths)
