"""What a trainer asks about sampled tokens: log-probs, entropy, both KLs, Monte-Carlo estimates of the KL, top-k references.

k1, k2, k3 as in Schulman 2020, "Approximating KL divergence": with r = ref_logp - logp of a token sampled from the policy,
k1 = -r, k2 = r^2/2, k3 = e^r - 1 - r; k1 and k3 are unbiased for KL(policy || ref).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttax import _checks, reference
from fasttax._vocab_parallel import gather_vocab
from fasttax.kl import Tempering, check_logits, check_mask, reduce, tempering, token_kl

OUTPUTS = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy", "kl", "k1", "k2", "k3")
NEED_IDS = ("logp", "ref_logp", "k1", "k2", "k3")
NEED_REF = ("ref_logp", "kl_policy_ref", "kl_ref_policy", "kl", "k1", "k2", "k3")
ESTIMATORS = ("k1", "k2", "k3")
GRADS = ("estimator", "reverse_kl")
TAILS = ("ghost", "renormalize")


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics, each (...) in float32 (or reduced); those not asked for are None."""

    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    kl_policy_ref: Tensor | None = None
    kl_ref_policy: Tensor | None = None
    kl: Tensor | None = None
    k1: Tensor | None = None
    k2: Tensor | None = None
    k3: Tensor | None = None


def check_outputs(op: str, outputs: Sequence[str], ids: Any, ref: Any) -> tuple[str, ...]:
    if isinstance(outputs, str):
        outputs = (outputs,)
    for name in outputs:
        _checks.choice(op, "outputs", name, OUTPUTS)
        if name in NEED_IDS and ids is None:
            raise _checks.fail(op, "ids", f"token ids, which output {name!r} needs", "None")
        if name in NEED_REF and ref is None:
            raise _checks.fail(op, "ref_logits", f"the reference's logits, which output {name!r} needs", "None")
    return tuple(outputs)


def token_stats(logits: Tensor, ref_logits: Tensor | None = None, ids: Tensor | None = None, *, outputs: Sequence[str] = ("logp",),
                kind: str = "policy_ref", beta: float = 0.5, temperature: float = 1.0, ref_temperature: float | None = None,
                softcap: float | None = None, ref_softcap: float | None = None, logit_scale: float = 1.0, ref_logit_scale: float = 1.0,
                mask: Tensor | None = None, weight: Tensor | None = None, reduction: str = "none", inf: str = "propagate",
                tp_group: Any = None) -> TokenStats:  # fmt: skip
    """Any of `logp, ref_logp, entropy, lse, kl_policy_ref, kl_ref_policy, kl, k1, k2, k3` for every token, differentiable.

    Args:
        logits, ref_logits: (..., V); ref_logits may be None where no output needs it.
        ids: int64 (...), the sampled tokens (under tp_group: global ids).
        outputs: names as above. `kl` is the one that `kind` names; `lse` is of the tempered logits.
        Others as in `token_kl`. A masked token is not read: its outputs and gradients are 0.

    Raises:
        ValueError, TypeError, IndexError: an output without what it needs, ids out of range, or as in `token_kl`.
    """
    op = "token_stats"
    options = {"kind": kind, "beta": beta, "temperature": temperature, "ref_temperature": ref_temperature, "softcap": softcap,
               "ref_softcap": ref_softcap, "logit_scale": logit_scale, "ref_logit_scale": ref_logit_scale, "inf": inf}  # fmt: skip
    t = tempering(op, **options)  # type: ignore[arg-type]
    outputs = check_outputs(op, outputs, ids, ref_logits)
    if tp_group is not None:
        logits = gather_vocab(op, logits, tp_group)
        ref_logits = None if ref_logits is None else gather_vocab(op, ref_logits, tp_group)
    logits, checked = check_logits(op, logits, logits if ref_logits is None else ref_logits)
    ref_logits = None if ref_logits is None else checked
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    if ids is not None:
        ids = check_ids(op, ids, logits, mask)
    values: dict[str, Tensor] = _policy_side(logits, ref_logits, ids, outputs, mask, t)
    if ref_logits is not None:
        for name, which in (("kl_policy_ref", "policy_ref"), ("kl_ref_policy", "ref_policy"), ("kl", kind)):
            if name in outputs:
                values[name] = token_kl(logits, ref_logits, mask=mask, **{**options, "kind": which})  # type: ignore[arg-type]
    return TokenStats(**{name: reduce(op, values[name], mask, weight, reduction) for name in outputs})


