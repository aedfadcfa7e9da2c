"""What was measured of checkpoints, and what follows from it: tax, gain, frontier, laws, stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fasttax._base import checks
from fasttax.tax import checkpoints, frontier
from fasttax.tax.checkpoints import KINDS, SIDES, Checkpoint, Score, mean
from fasttax.tax.fits import PowerLaw, fit_power_law
from fasttax.tax.frontier import Curve, Point, TaxAt
from fasttax.tax.profiles import confidence_of
from fasttax.tax.quadratic import QuadraticLaw, fit_quadratic

KL_LAW = "tax against KL"  # names of the laws in `Measurements.fits`
STEP_LAW = "forgetting"
TASK_LAW = "tax against KL on the new task"
TASK_NAMES = {"ref_policy": "KL(base||policy)", "policy_ref": "KL(policy||base)"}

# What the base's own error may be where its standard error was not given, as variances in units of
# a checkpoint's: that of one measured in the same way, and of one measured with a quarter of it.
BASE_ERRORS = (1.0, 4.0)

Fitted = PowerLaw | QuadraticLaw


@dataclass(frozen=True)
class Stage:
    """A stage's last checkpoint.

    `tax` is the stage's own, `kept` the share of capability that it kept, `kept_so_far` the share
    that all stages up to it have kept.

    Example:
        >>> stages = report.compounding(run="dpo")
        >>> [(stage.checkpoint, round(stage.kept, 2)) for stage in stages]
        [('sft-200', 0.97), ('dpo-500', 0.95)]
    """

    name: str
    checkpoint: str
    tax: float
    kept: float
    kept_so_far: float


class Measurements:
    """A base, the checkpoints that came of it, and what their numbers say.

    The tax of a checkpoint is the capability that it lost, in capability's unit, positive for a
    loss; its gain is the alignment that it won (Askell et al. 2021, arXiv:2112.00861; Ouyang et al.
    2022, arXiv:2203.02155).
    """

    def __init__(
        self,
        op: str,
        capability: Score,
        alignment: Score,
        lower_is_better: Iterable[str],
        se: Score | None,
        n: int | Mapping[str, int] | None,
    ) -> None:
        sides = [lower_is_better] if isinstance(lower_is_better, str) else list(lower_is_better)
        self.lower_is_better = tuple(
            checks.choice(op, "lower_is_better", side, SIDES) for side in sides
        )
        able = checkpoints.scores(op, "capability", capability)
        aligned = checkpoints.scores(op, "alignment", alignment)
        self.base = Checkpoint(
            name="base",
            run="",
            stage="",
            step=0,
            capability=able,
            alignment=aligned,
            kl=0.0,
            distance=0.0,
            quadratic=0.0,
            se=checkpoints.errors(op, se, able, aligned),
            n=checkpoints.items(op, n, able, aligned),
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
        se: Score | None = None,
        seed: int | None = None,
        n: int | Mapping[str, int] | None = None,
        task_kl: Mapping[str, float] | None = None,
        quadratic: float | None = None,
    ) -> Checkpoint:
        """A checkpoint of `run`, in the order of training.

        Args:
            name: one that the run does not have yet with this seed.
            capability: numbers for the base's benchmarks.
            alignment: the same.
            kl: nats a token, >= 0, as `kl_to_base` gives it, on text that is the same for all.
            distance: >= 0, as `EWC.distance().total` is.
            run: the method, and what it was given: it has its own frontier, curve, laws and stages.
            stage: such as "sft" or "dpo", for `compounding`.
            step: of training, >= 0, for `forgetting`.
            se: standard errors: of the capability's mean, or numbers by benchmark and by
                "capability" or "alignment" for a side's mean.
            seed: of the training. Seeds of one run are what its intervals are over.
            n: items of each benchmark of the capability, or by benchmark: scores within [0, 1] are
                then read as shares of them, whose standard errors follow where `se` has none.
            task_kl: {"ref_policy": KL(base||policy), "policy_ref": KL(policy||base)} in nats a
                token on the NEW task's text, as `kl_both_ways` gives them, for `tax_vs_task_kl`.
            quadratic: 1/2 d^T F d in nats a token with the whole F, as `kl_quadratic` gives it on
                the text of `kl`: beside that it says how far the second order holds, beside
                `distance` what the diagonal leaves out.

        Raises:
            ValueError: a name that the run has already with the seed, other benchmarks than the
                base's, or numbers that are not finite.
        """
        op = "TaxReport.add"
        if any((c.name, c.run, c.seed) == (name, run, seed) for c in self.checkpoints):
            raise checks.fail(op, "name", f"one that run {run!r} does not have yet", name)
        at = checkpoints.at_least_0(op, "step", step)
        which = checkpoints.at_least_0(op, "seed", seed)
        able = checkpoints.scores(op, "capability", capability, like=self.base.capability)
        aligned = checkpoints.scores(op, "alignment", alignment, like=self.base.alignment)
        made = Checkpoint(
            name=str(name),
            run=str(run),
            stage=str(stage),
            step=None if at is None else int(at),
            capability=able,
            alignment=aligned,
            kl=checkpoints.at_least_0(op, "kl", kl),
            distance=checkpoints.at_least_0(op, "distance", distance),
            seed=None if which is None else int(which),
            se=checkpoints.errors(op, se, able, aligned),
            n=checkpoints.items(op, n, able, aligned),
            task_kl=checkpoints.task_kls(op, task_kl),
            quadratic=checkpoints.at_least_0(op, "quadratic", quadratic),
        )
        self.checkpoints.append(made)
        return made

    def tax(self, checkpoint: Checkpoint) -> float:
        """Capability lost since the base, positive for a loss."""
        lost = mean(self.base.capability) - mean(checkpoint.capability)
        return -lost if "capability" in self.lower_is_better else lost

    def taxes(self, checkpoint: Checkpoint) -> dict[str, float]:
        """The tax of each benchmark: a mean can hide that one fell."""
        sign = -1.0 if "capability" in self.lower_is_better else 1.0
        return {
            name: sign * (score - checkpoint.capability[name])
            for name, score in self.base.capability.items()
        }

    def tax_error(self, checkpoint: Checkpoint) -> float | None:
        """The tax's standard error: the checkpoint's own, with the base's where that is known.

        As of independent measurements: on the same items the difference has less.
        """
        own = self._error(checkpoint)
        return None if own is None else math.hypot(own, self._error(self.base) or 0.0)

    def _error(self, checkpoint: Checkpoint) -> float | None:
        """The standard error of a checkpoint's capability."""
        return checkpoint.error("capability", "capability" in self.lower_is_better)

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

    # --- methods at equal alignment ---------------------------------------------------------------

    def methods(self) -> dict[str, list[Curve]]:
        """Each run's frontiers, one a seed. A run is a method, its checkpoints what it offers."""
        return {
            run: [
                Curve(
                    [
                        Point(self.gain(c), self.tax(c), self._error(c))
                        for c in self.of(run)
                        if c.seed == seed
                    ]
                )
                for seed in dict.fromkeys(c.seed for c in self.of(run))
            ]
            for run in self.runs()
        }

    def tax_at(self, gain: float, confidence: float = 0.95) -> dict[str, TaxAt]:
        """{run: (tax, low, high, seeds)}: what each method costs at a gain in alignment.

        For each seed the tax is read off the run's own frontier, from the base through the
        checkpoints that no other one of that run and seed beats, linear between neighbours. The
        interval is Student's t over the seeds that reach the gain, or of a lone seed the normal one
        of its standard errors; the base's standard error, if given, is in both. A lone seed without
        standard errors has infinite ends. Runs that nowhere reach the gain are left out; nothing is
        extrapolated. Seeds are counted: where only some reach the gain they are the better ones.

        Args:
            gain: in alignment's unit.
            confidence: of the intervals, from 0.5 to 0.9999.
        """
        op = "TaxReport.tax_at"
        gain = checks.number(op, "gain", gain)
        confidence = confidence_of(op, confidence)
        base = self._error(self.base) or 0.0
        found = {run: frontier.estimate(curves, gain) for run, curves in self.methods().items()}
        return {
            run: estimate.interval(base, confidence)
            for run, estimate in found.items()
            if estimate is not None
        }

    def dominated(self, confidence: float = 0.95) -> dict[str, list[str]]:
        """The runs that others beat by more than noise, with those others' names.

        One beats another at a half, three quarters and all of the gain that all seeds of that other
        reach, by Welch's test at each. Without seeds or standard errors nothing is beyond noise.
        """
        return frontier.dominated(self.methods(), confidence_of("TaxReport.dominated", confidence))

    # --- how the tax grows ------------------------------------------------------------------------

    def tax_vs_kl(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a KL^b over the checkpoints whose KL was measured.

        b = 1/2 is proportional to the square root that over-optimisation of rewards is written in
        (Gao et al. 2022, arXiv:2210.10760). Raises ValueError with fewer than three.

        The intervals allow for the base's own error, which all taxes share, for correlated errors
        along a run, and for runs and seeds that differ (`fasttax.tax.noise`).
        """
        known = [(c, c.kl) for c in self.of(run) if c.kl is not None]
        return self._law("KL", known, confidence)

    def forgetting(self, run: str | None = None, confidence: float = 0.95) -> PowerLaw:
        """Tax = a step^b over a run's checkpoints: a law of fasttax's, through the base at step 0.

        Kalajdzievski (2024, arXiv:2401.05605) found forgetting, the cross-entropy to the base
        model's own predictions, to be a SHIFTED power law of steps and of the parameters that are
        tuned. This one has no shift; where a shifted one fits better, `lack_of_fit` says so.
        Raises ValueError with fewer than three checkpoints that have a step. Intervals are as of
        `tax_vs_kl`.
        """
        known = [(c, float(c.step)) for c in self.of(run) if c.step is not None]
        return self._law("step", known, confidence)

    def tax_vs_task_kl(
        self, kind: str = "ref_policy", run: str | None = None, confidence: float = 0.95
    ) -> QuadraticLaw:
        """Tax = a KL + b KL^2 with the KL on the NEW task's text, RL's Razor's predictor.

        Shenfeld et al. (2025, arXiv:2509.04259) found forgetting to follow KL(base||policy)
        there, whatever the method of training, by a quadratic law.

        Args:
            kind: "ref_policy" (KL(base||policy), theirs) or "policy_ref" (KL(policy||base)).
            run: one run's checkpoints; None: all, as theirs.
            confidence: of the intervals, which are as of `tax_vs_kl`.

        Raises:
            ValueError: another kind, or fewer than three checkpoints with that `task_kl`.
        """
        checks.choice("TaxReport.tax_vs_task_kl", "kind", kind, KINDS)
        known = [(c, c.task_kl[kind]) for c in self.of(run) if kind in c.task_kl]
        return fit_quadratic(
            [x for _, x in known],
            [self.tax(c) for c, _ in known],
            x_name=TASK_NAMES[kind],
            y_name="tax",
            confidence=confidence,
            runs=[c.trained for c, _ in known],
            shared=BASE_ERRORS,
        )

    def _law(
        self, x_name: str, known: list[tuple[Checkpoint, float]], confidence: float
    ) -> PowerLaw:
        """The power law of tax against x, of checkpoints with their x."""
        x, y = [x for _, x in known], [self.tax(c) for c, _ in known]
        runs = [c.trained for c, _ in known]

        def law(shared: float | tuple[float, ...]) -> PowerLaw:
            return fit_power_law(
                x, y, x_name=x_name, y_name="tax", confidence=confidence, runs=runs, shared=shared
            )

        found, base = law(BASE_ERRORS), self._error(self.base)
        if base is None or found.residual == 0:
            return found
        return law(min((base / found.residual) ** 2, 100.0))

    def fits(self) -> dict[str, Fitted | str]:
        """Every law that can be fitted, for all checkpoints and run by run, or why it can't.

        A power law whose exponent the points do not bound is none.
        """
        found = {KL_LAW: _or_why(self.tax_vs_kl)}
        if len(self.runs()) < 2:
            found[STEP_LAW] = _or_why(self.forgetting)
        else:
            # steps of different runs are not one axis, so that forgetting is fitted by run alone
            for run in self.runs():
                found[f"{KL_LAW}, {run}"] = _or_why(partial(self.tax_vs_kl, run))
                found[f"{STEP_LAW}, {run}"] = _or_why(partial(self.forgetting, run))
        for kind in KINDS:
            if any(kind in c.task_kl for c in self.checkpoints):
                found[f"{TASK_LAW}, {TASK_NAMES[kind]}"] = _or_why(
                    partial(self.tax_vs_task_kl, kind)
                )
        return found

    def kl_laws(self, runs: Sequence[str | None]) -> list[Fitted | str]:
        """`tax_vs_kl` of each, or why there is none."""
        return [_or_why(partial(self.tax_vs_kl, run)) for run in runs]

    def compounding(self, run: str | None = None, seed: int | None = None) -> list[Stage]:
        """A run's stages, each at its last checkpoint; `seed` is asked for where it has several.

        `kept` is the ratio of capability after it and before it (before and after, of a loss): if
        each stage takes a like share of what is left, the shares multiply. Raises ValueError for
        capabilities that are not positive, and for a stage that comes again after another.
        """
        mine = self.of(run)
        seeds = dict.fromkeys(c.seed for c in mine)
        if len(seeds) > 1:
            if seed not in seeds:
                names = ", ".join(map(repr, seeds))
                raise checks.fail("TaxReport.compounding", "seed", f"one of {names}", seed)
            mine = [c for c in mine if c.seed == seed]
        order = [name for name, _ in itertools.groupby(c.stage for c in mine)]
        last = {c.stage: c for c in mine}
        if len(order) > len(last):
            raise checks.fail(
                "TaxReport.compounding",
                "stage",
                "a stage's checkpoints one after another, in the order of training",
                " -> ".join(map(repr, order)),
                "name a stage that comes again anew, such as 'sft-2'",
            )
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


def _or_why(law: Callable[[], Fitted]) -> Fitted | str:
    """The law, or why there is none."""
    try:
        found = law()
    except (ValueError, ModuleNotFoundError) as error:
        return str(error)
    if isinstance(found, PowerLaw) and not found.bounded:
        return found.why_not()
    return found
