"""A reference kept as the k largest log-probs of every token, and the KL against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.choices import Infinities, KlKind, Reduction
from fasttax._base.interrupts import surfaced
from fasttax.kl.call import Side, check_mask, tempering
from fasttax.kl.token_kl import token_kl
from fasttax.reference.numbers import hide_rows

TAILS = ("ghost", "renormalize")
MOST_MASS = 1.05  # of a list; log-probs in bfloat16 are off by up to 2 % of it


def topk_logprobs(ref_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of every token and their ids: what a cached reference is made of.

    Args:
        ref_logits: (..., V).
        k: how many of a token.

    Returns:
        (..., k) float32 (float64 for float64 logits), descending, and int64.

    Raises:
        ValueError, TypeError: k is not in 1 ... V, or the logits are no floats.

    Example:
        >>> logp, top_ids = fasttax.topk_logprobs(ref_logits, 4)
        >>> logp.shape
        torch.Size([2, 5, 4])
    """
    op = "topk_logprobs"
    checks.tensor(op, "ref_logits", ref_logits, forward_mode=True)
    V = ref_logits.shape[-1] if ref_logits.dim() else 0
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= V:
        raise checks.fail(op, "k", f"an integer from 1 to V = {V}", k)
    x = _below_maximum(reference.wide(ref_logits))
    top, ids = x.topk(k, -1)
    largest = top[..., :1]
    rest = x.scatter(-1, ids[..., :1], -torch.inf).logsumexp(-1, keepdim=True) - largest
    # log1p keeps the digits of a mass near 1, from which the tail's mass is told
    return (top - largest) - F.softplus(rest), ids


def _below_maximum(x: Tensor) -> Tensor:
    """`x` less its row's maximum, which is exact where digits count.

    A sum of exponentials at an offset of 1000 would be good to 6e-5. A row without a finite maximum
    stays as it is.
    """
    largest = x.detach().amax(-1, keepdim=True)
    return x - torch.where(largest.isfinite(), largest, 0.0)


def _tail_logp(top: Tensor) -> Tensor:
    """Log of the mass that the top-k log-probs leave.

    It is (1 - p_1) - (p_2 + ...), where 1 - (p_1 + p_2 + ...) would cancel; NaN where they are no
    log-probs.
    """
    largest, others = top.double().sort(-1, descending=True).values.tensor_split([1], -1)
    mass = -torch.expm1(largest) - others.exp().sum(-1, keepdim=True)
    mass = mass.masked_fill(mass < 1 - MOST_MASS, torch.nan)
    # what rounded log-probs can't tell is at least that
    return torch.log(mass.clamp_min(2.0**-24)).to(top.dtype)