def check_ids(op: str, ids: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    _checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    if ids.shape != logits.shape[:-1]:
        raise _checks.fail(op, "ids", f"shape {tuple(logits.shape[:-1])}, one id a token", ids)
    _checks.same_device(op, "ids", ids, "logits", logits)
    ids = ids.long() if mask is None else ids.long().masked_fill(~mask, 0)
    check_range(op, "ids", ids, logits.shape[-1])
    return ids


def check_range(op: str, name: str, ids: Tensor, V: int) -> None:
    """On the CPU alone: on a GPU the look would be a host sync, and the gather checks there."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and not bool(((ids >= 0) & (ids < V)).all()):
        raise _checks.fail(op, name, f"values in [0, {V})", f"{int(ids.min())} to {int(ids.max())}",
                           "leave tokens without a label (-100) out with mask=", IndexError)  # fmt: skip


def _policy_side(logits: Tensor, ref_logits: Tensor | None, ids: Tensor | None, outputs: Sequence[str], mask: Tensor | None,
                 t: Tempering) -> dict[str, Tensor]:  # fmt: skip
    def tempered(raw: Tensor, scale: float, cap: float, inv_t: float) -> Tensor:
        if mask is not None:
            raw = raw.masked_fill(~mask[..., None], 0.0)
        return reference.temper(raw, scale, cap, inv_t)

    def shown(value: Tensor) -> Tensor:
        return value if mask is None else value.masked_fill(~mask, 0.0)

    values: dict[str, Tensor] = {}
    sampled = [name for name in outputs if name in ESTIMATORS]
    if not sampled and not {"logp", "ref_logp", "entropy", "lse"} & set(outputs):
        return values
    x = tempered(logits, t.scale, t.softcap, t.inv_temperature)
    lp = x.log_softmax(-1)
    if "lse" in outputs:
        values["lse"] = shown(x.logsumexp(-1))
    if "entropy" in outputs:
        values["entropy"] = shown(-(lp.exp() * lp.masked_fill(lp == -torch.inf, 0.0)).sum(-1))
    if ids is None:
        return values
    logp = shown(lp.gather(-1, ids[..., None]).squeeze(-1))
    if "logp" in outputs:
        values["logp"] = logp
    if ref_logits is not None and ("ref_logp" in outputs or sampled):
        y = tempered(ref_logits, t.ref_scale, t.ref_softcap, t.ref_inv_temperature)
        ref_logp = shown(y.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1))
        if "ref_logp" in outputs:
            values["ref_logp"] = ref_logp
        for name in sampled:
            values[name] = kl_estimate(logp, ref_logp, kind=name)
    return values


def _exp(x: Tensor, clip: float) -> Tensor:
    """e^x up to `clip`, its tangent beyond: large log-ratios give large finite values and gradients, never inf or 0 * inf."""
    low = x.clamp(max=clip).exp()
    return low * (1 + (x - clip).clamp(min=0))


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, kind: str = "k3", old_logp: Tensor | None = None, grad: str = "estimator",
                clip: float = 20.0, mask: Tensor | None = None, weight: Tensor | None = None, reduction: str = "none") -> Tensor:  # fmt: skip
    """Monte-Carlo estimate of KL(policy || ref) from the sampled tokens' log-probs.

    Args:
        logp, ref_logp: (...), of the tokens that were sampled.
        kind: "k1" = -r, "k2" = r^2/2, "k3" = e^r - 1 - r, with r = ref_logp - logp.
        old_logp: log-probs under the policy that sampled; multiplies by the importance ratio exp(logp - old_logp), differentiated.
        grad: "estimator" differentiates what is returned (k3's gradient is that of KL(ref || policy), k1's is 0 on average);
            "reverse_kl" keeps the value and takes the gradient of KL(policy || ref): ratio * (logp - ref_logp) * d logp.
        clip: log-ratio above which exp goes on along its tangent.
        mask, weight, reduction: as in `token_kl`; what is under the mask may be NaN.
    """
    op = "kl_estimate"
    for name, value in (("logp", logp), ("ref_logp", ref_logp), *((("old_logp", old_logp),) if old_logp is not None else ())):
        _checks.tensor(op, name, value)
        if value.shape != logp.shape:
            raise _checks.fail(op, name, f"shape {tuple(logp.shape)} as logp", value)
        _checks.same_device(op, name, value, "logp", logp)
    _checks.choice(op, "kind", kind, ESTIMATORS)
    _checks.choice(op, "grad", grad, GRADS)
    clip = _checks.number(op, "clip", clip, low=0, high=40, open_low=True)
    mask = check_mask(op, mask, logp.shape, logp.device)
    logp, ref_logp = reference.wide(logp), reference.wide(ref_logp)
    old = None if old_logp is None else reference.wide(old_logp)
    if mask is not None:
        logp, ref_logp = logp.masked_fill(~mask, 0.0), ref_logp.masked_fill(~mask, 0.0)
        old = None if old is None else old.masked_fill(~mask, 0.0)
    r = ref_logp - logp
    if kind == "k1":
        value = -r
    elif kind == "k2":
        value = r * r / 2
    else:
        small = r.abs() < 0.5
        value = torch.where(small, torch.expm1(torch.where(small, r, 0.0)) - r, _exp(r, clip) - 1 - r)
    ratio = torch.ones_like(logp) if old is None else _exp(logp - old, clip)
    value = value * ratio
    if grad == "reverse_kl":
        through = (ratio * -r).detach() * logp
        value = value.detach() + (through - through.detach())
    return reduce(op, value, mask, weight, reduction)


def topk_logprobs(ref_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of every token and their ids: what a cached reference is made of. (..., k) float32 and int64."""
    op = "topk_logprobs"
    _checks.tensor(op, "ref_logits", ref_logits)
    if ref_logits.dim() < 1 or not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= ref_logits.shape[-1]:
        raise _checks.fail(op, "k", f"an integer from 1 to V = {ref_logits.shape[-1] if ref_logits.dim() else 0}", k)
    x = reference.wide(ref_logits)
    top, ids = x.topk(k, -1)
    largest = top[..., :1]
    rest = x.scatter(-1, ids[..., :1], -torch.inf).logsumexp(-1, keepdim=True) - largest
    return (top - largest) - F.softplus(rest), ids  # log1p keeps the digits of a mass near 1, from which the tail's mass is told


def _tail_logp(top: Tensor) -> Tensor:
    """log of the mass that the top-k log-probs leave: (1 - p_1) - (p_2 + ...), where 1 - (p_1 + p_2 + ...) would cancel."""
    largest, others = top.double().sort(-1, descending=True).values.tensor_split([1], -1)
    mass = -torch.expm1(largest) - others.exp().sum(-1, keepdim=True)
    return torch.log(mass.clamp_min(2.0**-24)).to(top.dtype)  # what rounded log-probs can't tell is at least that


def topk_kl(logits: Tensor, ref_topk_logp: Tensor, ref_topk_ids: Tensor, *, kind: str = "ref_policy", tail: str = "ghost", beta: float = 0.5,
            temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0, mask: Tensor | None = None,
            weight: Tensor | None = None, reduction: str = "none", inf: str = "propagate") -> Tensor:  # fmt: skip
    """KL against a reference known by its top k log-probs; at k = V the full KL.

    Args:
        logits: (..., V), the policy's. ref_topk_logp, ref_topk_ids: (..., k), as `topk_logprobs` gives (at the reference's own
            temperature).
        tail: "ghost" gathers all other tokens into one, on both sides (a lower bound of the full KL); "renormalize" compares the
            two distributions restricted to the k tokens.
        Others as in `token_kl`; temperature, softcap and logit_scale are the policy's.
    """
    op = "topk_kl"
    _checks.tensor(op, "logits", logits)
    _checks.tensor(op, "ref_topk_logp", ref_topk_logp)
    _checks.tensor(op, "ref_topk_ids", ref_topk_ids, (torch.int64, torch.int32))
    _checks.choice(op, "tail", tail, TAILS)
    if ref_topk_logp.shape != ref_topk_ids.shape or ref_topk_logp.shape[:-1] != logits.shape[:-1] or ref_topk_logp.shape[-1] > logits.shape[-1]:
        raise _checks.fail(op, "ref_topk_logp", f"shape {tuple(logits.shape[:-1])} + (k,) with k <= {logits.shape[-1]}, as ref_topk_ids", ref_topk_logp)
    _checks.same_device(op, "ref_topk_logp", ref_topk_logp, "logits", logits)
    check_range(op, "ref_topk_ids", ref_topk_ids if mask is None else ref_topk_ids.masked_fill(~(mask != 0).broadcast_to(logits.shape[:-1])[..., None], 0),
                logits.shape[-1])  # fmt: skip
    t = tempering(op, kind=kind, beta=beta, temperature=temperature, softcap=softcap, logit_scale=logit_scale, inf=inf)
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
    return token_kl(top, ref_top, kind=kind, beta=beta, mask=mask, weight=weight, reduction=reduction, inf=inf)
