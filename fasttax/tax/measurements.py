"""What was measured of checkpoints, and what follows from it: tax, gain, frontier, laws, stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fasttax._base import checks
from fasttax.tax.fits import PowerLaw, fit_power_law

Score = float | Mapping[str, float]
SIDES = ("capability", "alignment")
KL_LAW = "tax against KL"  # names of the laws in `Measurements.fits`
STEP_LAW = "forgetting"


@dataclass(frozen=True)
class Checkpoint:
    """A model that was measured.

    `capability` and `alignment` are by benchmark, `kl` is in nats a token from the base, `distance`
    is the sum of Fisher times squared change.
    """

    name: str
    run: str
    stage: str
    step: int | None
    capability: Mapping[str, float]
    alignment: Mapping[str, float]
    kl: float | None
    distance: float | None

    @property
    def label(self) -> str:
        """Run, stage and name, as far as there are any."""
        return " ".join(filter(None, (self.run, self.stage, self.name)))


@dataclass(frozen=True)
class Stage:
    """A stage's last checkpoint.

    `tax` is the stage's own, `kept` the share of capability that it kept, `kept_so_far` the share
    that all stages up to it have kept.
    """

    name: str
    checkpoint: str
    tax: float
    kept: float
    kept_so_far: float


def mean(scores: Mapping[str, float]) -> float:
    """The mean over benchmarks, which stands for a side."""
    return sum(scores.values()) / len(scores)


class Measurements:
    """A base, the checkpoints that came of it, and what their numbers say.

    The tax of a checkpoint is the capability that it lost, in capability's unit, positive for a
    loss; its gain is the alignment that it won (Askell et al. 2021, arXiv:2112.00861; Ouyang et al.
    2022, arXiv:2203.02155).
    """

    def __init__(
        self, op: str, capability: Score, alignment: Score, lower_is_better: Iterable[str]
    ) -> None:
        sides = [lower_is_better] if isinstance(lower_is_better, str) else list(lower_is_better)
        self.lower_is_better = tuple(
            checks.choice(op, "lower_is_better", side, SIDES) for side in sides
        )
        self.base = Checkpoint(
            name="base",
            run="",
            stage="",
            step=0,
            capability=_scores(op, "capability", capability),
            alignment=_scores(op, "alignment", alignment),
            kl=0.0,
            distance=0.0,
        )
        self.checkpoints: list[Checkpoint] = []

    def add(
        self,
        name: str,
        capability: Score,
        alignment: Score,
        *,
        kl: float | None = None,
        distance: float | None = None,
        run: str = "",
        stage: str = "",
        step: int | None = None,
    ) -> Checkpoint:
        """A checkpoint of `run`, in the order of training.

        Args:
            name: one that the run does not have yet.
            capability: numbers for the base's benchmarks.
            alignment: the same.
            kl: nats a token, >= 0, as `kl_to_base` gives it.
            distance: >= 0, as `EWC.distance().total` is.
            run: a run has its own curve, laws and stages.
            stage: such as "sft" or "dpo", for `compounding`.
            step: of training, >= 0, for `forgetting`.

        Raises:
            ValueError: a name that the run has already, other benchmarks than the base's, or
                numbers that are not finite.
        """
        op = "TaxReport.add"
        if any((c.name, c.run) == (name, run) for c in self.checkpoints):
            raise checks.fail(op, "name", f"one that run {run!r} does not have yet", name)
        at = _at_least_0(op, "step", step)
        made = Checkpoint(
            name=str(name),
            run=str(run),
            stage=str(stage),
            step=None if at is None else int(at),
            capability=_scores(op, "capability", capability, like=self.base.capability),
            alignment=_scores(op, "alignment", alignment, like=self.base.alignment),
            kl=_at_least_0(op, "kl", kl),
            distance=_at_least_0(op, "distance", distance),
        )
        self.checkpoints.append(made)
        return made

    def tax(self, checkpoint: Checkpoint) -> float:
        """Capability lost since the base, positive for a loss."""
        lost = mean(self.base.capability) - mean(checkpoint.capability)
        return -lost if "capability" in self.lower_is_better else lost

    def gain(self, checkpoint: Checkpoint) -> float:
        """Alignment won since the base."""
        won = mean(checkpoint.alignment) - mean(self.base.alignment)
        return -won if "alignment" in self.lower_is_better else won

    def with_base(self) -> list[Checkpoint]:
        """The base, then every checkpoint."""
        return [self.base, *self.checkpoints]

    def runs(self) -> list[str]:
        """The runs' names, in the order in which they first came."""
        return list(dict.fromkeys(c.run for c in self.checkpoints))

    def of(self, run: str | None) -> list[Checkpoint]:
        """A run's checkpoints, or with None all of them."""
        if run is None:
            return list(self.checkpoints)
        found = [c for c in self.checkpoints if c.run == run]
        if not found:
            runs = ", ".join(map(repr, self.runs())) or "none yet"
            raise checks.fail("TaxReport", "run", f"one of {runs}", run)
        return found

    def pareto(self) -> list[Checkpoint]:
        """The base and the checkpoints that no other one beats, by gain.

        One beats another that is as good in both gain and tax and better in one.
        """

        def beats(a: Checkpoint, b: Checkpoint) -> bool:
            one, other = (self.gain(a), -self.tax(a)), (self.gain(b), -self.tax(b))
            return one != other and one[0] >= other[0] and one[1] >= other[1]

        best = [c for c in self.with_base() if not any(beats(o, c) for o in self.with_base())]
        return sorted(best, key=self.gain)

    # --- how the tax grows ------------------------------------------------------------------------

    def tax_vs_kl(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a KL^b over the checkpoints whose KL was measured.

        b = 1/2 is proportional to the square root that over-optimisation of rewards is written in
        (Gao et al. 2022, arXiv:2210.10760). Raises ValueError with fewer than three.
        """
        known = [(c.kl, self.tax(c)) for c in self.of(run) if c.kl is not None]
        return _law("KL", known, confidence)

    def forgetting(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a step^b over a run's checkpoints, the power law of forgetting.

        The law is Kalajdzievski's (2024, arXiv:2401.05605). Raises ValueError with fewer than three
        checkpoints that have a step.
        """
        known = [(float(c.step), self.tax(c)) for c in self.of(run) if c.step is not None]
        return _law("step", known, confidence)

    def fits(self) -> dict[str, PowerLaw | str]:
        """Every law that can be fitted, for all checkpoints and run by run, or why it can't."""
        if len(self.runs()) < 2:
            return {KL_LAW: _or_why(self.tax_vs_kl), STEP_LAW: _or_why(self.forgetting)}
        # steps of different runs are not one axis, so that forgetting is fitted by run alone
        found = {KL_LAW: _or_why(self.tax_vs_kl)}
        for run in self.runs():
            found[f"{KL_LAW}, {run}"] = _or_why(self.tax_vs_kl, run)
            found[f"{STEP_LAW}, {run}"] = _or_why(self.forgetting, run)
        return found

    def compounding(self, run: str | None = None) -> list[Stage]:
        """A run's stages, each at its last checkpoint.

        `kept` is the ratio of capability after it and before it (before and after, of a loss): if
        each stage takes a like share of what is left, the shares multiply. Raises ValueError for
        capabilities that are not positive.
        """
        last = {c.stage: c for c in self.of(run)}
        stages, before, so_far = [], self.base, 1.0
        for name, c in last.items():
            kept = self._kept(before, c)
            so_far *= kept
            stages.append(Stage(name, c.name, self.tax(c) - self.tax(before), kept, so_far))
            before = c
        return stages

    def _kept(self, before: Checkpoint, after: Checkpoint) -> float:
        """The share of capability that is left after a stage."""
        old, new = mean(before.capability), mean(after.capability)
        if min(old, new) <= 0:
            raise checks.fail(
                "TaxReport.compounding",
                "capability",
                "positive numbers, of which shares are kept",
                f"{min(old, new):g}",
            )
        return old / new if "capability" in self.lower_is_better else new / old

    # --- in words ---------------------------------------------------------------------------------

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): the base, then every checkpoint; * marks those on the frontier."""
        headings = [
            "checkpoint",
            "step",
            "capability",
            "alignment",
            "gain",
            "tax",
            "tax %",
            "KL to base",
            "EWC distance",
        ]
        best = {id(c) for c in self.pareto()}
        return headings, [self._row(c, " *" if id(c) in best else "") for c in self.with_base()]

    def _row(self, c: Checkpoint, mark: str) -> list[str]:
        tax, start = self.tax(c), abs(mean(self.base.capability))
        return [
            c.label + mark,
            _cell(c.step, "d"),
            _cell(mean(c.capability)),
            _cell(mean(c.alignment)),
            _cell(self.gain(c), "+.4g"),
            _cell(tax, "+.4g"),
            _cell(tax / start if start else None, "+.1%"),
            _cell(c.kl),
            _cell(c.distance),
        ]

    def stage_lines(self) -> list[str]:
        """`compounding` in words, for the runs that have stages."""
        lines = []
        for run in self.runs():
            if not any(c.stage for c in self.of(run)):
                continue
            try:
                stages = self.compounding(run)
            except ValueError as error:
                lines.append(str(error))
                continue
            name = f"{run}: " if run else ""
            lines += [
                f"{name}{s.name or s.checkpoint} took {s.tax:+.4g} and kept {s.kept:.1%}; so far "
                f"{s.kept_so_far:.1%} of the base is kept"
                for s in stages
            ]
        return lines


def _scores(
    op: str, argument: str, value: Score, like: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Finite numbers by benchmark; a lone number's benchmark has the argument's name."""
    if isinstance(value, Mapping):
        scores = {str(k): checks.number(op, f"{argument}[{str(k)!r}]", v) for k, v in value.items()}
    else:
        scores = {argument: checks.number(op, argument, value)}
    if not scores:
        raise checks.fail(op, argument, "a number, or numbers by benchmark", value)
    if like is not None and scores.keys() != like.keys():
        raise checks.fail(
            op,
            argument,
            f"the base's benchmarks ({', '.join(like)})",
            ", ".join(scores),
            "measure the same ones for every checkpoint",
        )
    return scores


def _at_least_0(op: str, argument: str, value: float | None) -> float | None:
    """A number that was measured, >= 0, or None for one that was not."""
    return None if value is None else checks.number(op, argument, value, low=0)


def _cell(value: float | None, form: str = ".4g") -> str:
    """A number of the table; empty where nothing was measured."""
    return "" if value is None else format(value, form)


def _law(x_name: str, points: list[tuple[float, float]], confidence: float) -> PowerLaw:
    """The power law of tax against x, through points (x, tax)."""
    x, y = [p for p, _ in points], [q for _, q in points]
    return fit_power_law(x, y, x_name=x_name, y_name="tax", confidence=confidence)


def _or_why(law: Callable[[str | None], PowerLaw], run: str | None = None) -> PowerLaw | str:
    """The law, or why it can't be fitted."""
    try:
        return law(run)
    except ValueError as error:
        return str(error)
