"""fasttax in TRL: its fused ops in place of TRL's own, and an exact KL to the reference.

    with patch():                          # or handle = patch("sft", "gkd"); handle.undo()
        trainer.train()

    FullKL(trainer, ref_model, beta=0.1)   # beta * KL(policy || ref) in the loss of SFT, DPO, ...

Each returns a handle, whose `undo()` takes it back.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from typing import Any

from torch import Tensor

from fasttax._base import checks
from fasttax._base.handle import Handle

try:
    importlib.import_module("trl")  # before what it needs, so that an error names it

    from fasttax.integrations._full_kl import FullKL as FullKL
    from fasttax.integrations._trl_divergence import has_jsd, jsd_loss
    from fasttax.integrations._trl_targets import TARGETS, Fit, Target, Unfit
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.trl: {error.name} is not installed; run `pip install "
        "'fasttax[trl]'`",
        name=error.name,
    ) from error

__all__ = ["FullKL", "FusedGKDMixin", "Patch", "patch"]

CHOICES = {
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
    "distillation": "DistillationTrainer",
    "gkd": "GKDTrainer",
    "gold": "GOLDTrainer",
    "orpo": "ORPOTrainer",
    "cpo": "CPOTrainer",
    "online_dpo": "OnlineDPOTrainer",
}


class Patch(Handle):
    """What `patch` did; `undo()` puts TRL's own back.

    `.patched` names what was replaced, `.skipped` has for each name that was left alone the reason,
    `.calls` counts how often each replacement ran.

    Example:
        >>> from fasttax.integrations.trl import patch
        >>> patched = patch("sft")
        >>> patched.skipped  # a reason for each name that was left alone
        {}
        >>> patched.undo()
    """

    def __init__(self) -> None:
        super().__init__()
        self.patched: list[str] = []
        self.skipped: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def __repr__(self) -> str:
        if not self.active:
            return "Patch(undone)"
        skipped = f", skipped {len(self.skipped)}" if self.skipped else ""
        return f"Patch({', '.join(self.patched)}{skipped})"


def patch(*trainers: Any, strict: bool = False, quiet: bool = False) -> Patch:
    """Puts fasttax's ops in place of TRL's for the trainers named.

    They are log-probs and entropy from hidden states (SFT, DPO, KTO, GRPO, RLOO), the divergence
    from hidden states (Distillation) and of logits (GKD, GOLD), and log-probs of logits (ORPO, CPO
    with SimPO, OnlineDPO).

    Replaces names in TRL's modules, for every trainer in the process, until `undo()`. Losses,
    metrics and gradients stay TRL's up to rounding, under autocast too. What has no fasttax op goes
    on to TRL's: GOLD's `logits_are_probs` (ULD), an unreduced JSD.

    No version of TRL is asked for: each name is replaced where this TRL looks it up, has the
    arguments that are known, and gives the same numbers and gradients as fasttax's op on a few
    tokens, which are computed here. What does not fit is left as it is.

    Args:
        trainers: names (or TRL's: "SFT", "SFTTrainer") among "sft", "dpo", "kto", "grpo", "rloo",
            "distillation", "gkd", "gold", "orpo", "cpo", "online_dpo", or trainers, or their
            classes; none is all of them.
        strict: refuse where anything does not fit.
        quiet: do not print to stderr what was replaced and what was left alone.

    Returns:
        A `Patch` with `.patched` and `.skipped`, also a context manager.

    Raises:
        ValueError: a name that is none of these, or a trainer that has no op to replace.
        RuntimeError: nothing fits, a trainer that was named does not, or with `strict` anything
            does not; nothing is replaced then.

    Example:
        >>> from fasttax.integrations.trl import patch
        >>> with patch("sft"):
        ...     result = trainer.train()
    """
    named = {_name_of(t) for t in trainers}
    chosen = [target for target in TARGETS if not named or named & set(target.trainers)]
    handle = Patch()
    found: list[tuple[Target, Fit]] = []
    for target in chosen:
        tried = target.tried(named)
        if isinstance(tried, Unfit):
            handle.skipped[target.label] = str(tried)
        else:
            found.append((target, tried))
    if handle.skipped and (named or strict or not found):
        raise _does_not_fit(handle.skipped, found, bool(named))
    for target, fit in found:
        replacement = target.make(fit.original, handle.calls, fit.label)
        handle.replace(fit.owner, fit.attribute, replacement, fit.label)
        handle.patched.append(fit.label)
    if not quiet:
        print(f"fasttax: replaced {', '.join(handle.patched)}", file=sys.stderr)
        for label, why in handle.skipped.items():
            print(f"fasttax: left alone {label}: {why}", file=sys.stderr)
    return handle


def _does_not_fit(
    skipped: dict[str, str], found: list[tuple[Target, Fit]], named: bool
) -> RuntimeError:
    """The error that lists what does not fit, and what would."""
    reasons = "; ".join(f"{label} {reason}" for label, reason in skipped.items())
    fitting = sorted({name for target, _ in found for name in target.trainers})
    if found and not named:
        way_out = "leave strict out to patch the others"
    elif found:
        way_out = f"patch({', '.join(map(repr, fitting))}) fits"
    else:
        way_out = "train without patch: FullKL and attach need none"
    return RuntimeError(f"patch: expected ops that fasttax's fit, got {reasons}; {way_out}")


def _name_of(trainer: Any) -> str:
    if isinstance(trainer, str):
        spelled = {name: choice for choice, name in CHOICES.items()} | {
            name.removesuffix("Trainer"): choice for choice, name in CHOICES.items()
        }
        return checks.choice("patch", "trainers", spelled.get(trainer, trainer), tuple(CHOICES))
    names = {class_name: name for name, class_name in CHOICES.items()}
    classes = (trainer if isinstance(trainer, type) else type(trainer)).__mro__
    for c in classes:  # the nearest: GKDTrainer is an SFTTrainer
        if c.__name__ in names:
            return names[c.__name__]
    raise checks.fail(
        "patch",
        "trainers",
        f"one of {', '.join(map(repr, CHOICES))}, or a trainer of these kinds",
        trainer,
    )


class FusedGKDMixin:
    """fasttax's divergence in one trainer class, with nothing patched.

    `class Trainer(FusedGKDMixin, GKDTrainer): ...`, or GOLDTrainer.

    Overrides the public static method `generalized_jsd_loss`. (GOLD's cross-tokenizer loss calls
    GOLDTrainer's by name: `patch("gold")`.)

    Example:
        >>> from trl.experimental.gkd import GKDTrainer
        >>> from fasttax.integrations.trl import FusedGKDMixin
        >>> class Trainer(FusedGKDMixin, GKDTrainer):
        ...     pass
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [c.__name__ for c in cls.__mro__]
        if not any(
            name in order[order.index("FusedGKDMixin") :] for name in ("GKDTrainer", "GOLDTrainer")
        ):
            bases = ", ".join(b.__name__ for b in cls.__bases__)
            raise checks.fail(
                "FusedGKDMixin",
                "bases",
                "(FusedGKDMixin, GKDTrainer) or (FusedGKDMixin, GOLDTrainer)",
                f"({bases})",
                error=TypeError,
            )

    @staticmethod
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        *,
        logits_are_probs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss by fasttax's op, or by TRL's where fasttax has none for these arguments."""
        if logits_are_probs or not has_jsd(reduction, num_items_in_batch):
            # GKD's own is the same but for logits_are_probs
            from trl.experimental.gold import GOLDTrainer

            return GOLDTrainer.generalized_jsd_loss(
                student_logits,
                teacher_logits,
                labels=labels,
                beta=beta,
                temperature=temperature,
                reduction=reduction,
                logits_are_probs=logits_are_probs,
                num_items_in_batch=num_items_in_batch,
            )
        return jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )
