"""A reference kept as the k largest log-probs of every token, and the KL against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax.kl.call import check_mask, tempering
from fasttax.kl.token_kl import token_kl
from fasttax.reference.numbers import hide_rows

TAILS = ("ghost", "renormalize")


def topk_logprobs(ref_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of every token and their ids: what a cached reference is made of.

    Args:
        ref_logits: (..., V).
        k: how many of a token.

    Returns:
        (..., k) float32 (float64 for float64 logits), descending, and int64.

    Raises:
        ValueError, TypeError: k is not in 1 ... V, or the logits are no floats.
    """
    op = "topk_logprobs"
    checks.tensor(op, "ref_logits", ref_logits)
    V = ref_logits.shape[-1] if ref_logits.dim() else 0
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= V:
        raise checks.fail(op, "k", f"an integer from 1 to V = {V}", k)
    x = reference.wide(ref_logits)
    top, ids = x.topk(k, -1)
    largest = top[..., :1]
    rest = x.scatter(-1, ids[..., :1], -torch.inf).logsumexp(-1, keepdim=True) - largest
    # log1p keeps the digits of a mass near 1, from which the tail's mass is told
    return (top - largest) - F.softplus(rest), ids


def _tail_logp(top: Tensor) -> Tensor:
    """Log of the mass that the top-k log-probs leave.

    It is (1 - p_1) - (p_2 + ...), where 1 - (p_1 + p_2 + ...) would cancel.
    """
    largest, others = top.double().sort(-1, descending=True).values.tensor_split([1], -1)
    mass = -torch.expm1(largest) - others.exp().sum(-1, keepdim=True)
    # what rounded log-probs can't tell is at least that
    return torch.log(mass.clamp_min(2.0**-24)).to(top.dtype)


def topk_kl(
    logits: Tensor,
    ref_topk_logp: Tensor,
    ref_topk_ids: Tensor,
    *,
    kind: str = "ref_policy",
    tail: str = "ghost",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
    inf: str = "propagate",
) -> Tensor:
    """KL against a reference known by its top k log-probs; at k = V the full KL.

    Args:
        logits: (..., V), the policy's.
        ref_topk_logp: (..., k), as `topk_logprobs` gives, at the reference's own temperature.
        ref_topk_ids: (..., k), their ids.
        kind: as in `token_kl`.
        tail: "ghost" gathers all other tokens into one, on both sides (a lower bound of the full
            KL); "renormalize" compares the two distributions restricted to the k tokens.
        beta: as in `token_kl`.
        temperature: of the policy.
        softcap: of the policy.
        logit_scale: of the policy.
        mask: as in `token_kl`.
        weight: as in `token_kl`.
        reduction: as in `token_kl`.
        inf: as in `token_kl`.

    Returns:
        As `token_kl`.

    Raises:
        ValueError, TypeError, IndexError: shape, dtype, device, an id or an option does not fit.
    """
    op = "topk_kl"
    checks.tensor(op, "logits", logits)
    checks.tensor(op, "ref_topk_logp", ref_topk_logp)
    checks.tensor(op, "ref_topk_ids", ref_topk_ids, (torch.int64, torch.int32))
    checks.choice(op, "tail", tail, TAILS)
    if (
        ref_topk_logp.shape != ref_topk_ids.shape
        or ref_topk_logp.shape[:-1] != logits.shape[:-1]
        or ref_topk_logp.shape[-1] > logits.shape[-1]
    ):
        raise checks.fail(
            op,
            "ref_topk_logp",
            f"shape {tuple(logits.shape[:-1])} + (k,) with k <= {logits.shape[-1]}, as "
            "ref_topk_ids",
            ref_topk_logp,
        )
    checks.same_device(op, "ref_topk_logp", ref_topk_logp, "logits", logits)
    t = tempering(
        op,
        kind=kind,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        inf=inf,
    )
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    logits = hide_rows(logits, mask)
    ids, k = hide_rows(ref_topk_ids.long(), mask), ref_topk_ids.shape[-1]
    checks.ids_in_range(op, "ref_topk_ids", ids, logits.shape[-1])
    x = t.policy.temper(logits)
    top, ref_top = x.gather(-1, ids), hide_rows(ref_topk_logp, mask).to(x.dtype)
    if tail == "ghost" and k < x.shape[-1]:
        rest = x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        top, ref_top = torch.cat((top, rest), -1), torch.cat((ref_top, _tail_logp(ref_top)), -1)
    return token_kl(
        top, ref_top, kind=kind, beta=beta, mask=mask, weight=weight, reduction=reduction, inf=inf
    )
