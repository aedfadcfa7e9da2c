"""A reference kept as the k largest log-probs of every token, and the KL against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax.kl.token_kl import check_mask, tempering, token_kl

TAILS = ("ghost", "renormalize")


def topk_logprobs(ref_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of every token and their ids: what a cached reference is made of.

    (..., k) float32 and int64.
    """
    op = "topk_logprobs"
    checks.tensor(op, "ref_logits", ref_logits)
    if (
        ref_logits.dim() < 1
        or not isinstance(k, int)
        or isinstance(k, bool)
        or not 1 <= k <= ref_logits.shape[-1]
    ):
        raise checks.fail(
            op,
            "k",
            f"an integer from 1 to V = {ref_logits.shape[-1] if ref_logits.dim() else 0}",
            k,
        )
    x = reference.wide(ref_logits)
    top, ids = x.topk(k, -1)
    largest = top[..., :1]
    rest = x.scatter(-1, ids[..., :1], -torch.inf).logsumexp(-1, keepdim=True) - largest
    return (top - largest) - F.softplus(
        rest
    ), ids  # log1p keeps the digits of a mass near 1, from which the tail's mass is told


def _tail_logp(top: Tensor) -> Tensor:
    """Log of the mass that the top-k log-probs leave.

    (1 - p_1) - (p_2 + ...), where 1 - (p_1 + p_2 + ...) would cancel.
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
        logits: (..., V), the policy's. ref_topk_logp, ref_topk_ids: (..., k), as `topk_logprobs`
            gives (at the reference's own temperature).
        tail: "ghost" gathers all other tokens into one, on both sides (a lower bound of the full
            KL); "renormalize" compares the two distributions restricted to the k tokens.
        Others as in `token_kl`; temperature, softcap and logit_scale are the policy's.
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
    shown = (
        ref_topk_ids
        if mask is None
        else ref_topk_ids.masked_fill(~(mask != 0).broadcast_to(logits.shape[:-1])[..., None], 0)
    )
    checks.ids_in_range(op, "ref_topk_ids", shown, logits.shape[-1])
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
    if mask is not None:
        logits = logits.masked_fill(~mask[..., None], 0.0)
        ref_topk_ids = ref_topk_ids.masked_fill(~mask[..., None], 0)
        ref_topk_logp = ref_topk_logp.masked_fill(~mask[..., None], 0.0)
    ids, k = ref_topk_ids.long(), ref_topk_ids.shape[-1]
    x = reference.temper(logits, t.scale, t.softcap, t.inv_temperature)
    top, ref_top = x.gather(-1, ids), ref_topk_logp.to(x.dtype)
    if tail == "ghost" and k < x.shape[-1]:
        rest = x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        top, ref_top = torch.cat((top, rest), -1), torch.cat((ref_top, _tail_logp(ref_top)), -1)
    return token_kl(
        top, ref_top, kind=kind, beta=beta, mask=mask, weight=weight, reduction=reduction, inf=inf
    )
