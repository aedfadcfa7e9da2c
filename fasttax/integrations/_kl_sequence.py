"""The KL of whole sequences, whose gradient goes through the sampling, too.

With K_t the KL of token t's distributions after the prefix s_<t, the KL of the distributions over
sequences is E[sum_t K_t] for s sampled from the policy. Its gradient (Tang & Munos 2025,
arXiv:2506.09477) is

    E[sum_t grad K_t]  +  E[sum_u grad log p(s_u | s_<u) * sum_{t > u} K_t]

The first is the token loss's: how the distributions move where the sequence stands. The second is
REINFORCE on the KL-to-go: how the policy comes to stand elsewhere. Under samples of older weights
both carry the ratio of the prefix, policy over sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks

ESTIMATORS = ("token", "sequence")


def check(
    op: str, trainer: Any, options: Mapping[str, Any], *, generates: bool, rloo: bool
) -> None:
    """Refuses estimator="sequence" where its gradient would be another quantity's.

    Args:
        op: for errors.
        trainer: a trainer.
        options: of `token_kl`: kind and temperature.
        generates: the trainer's sequences are sampled from the policy.
        rloo: the trainer keeps no old log-prob of each token.

    Raises:
        ValueError: no sampling, another kind or temperature, samples that can't be reweighed.
    """
    if not generates:
        raise checks.fail(
            op,
            "estimator",
            "'token' in a trainer whose sequences are data, for nothing is sampled there",
            f"'sequence' in {type(trainer).__name__}",
            "'sequence' is GRPO's and RLOO's",
        )
    if options["kind"] != "policy_ref":
        raise checks.fail(
            op,
            "kind",
            "'policy_ref' under estimator='sequence': of samples of the policy, it alone adds up "
            "to the sequences' KL",
            repr(options["kind"]),
            "pass estimator='token'",
        )
    if options["temperature"] != trainer.temperature:
        raise checks.fail(
            op,
            "temperature",
            f"the trainer's {trainer.temperature:g}, at which the sequences are sampled",
            f"{options['temperature']:g}",
            "leave temperature out, or pass estimator='token'",
        )
    args = trainer.args
    every = args.steps_per_generation * trainer.num_iterations
    if rloo and args.gradient_accumulation_steps % every:
        raise checks.fail(
            op,
            "trainer",
            "RLOO on samples of the present weights under estimator='sequence', for it keeps no "
            "old log-prob of each token",
            f"{args.gradient_accumulation_steps} micro-batches a step of a generation that is used "
            f"for {every}",
            "pass num_iterations=1 and steps_per_generation=gradient_accumulation_steps",
        )


def sampled(input_ids: Tensor, mask: Tensor) -> Tensor:
    """(N,) the token that follows each position that counts.

    Args:
        input_ids: (B, L).
        mask: (B, L), by the position that predicts.
    """
    return nn.functional.pad(input_ids[:, 1:], (0, 1))[mask]


def old_logp(batch: Mapping[str, Any], mask: Tensor) -> Tensor | None:
    """(N,) log-probs of the sampled tokens under the weights that sampled, where GRPO has them."""
    old = batch.get("old_per_token_logps")
    if not isinstance(old, Tensor):
        return None
    before = mask.shape[1] - 1 - old.shape[1]
    return nn.functional.pad(old, (before, 1))[mask]


def sequence_sum(kl: Tensor, logp: Tensor, old: Tensor | None, mask: Tensor) -> Tensor:
    """Sum of KL_t * ratio_<t over all tokens, with the gradient of the sequences' KL.

    Args:
        kl: (N,) of the tokens that count, differentiable.
        logp: (N,) of the tokens that were sampled, under the policy, differentiable.
        old: (N,) the same under the weights that sampled; None: the same weights.
        mask: (B, L), which tokens count.
    """
    ratio = torch.ones_like(kl)
    if old is not None:
        gaps = _grid((logp - old).detach(), mask)
        ratio = (gaps.cumsum(1) - gaps).exp()[mask].to(kl.dtype)
    value = ratio * kl
    costs = _grid(value.detach(), mask)
    to_go = costs.flip(1).cumsum(1).flip(1) - costs  # of the tokens behind
    # the log-probs' own value is taken out again: what remains of them is the gradient
    score = (logp - logp.detach()) * to_go[mask].to(logp.dtype)
    return (value + score).sum()


def _grid(values: Tensor, mask: Tensor) -> Tensor:
    """(B, L) float64 of the values (N,) of the tokens that count, else 0."""
    grid = torch.zeros(mask.shape, dtype=torch.float64, device=values.device)
    grid[mask] = values.double()
    return grid
