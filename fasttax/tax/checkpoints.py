"""A measured model: its scores by benchmark, their errors, and what else was measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fasttax._base import checks
from fasttax._base.optional import given

Score = float | Mapping[str, float]
SIDES = ("capability", "alignment")
KINDS = ("ref_policy", "policy_ref")  # of a KL on the new task's prompts


@dataclass(frozen=True)
class Checkpoint:
    """A model that was measured.

    `capability` and `alignment` are by benchmark, `kl` is in nats a token from the base, `distance`
    is the sum of Fisher times squared change. `se` has standard errors by benchmark, or under
    "capability" and "alignment" of the means; `n` numbers of items by benchmark; `task_kl` the KL
    on the new task's prompts by kind; `quadratic` 1/2 d^T F d beside `kl`, as `kl_quadratic` has
    it.

    Example:
        >>> last = report.checkpoints[-1]
        >>> last.name, last.run, last.kl
        ('dpo-500', 'dpo', 0.8)
    """

    name: str
    run: str
    stage: str
    step: int | None
    capability: Mapping[str, float]
    alignment: Mapping[str, float]
    kl: float | None
    distance: float | None
    seed: int | None = None
    se: Mapping[str, float] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    task_kl: Mapping[str, float] = field(default_factory=dict)
    quadratic: float | None = None

    @property
    def label(self) -> str:
        """Run, seed, stage and name, as far as there are any."""
        seed = given(self.seed, lambda number: f"seed {number}")
        return " ".join(filter(None, (self.run, seed, self.stage, self.name)))

    @property
    def trained(self) -> str:
        """The training that it came of: a run with one seed."""
        return f"{self.run}, seed {self.seed}"

    def error(self, side: str, losses: bool = False) -> float | None:
        """The standard error of a side's mean, None where it is not known.

        `losses`: the side's scores are no shares of items.
        """
        if side in self.se:
            return self.se[side]
        scores: Mapping[str, float] = getattr(self, side)
        errors = [self.benchmark_error(side, name, losses) for name in scores]
        known = [e for e in errors if e is not None]
        if len(known) < len(errors):
            return None
        return math.sqrt(sum(e * e for e in known)) / len(known)

    def benchmark_error(self, side: str, name: str, losses: bool = False) -> float | None:
        """The standard error of one score: as given, or a share's of `n` items.

        The mean of n values within [0, 1] has at most the variance p (1 - p) / n; two items more of
        either outcome keep it above 0 where all have one (Agresti & Coull 1998).
        """
        if name in self.se:
            return self.se[name]
        score = getattr(self, side)[name]
        if name not in self.n or losses or not 0 <= score <= 1:
            return None
        items = self.n[name]
        share = (items * score + 2) / (items + 4)
        return math.sqrt(share * (1 - share) / items)


def mean(scores: Mapping[str, float]) -> float:
    """The mean over benchmarks, which stands for a side."""
    return sum(scores.values()) / len(scores)


def scores(
    op: str, argument: str, value: Score, like: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Finite numbers by benchmark; a lone number's benchmark has the argument's name."""
    if isinstance(value, Mapping):
        found = {str(k): checks.number(op, f"{argument}[{str(k)!r}]", v) for k, v in value.items()}
    else:
        found = {argument: checks.number(op, argument, value)}
    if not found:
        raise checks.fail(op, argument, "a number, or numbers by benchmark", value)
    if like is not None and found.keys() != like.keys():
        raise checks.fail(
            op,
            argument,
            f"the base's benchmarks ({', '.join(like)})",
            ", ".join(found),
            "measure the same ones for every checkpoint",
        )
    return found


def errors(
    op: str, value: Score | None, capability: Mapping[str, float], alignment: Mapping[str, float]
) -> dict[str, float]:
    """Standard errors by benchmark or side; a lone number is the capability's mean's."""
    if value is None:
        return {}
    named = value if isinstance(value, Mapping) else {"capability": value}
    _known(op, "se", named, (*SIDES, *capability, *alignment))
    return {str(k): checks.number(op, f"se[{k!r}]", v, low=0) for k, v in named.items()}


def items(
    op: str,
    value: int | Mapping[str, int] | None,
    capability: Mapping[str, float],
    alignment: Mapping[str, float],
) -> dict[str, int]:
    """Numbers of items by benchmark; a lone number is each of the capability's."""
    if value is None:
        return {}
    named = value if isinstance(value, Mapping) else dict.fromkeys(capability, value)
    _known(op, "n", named, (*capability, *alignment))
    return {str(k): checks.count(op, f"n[{k!r}]", v) for k, v in named.items()}


def task_kls(op: str, value: Mapping[str, float] | None) -> dict[str, float]:
    """KLs on the new task's prompts by kind."""
    named = value or {}
    _known(op, "task_kl", named, KINDS)
    return {k: checks.number(op, f"task_kl[{k!r}]", v, low=0) for k, v in named.items()}


def _known(op: str, argument: str, named: Mapping[str, object], names: tuple[str, ...]) -> None:
    strange = [str(name) for name in named if name not in names]
    if strange:
        choices = ", ".join(map(repr, dict.fromkeys(names)))
        raise checks.fail(op, argument, f"numbers by {choices}", ", ".join(map(repr, strange)))


def at_least_0(op: str, argument: str, value: float | None) -> float | None:
    """A number that was measured, >= 0, or None for one that was not."""
    return None if value is None else checks.number(op, argument, value, low=0)
