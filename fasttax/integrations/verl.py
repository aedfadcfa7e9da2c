"""fasttax in verl: the top-k distillation loss with its tail, so that nothing is clamped.

    from fasttax.integrations.verl import patch

    patch()        # in the actor's process, as of a module in actor_rollout_ref.model.external_lib

verl's own `forward_kl_topk` sums p (log p - log q) over the teacher's k tokens. Neither side sums
to 1 there, so the sum can be below 0 where the student gives the k tokens more mass, and verl
clamps it: those tokens have no gradient. With a ghost token for the rest it is a KL. Written
against verl 0.9; `fasttax.integrations.rlhf` has the KLs to a reference over the whole vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax._base.choices import KlKind
from fasttax._base.handle import Handle
from fasttax.kl import token_stats, topk_kl
from fasttax.kl.call import KINDS
from fasttax.kl.topk import TAILS

OP = "verl.patch"
MODULE = "verl.trainer.distillation.fsdp.losses"
NAME = "compute_forward_kl_topk"
KNOWN = (
    *("student_logits", "teacher_topk_log_probs", "teacher_topk_ids"),
    *("config", "data_format"),
)


def patch(*, kind: KlKind = "ref_policy", tail: str = "ghost", quiet: bool = False) -> Handle:
    """Puts the tail-aware top-k KL in the place of verl's, for loss_mode: forward_kl_topk.

    Of FSDP, FSDP2 and VeOmni engines; Megatron's, whose vocabulary is sharded, is left alone. The
    metrics (mass, overlap) stay verl's. `log_prob_min_clamp` is not used: no log-prob is outside of
    a distribution here.

    Args:
        kind: "ref_policy" is KL(teacher || student), as verl's; "policy_ref", "jsd".
        tail: "ghost", or "renormalize", as in `topk_kl`.
        quiet: do not print to stderr what was replaced.

    Returns:
        A handle with `undo()`; also a context manager.

    Raises:
        ModuleNotFoundError: verl is not installed.
        ValueError: a choice does not fit.
        RuntimeError: this verl has no such function, or one with other arguments.

    Example:
        >>> from fasttax.integrations import verl
        >>> with verl.patch(tail="ghost"):  # in the actor's process
        ...     worker.update_actor(batch)
    """
    checks.choice(OP, "kind", kind, tuple(KINDS))
    checks.choice(OP, "tail", tail, TAILS)
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{OP}: {error.name} is not installed; run `pip install verl`, or give your own loss "
            "fasttax.integrations.rlhf.response_topk_kl, which needs none",
            name=error.name,
        ) from error
    original = getattr(module, NAME, None)
    names = () if original is None else tuple(inspect.signature(original).parameters)
    if names != KNOWN:
        raise checks.fail(
            OP,
            f"{MODULE}.{NAME}",
            f"the arguments ({', '.join(KNOWN)})",
            f"({', '.join(names)})",
            "install a verl that has them (0.9), or give your own loss "
            "fasttax.integrations.rlhf.response_topk_kl",
            RuntimeError,
        )
    handle = Handle()
    ours = partial(_packed_topk_kl, kind=kind, tail=tail)
    handle.replace(module, NAME, ours, f"{MODULE}.{NAME}")
    if not quiet:
        print(f"fasttax: replaced {MODULE}.{NAME}", file=sys.stderr)
    return handle


def _packed_topk_kl(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    *,
    kind: KlKind,
    tail: str,
) -> dict[str, Tensor]:
    """Verl's function: packed rows (1, tokens, V) against nested (B, L, k), and its metrics."""
    logp, ids = (t.values().unsqueeze(0) for t in (teacher_topk_log_probs, teacher_topk_ids))
    ulysses = importlib.import_module("verl.utils.ulysses")
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        logp, ids = (ulysses.slice_input_tensor(t, dim=1) for t in (logp, ids))
    losses = topk_kl(student_logits, logp, ids, kind=kind, tail=tail)
    return {"distillation_losses": losses, **_metrics(student_logits.detach(), logp, ids)}


def _metrics(logits: Tensor, logp: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """As verl has them: mass of the teacher's k tokens, and what both models' k have in common."""
    lse = token_stats(logits, outputs=("lse",)).lse
    assert lse is not None
    top = logits.gather(-1, ids).float() - lse.unsqueeze(-1)
    both = (ids.unsqueeze(-1) == logits.topk(ids.shape[-1], -1).indices.unsqueeze(-2)).any(-1)
    count = both.sum(-1)
    gain = (logp.exp() * (top - logp) * both).sum(-1) / count.clamp_min(1)
    return {
        "student_mass": top.exp().sum(-1),
        "teacher_mass": logp.exp().sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": torch.where(count > 0, gain, 0.0),
    }
