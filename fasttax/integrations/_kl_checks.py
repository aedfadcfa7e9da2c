"""Which trainers FullKL serves, and why it refuses the others as it is made."""

from __future__ import annotations

import re
import sys
from typing import Any

from fasttax._base import checks
from fasttax.integrations._trainer import check_trainer, refuse_own_loop, refuse_scattered

OP = "FullKL"
GENERATING = ("GRPOTrainer", "RLOOTrainer")
COUNTED_SINCE_1_9 = (*GENERATING, "DPOTrainer", "KTOTrainer")


def is_a(trainer: Any, *names: str) -> bool:
    """Whether one of the trainer's classes has such a name: TRL need not be imported for it."""
    return any(c.__name__ in names for c in type(trainer).__mro__)


def check_served(trainer: Any) -> None:
    """Refuses a trainer in which the KL would be wrong or missing."""
    check_trainer(OP, trainer, "a transformers.Trainer or one of TRL's")
    refuse_own_loop(
        OP, trainer, "the KL", "use its own kl_coef, or GRPO or RLOO, which FullKL works in"
    )
    if is_a(trainer, "RewardTrainer"):
        raise checks.fail(
            OP,
            "trainer",
            "one of a model that predicts tokens",
            f"{type(trainer).__name__}, whose model scores whole sequences",
            "hold it by attach(trainer, ewc=ewc)",
        )
    refuse_scattered(OP, trainer)
    if trainer.args.n_gpu > 1:
        raise checks.fail(
            OP,
            "trainer",
            "one GPU a process",
            f"DataParallel over {trainer.args.n_gpu}",
            "launch with torchrun or accelerate",
        )
    _check_trl(trainer)
    if hasattr(trainer.compute_loss, "fasttax_full_kl"):
        raise checks.fail(
            OP,
            "trainer",
            "one without a FullKL",
            "one that has it already",
            "undo() that one first",
        )
    if is_a(trainer, "GRPOTrainer") and trainer.beta != 0:
        raise checks.fail(
            OP,
            "trainer",
            "GRPO with beta=0.0, whose k3 estimate this takes the place of",
            f"beta={trainer.beta:g}",
            "pass GRPOConfig(beta=0.0) and the coefficient here",
        )


def _check_trl(trainer: Any) -> None:
    """Refuses trainers of a TRL in which their losses' tokens are not known.

    Raises:
        RuntimeError: DPO, KTO, GRPO or RLOO of TRL before 1.9.
    """
    trl: Any = sys.modules.get("trl")
    of_trl = [c for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if trl is None or not any(c.__name__ in COUNTED_SINCE_1_9 for c in of_trl):
        return
    if tuple(map(int, re.findall(r"\d+", trl.__version__)[:2])) < (1, 9):
        raise checks.fail(
            OP,
            "trainer",
            f"{of_trl[0].__name__} of trl >= 1.9",
            f"that of trl {trl.__version__}",
            "install trl>=1.9; or take SFTTrainer, which is served in every version",
            RuntimeError,
        )
