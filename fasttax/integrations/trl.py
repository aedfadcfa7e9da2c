"""fasttax in TRL: its fused ops in place of TRL's own, and an exact KL to the reference.

from fasttax.integrations.trl import FullKL, FusedGKDMixin, patch

with patch():                          # or handle = patch("sft", "gkd"); handle.undo()
    trainer.train()

FullKL(trainer, ref_model, beta=0.1)   # beta * KL(policy || ref) in the loss of SFT, DPO, ...
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

from torch import Tensor

from fasttax._base import checks
from fasttax._base.handle import Handle

try:
    import trl

    from fasttax.integrations._full_kl import FullKL as FullKL
    from fasttax.integrations._trl_divergence import has_jsd, jsd_loss
    from fasttax.integrations._trl_targets import TARGETS, TESTED
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

    `.replaced` names the replacements, `.calls` counts how often each of them ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: list[str] = []
        self.calls: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced) if self.active else 'undone'})"


def patch(*trainers: Any, any_version: bool = False, quiet: bool = False) -> Patch:
    """Puts fasttax's ops in place of TRL's for the trainers named.

    They are log-probs and entropy from hidden states (SFT, DPO, KTO, GRPO, RLOO), the divergence
    from hidden states (Distillation) and of logits (GKD, GOLD), and log-probs of logits (ORPO, CPO
    with SimPO, OnlineDPO).

    Replaces names in TRL's modules, for every trainer in the process, until `undo()`. Losses,
    metrics and gradients stay TRL's up to rounding, under autocast too. What has no fasttax op goes
    on to TRL's: GOLD's `logits_are_probs` (ULD), an unreduced JSD.

    Args:
        trainers: names (or TRL's: "SFT", "SFTTrainer") among "sft", "dpo", "kto", "grpo", "rloo",
            "distillation", "gkd", "gold", "orpo", "cpo", "online_dpo", or trainers, or their
            classes; none is all of them.
        any_version: also patch a TRL other than 1.16; signatures are checked all the same.
        quiet: do not print what was replaced to stderr.

    Returns:
        A `Patch`, also a context manager.

    Raises:
        ValueError: a name that is none of these, or a trainer that has no op to replace.
        RuntimeError: another version of TRL, another signature than TRL 1.16's, or a patch that is
            still in place; nothing is replaced then.
    """
    names = {_name_of(t) for t in trainers} or set(CHOICES)
    if not any_version and not re.match(rf"{re.escape(TESTED)}(\.|$)", trl.__version__):
        raise RuntimeError(
            f"patch: trl: expected version {TESTED}, whose ops these replacements were tested "
            f"against, got {trl.__version__}; install trl=={TESTED}.*, or pass any_version=True to "
            "go by the signatures alone"
        )
    chosen = [target for target in TARGETS if names & set(target.trainers)]
    found = [(target, *target.find()) for target in chosen]
    handle = Patch()
    for target, owner, original in found:
        replacement = target.make(original, handle.calls, target.label)
        handle.replace(owner, target.name, replacement, target.label)
        handle.replaced.append(target.label)
    if not quiet:
        print(f"fasttax: replaced {', '.join(handle.replaced)}", file=sys.stderr)
    return handle


def _name_of(trainer: Any) -> str:
    if isinstance(trainer, str):
        spelled = {name: choice for choice, name in CHOICES.items()} | {
            name.removesuffix("Trainer"): choice for choice, name in CHOICES.items()
        }
        return checks.choice("patch", "trainers", spelled.get(trainer, trainer), tuple(CHOICES))
    classes = {
        c.__name__ for c in (trainer if isinstance(trainer, type) else type(trainer)).__mro__
    }
    for name, class_name in CHOICES.items():
        if class_name in classes:
            return name
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