@surfaced
def topk_kl(
    logits: Tensor,
    ref_topk_logp: Tensor,
    ref_topk_ids: Tensor,
    *,
    kind: KlKind = "ref_policy",
    tail: str = "ghost",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    scale: float | Tensor = 1.0,
    inf: Infinities = "propagate",
) -> Tensor:
    """KL against a reference known by its top k log-probs; at k = V the full KL.

    Args:
        logits: (..., V), the policy's.
        ref_topk_logp: (..., k), as `topk_logprobs` gives, at the reference's own temperature.
        ref_topk_ids: (..., k), their ids. Of an id that is listed twice the larger log-prob counts
            once; -inf is no entry, whatever its id (lists of unequal length), unless every token is
            listed.
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
        scale: as in `token_kl`.
        inf: as in `token_kl`.

    Returns:
        As `token_kl`.

    Raises:
        ValueError, TypeError, IndexError: shape, dtype, device, an id or an option does not fit.

    Example:
        >>> logp, top_ids = fasttax.topk_logprobs(ref_logits, 4)
        >>> kl = fasttax.topk_kl(logits, logp, top_ids, tail="ghost", mask=mask, reduction="mean")
        >>> kl.backward()
    """
    op = "topk_kl"
    checks.tensor(op, "logits", logits)
    checks.tensor(op, "ref_topk_logp", ref_topk_logp)
    checks.tensor(op, "ref_topk_ids", ref_topk_ids, (torch.int64, torch.int32))
    checks.choice(op, "tail", tail, TAILS)
    V = logits.shape[-1] if logits.dim() else 0
    if V < 1:
        raise checks.fail(op, "logits", "shape (..., V) with V >= 1", logits)
    k = ref_topk_ids.shape[-1] if ref_topk_ids.dim() else 0
    shape = (*logits.shape[:-1], k)
    if not 1 <= k <= V or ref_topk_ids.shape != shape or ref_topk_logp.shape != shape:
        expected = f"shape {tuple(logits.shape[:-1])} + (k,) with 1 <= k <= {V}, as ref_topk_ids"
        raise checks.fail(op, "ref_topk_logp", expected, ref_topk_logp)
    checks.same_device(op, "ref_topk_logp", ref_topk_logp, "logits", logits)
    checks.same_device(op, "ref_topk_ids", ref_topk_ids, "logits", logits)
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
    x = _tempered(hide_rows(logits, mask), t.policy)
    listed = _entries(hide_rows(ref_topk_logp, mask), hide_rows(ref_topk_ids.long(), mask), V)
    checks.ids_in_range(op, "ref_topk_ids", listed.ids, V)
    top = x.gather(-1, listed.ids).masked_fill(~listed.counts, -torch.inf)
    ref_top = listed.logp.to(x.dtype).masked_fill(~listed.counts, -torch.inf)
    _check_mass(op, ref_top)
    if tail == "ghost" and not (k == V and _all_complete(listed)):
        # a column more, for the ids of what is no entry
        room = F.pad(x, (0, 1), value=-torch.inf)
        rest = room.scatter_(-1, listed.ids.where(listed.counts, V), -torch.inf)
        ref_rest = _tail_logp(ref_top).masked_fill(listed.complete, -torch.inf)
        top = torch.cat((top, rest.logsumexp(-1, keepdim=True)), -1)
        ref_top = torch.cat((ref_top, ref_rest), -1)
    return token_kl(
        top,
        ref_top,
        kind=kind,
        beta=beta,
        mask=mask,
        weight=weight,
        reduction=reduction,
        scale=scale,
        inf=inf,
    )


def _check_mass(op: str, top: Tensor) -> None:
    """That log-probs are those of some tokens of a distribution; on GPUs a look would be a sync.

    Raises:
        ValueError: they are probabilities, logits, or log-probs at another temperature.
    """
    if not checks.has_values(top):
        return
    mass = top.detach().double().exp().sum(-1)
    if bool((mass > MOST_MASS).any()):
        raise checks.fail(
            op,
            "ref_topk_logp",
            "log-probs, whose exponentials sum to at most 1 for a token",
            f"a sum of {mass.nan_to_num(0).max().item():.3g}",
            "pass what topk_logprobs(ref_logits, k) gives; of probabilities .log(), of logits "
            "log_softmax over the whole vocabulary first",
        )


def _tempered(logits: Tensor, side: Side) -> Tensor:
    """The policy's tempered logits, which stand below 0."""
    x = reference.wide(logits)
    if side.softcap:
        return _below_maximum(side.temper(x))
    x = _below_maximum(x)  # whose maximum stays 0
    return x if side.scale * side.inv_temperature == 1 else side.temper(x)


class _Entries(NamedTuple):
    """A reference's lists (..., k) in the order of their ids."""

    logp: Tensor
    ids: Tensor
    counts: Tensor  # bool: not one that repeats an id or only fills the list up
    complete: Tensor  # (..., 1) bool: the whole vocabulary is listed


def _entries(logp: Tensor, ids: Tensor, V: int) -> _Entries:
    """What counts of lists as servers give them.

    Of an id that is listed twice (the sampled token beside the top k) the larger log-prob counts,
    and -inf is no entry but fills up a shorter list, whatever its id, unless every token is listed.
    """
    padding = logp == -torch.inf
    ids = torch.where(padding, ids.clamp(0, V - 1), ids)
    logp, order = logp.sort(-1, descending=True)
    ids, by_id = ids.gather(-1, order).sort(dim=-1, stable=True)
    logp = logp.gather(-1, by_id)
    first = torch.ones_like(padding)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    complete = first.sum(-1, keepdim=True) == V
    return _Entries(logp, ids, first & ((logp != -torch.inf) | complete), complete)


def _all_complete(listed: _Entries) -> bool:
    """Whether no list leaves anything over, so far as can be told without a sync."""
    return checks.has_values(listed.ids) and bool(listed.complete.all())
