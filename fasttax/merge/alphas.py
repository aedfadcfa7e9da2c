"""One alpha for a whole model, or one for each pattern of names."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from fasttax._base import checks
from fasttax.merge.models import Models
from fasttax.merge.names import bare, shortened

Alpha = float | Mapping[str, float]


def checked(op: str, alpha: Alpha) -> float | dict[str, float]:
    """Finite numbers, alone or by pattern."""
    if not isinstance(alpha, Mapping):
        return checks.number(op, "alpha", alpha)
    if not alpha:
        raise checks.fail(op, "alpha", "a number, or numbers by pattern of names", "no pattern")
    return {str(p): checks.number(op, f"alpha[{p!r}]", value) for p, value in alpha.items()}


def by_name(op: str, alpha: float | dict[str, float], models: Models) -> dict[str, float]:
    """The alpha of each floating-point tensor, by the first pattern that its name fits.

    Raises:
        ValueError: a pattern that is the first for no tensor, tensors that fit none, or one weight
            under two names with two alphas.
    """
    floats = models.floats()
    if isinstance(alpha, float):
        return dict.fromkeys(floats, alpha)
    found = {name: _first(name, alpha) for name in floats}
    idle = [p for p in alpha if p not in found.values()]
    if idle:
        raise checks.fail(
            op,
            "alpha",
            f"patterns of names, as {floats[0]!r} or '*.mlp.*', each the first that some name fits",
            f"{idle[0]!r}, which is that of none",
            "put special patterns before general ones, and leave out those that fit nothing",
        )
    left = [name for name in floats if found[name] is None]
    if left:
        raise ValueError(
            f"{op}: alpha: expected a pattern for every tensor, got none for:\n  {shortened(left)}"
            "\nend the patterns with '*': 0.0 (those stay base's) or '*': 1.0 (aligned's)"
        )
    chosen = {name: alpha[pattern] for name, pattern in found.items() if pattern is not None}
    _refuse_two_of_one(op, chosen, models)
    return chosen


def _first(name: str, patterns: Mapping[str, float]) -> str | None:
    """The first pattern that fits a name, as it is or without wrappers' parts."""
    short = bare(name)
    fits = (p for p in patterns if fnmatchcase(name, p) or fnmatchcase(short, p))
    return next(fits, None)


def _refuse_two_of_one(op: str, chosen: Mapping[str, float], models: Models) -> None:
    """Two alphas for one weight: the loaded model has but one value for both names."""
    for name, other in models.first.shared():
        apart = name in chosen and other in chosen and chosen[name] != chosen[other]
        if apart and models.twin(other, [name]) is not None:
            raise checks.fail(
                op,
                "alpha",
                f"one alpha for {name} and {other}, which are one tensor",
                f"{chosen[name]:g} and {chosen[other]:g}",
                f"give {other!r} and {name!r} the same",
            )
