"""The names in TRL that `patch` replaces, and whether this TRL's own can be.

No version is asked for. Each target is looked at by itself: where TRL looks the name up, which
arguments it has, and whether a few tokens give the same numbers by TRL's op and by fasttax's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import trl

from fasttax.integrations import _trl_probes as probes
from fasttax.integrations import _trl_replacements as replacements

FUSED_HEAD = "add_fused_lm_head"  # by which a trainer's model calls the op


class Unfit(Exception):
    """Why a target is left alone."""


@dataclass(frozen=True)
class Place:
    """A name in TRL.

    Attributes:
        module: where it is bound.
        name: a function's, or a class's and its method's with a dot.
        user: the module whose functions look it up; "" for the same.
    """

    module: str
    name: str
    user: str = ""

    @property
    def label(self) -> str:
        """The whole dotted name."""
        return f"{self.module}.{self.name}"

    def tried(self) -> tuple[Any, str, Any] | Unfit:
        """As `find`, or the reason why not."""
        try:
            return self.find()
        except Unfit as reason:
            return reason

    def find(self) -> tuple[Any, str, Any]:
        """(owner, attribute, what it is bound to).

        Raises:
            Unfit: there is nothing, fasttax's own, or something that nobody looks up.
        """
        owner, _, attribute = self.name.rpartition(".")
        found: Any = _module(self.module)
        if owner:
            found = vars(found).get(owner)
        original = None if found is None else vars(found).get(attribute)
        if original is None:
            raise Unfit(f"trl {trl.__version__} has nothing of that name")
        if isinstance(getattr(original, "__func__", original), replacements.Replaced):
            raise Unfit("is patched by fasttax already; undo() that patch first")
        user = self.user or self.module
        _module(user)
        if attribute not in looked_up(user):
            raise Unfit(f"nothing in {user} looks it up in trl {trl.__version__}")
        return found, attribute, original


@dataclass(frozen=True)
class Fit:
    """A target as this TRL has it: owner.attribute may be replaced."""

    label: str
    owner: Any
    attribute: str
    original: Any


@dataclass(frozen=True)
class Target:
    """An op of TRL's and its replacement.

    Attributes:
        trainers: that it serves.
        places: where versions of TRL have it; the first that this one has is taken.
        required: arguments without which it is another op.
        known: all arguments, in order, that the replacement takes.
        make: (what TRL has there, a counter of calls, the label to count under) -> replacement.
        probe: calls an op that has such arguments.
        through: what each trainer's module must look up to come to the op, "" for nothing else.
    """

    trainers: tuple[str, ...]
    places: tuple[Place, ...]
    required: tuple[str, ...]
    known: tuple[str, ...]
    make: Callable[[Any, Counter[str], str], Any]
    probe: probes.Probe
    through: str = ""

    @property
    def label(self) -> str:
        """The whole dotted name where it is expected first."""
        return self.places[0].label

    def tried(self, named: Collection[str]) -> Fit | Unfit:
        """As `fit`, or the reason why not."""
        try:
            return self.fit(named)
        except Unfit as reason:
            return reason

    def fit(self, named: Collection[str]) -> Fit:
        """Where it is in this TRL, checked.

        Args:
            named: trainers that must be served by it; empty: any.

        Raises:
            Unfit: it can't be replaced.
        """
        place, (owner, attribute, original) = self._place()
        self._check_trainers(named)
        names = tuple(replacements.signature_of(original).parameters)
        in_order = tuple(name for name in self.known if name in names)
        if names != in_order or not set(self.required) <= set(names):
            raise Unfit(
                f"has the arguments ({', '.join(names)}) in trl {trl.__version__}, where "
                f"({', '.join(self.known)}) are known"
            )
        replacement = self.make(original, Counter(), place.label)
        try:
            own, other = _called(original), _called(replacement)
            difference = probes.disagreement(self.probe, names, own, other)
        except Exception as error:
            raise Unfit(f"failed on a few tokens: {type(error).__name__}: {error}") from error
        if difference:
            raise Unfit(f"{difference}, in trl {trl.__version__}")
        return Fit(place.label, owner, attribute, original)

    def _place(self) -> tuple[Place, tuple[Any, str, Any]]:
        tried = [(place, place.tried()) for place in self.places]
        for place, found in tried:
            if not isinstance(found, Unfit):
                return place, found
        reason = tried[0][1]
        assert isinstance(reason, Unfit)
        raise reason

    def _check_trainers(self, named: Collection[str]) -> None:
        if not self.through:
            return
        reasons = {}
        for trainer in self.trainers:
            module = f"trl.trainer.{trainer}_trainer"
            try:
                _module(module)
                if self.through not in looked_up(module):
                    reasons[trainer] = f"{module} does not use it in trl {trl.__version__}"
            except Unfit as error:
                reasons[trainer] = str(error)
        wanted = [t for t in self.trainers if t in named]
        for trainer in wanted or self.trainers:
            if trainer in reasons and (wanted or len(reasons) == len(self.trainers)):
                raise Unfit(reasons[trainer])


def _called(original: Any) -> Callable[..., Any]:
    """What is called of a static method, an autograd.Function, a function."""
    if isinstance(original, staticmethod):
        return original.__func__
    if inspect.isclass(original):
        apply: Callable[..., Any] = getattr(original, "apply", original)
        return apply
    called: Callable[..., Any] = original
    return called


def _module(name: str) -> Any:
    """A module of TRL's.

    Raises:
        Unfit: there is none, or it needs what is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise Unfit(f"trl {trl.__version__} has no module {name}") from error
        raise Unfit(f"{name} can't be imported: {error}") from error
    except Exception as error:
        raise Unfit(f"{name} can't be imported: {type(error).__name__}: {error}") from error


@cache
def looked_up(module: str) -> frozenset[str]:
    """The names that a module's functions look up as globals, attributes or by an import."""
    spec = importlib.util.find_spec(module)
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(module) if hasattr(loader, "get_code") else None
    return frozenset() if code is None else frozenset(_names(code))


def _names(code: CodeType) -> Iterator[str]:
    # a module's own code and a class's body bind names; those of functions use them
    if code.co_flags & inspect.CO_OPTIMIZED:
        yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


# --- the targets ----------------------------------------------------------------------------------

LOGPROB = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
DIVERGENCE = (
    *("student_hidden", "student_weight", "student_bias"),
    *("teacher_hidden", "teacher_weight", "teacher_bias", "beta", "temperature"),
    *("student_logit_scale", "student_final_logit_softcapping"),
    *("teacher_logit_scale", "teacher_final_logit_softcapping"),
)
LOSS = (
    *("student_hidden_states", "teacher_hidden_states"),
    *("student_lm_head_weight", "teacher_lm_head_weight", "completion_mask", "beta"),
    *("num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias"),
    *("student_logit_scale", "teacher_logit_scale"),
    *("student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature"),
)
JSD = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
JSD_ALL = (*JSD, "logits_are_probs", "num_items_in_batch")
SELECTIVE = ("logits", "index")
SELECTIVE_ALL = (*SELECTIVE, "temperature", "row_mask")
ONLINE = ("self", "model", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
ONLINE_ALL = (*ONLINE, "vision_inputs")

DISTILLATION = "trl.trainer.distillation_trainer"
KERNELS = "trl.kernels.chunked_divergence"


def _experimental(trainer: str, name: str) -> tuple[Place, ...]:
    return (Place(f"trl.experimental.{trainer}.{trainer}_trainer", name),)


TARGETS = (
    Target(
        ("sft", "dpo", "kto", "grpo", "rloo"),
        (Place("trl.trainer.utils", "_ChunkedLogProbFunction"),),
        LOGPROB,
        LOGPROB,
        replacements.logprob,
        probes.logprob,
        through=FUSED_HEAD,
    ),
    Target(
        ("distillation",),
        (
            Place(DISTILLATION, "ChunkedDivergenceFunction"),
            Place(KERNELS, "ChunkedDivergenceFunction", user=DISTILLATION),
        ),
        DIVERGENCE,
        DIVERGENCE,
        replacements.divergence,
        probes.divergence,
    ),
    Target(
        ("distillation",),
        (Place(DISTILLATION, "_chunked_divergence_loss"),),
        LOSS,
        LOSS,
        replacements.whole_divergence,
        probes.whole_divergence,
    ),
    Target(
        ("gkd",),
        _experimental("gkd", "GKDTrainer.generalized_jsd_loss"),
        JSD,
        JSD_ALL,
        replacements.jsd,
        probes.jsd,
    ),
    Target(
        ("gold",),
        _experimental("gold", "GOLDTrainer.generalized_jsd_loss"),
        JSD,
        JSD_ALL,
        replacements.jsd,
        probes.jsd,
    ),
    Target(
        ("orpo",),
        _experimental("orpo", "selective_log_softmax"),
        SELECTIVE,
        SELECTIVE_ALL,
        replacements.selective,
        probes.selective,
    ),
    Target(
        ("cpo",),
        _experimental("cpo", "selective_log_softmax"),
        SELECTIVE,
        SELECTIVE_ALL,
        replacements.selective,
        probes.selective,
    ),
    Target(
        ("online_dpo",),
        _experimental("online_dpo", "OnlineDPOTrainer._forward"),
        ONLINE,
        ONLINE_ALL,
        replacements.online,
        probes.online,
    ),
)
