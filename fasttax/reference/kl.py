"""The ops over logits in plain PyTorch: specification, test oracle, fallback.

Symbols: p = softmax(policy logits), q = softmax(reference logits), u = log p - log q; N tokens, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttax.reference.numbers import times, wide

POLICY_REF, REF_POLICY, JSD = 0, 1, 2


def temper(logits: Tensor, scale: float, softcap: float, inv_temperature: float) -> Tensor:
    """Softcap * tanh(logits * scale / softcap) / temperature; softcap 0 is none."""
    x = wide(logits)
    if softcap > 0:
        return softcap * torch.tanh(x * (scale / softcap)) * inv_temperature
    return x * (scale * inv_temperature)


def temper_slope(
    logits: Tensor, scale: float, softcap: float, inv_temperature: float
) -> Tensor | float:
    if softcap > 0:
        return (1 - torch.tanh(wide(logits) * (scale / softcap)) ** 2) * (scale * inv_temperature)
    return scale * inv_temperature


def log_probs(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_t: float,
    ref_inv_t: float,
    inf_mask: bool,
) -> tuple[Tensor, Tensor]:
    x, y = (
        temper(logits, scale, softcap, inv_t),
        temper(ref_logits, ref_scale, ref_softcap, ref_inv_t),
    )
    if mask is not None:
        x, y = x.masked_fill(~mask[..., None], 0.0), y.masked_fill(~mask[..., None], 0.0)
    if inf_mask:
        gone = (logits == -math.inf) | (ref_logits == -math.inf)
        if mask is not None:
            gone = gone & mask[..., None]
        x, y = x.masked_fill(gone, -math.inf), y.masked_fill(gone, -math.inf)
    return x.log_softmax(-1), y.log_softmax(-1)


def gap(lp: Tensor, lq: Tensor) -> Tensor:
    """U = log p - log q, 0 where both are -inf."""
    return torch.where((lp == -math.inf) & (lq == -math.inf), torch.zeros_like(lp), lp - lq)


def log_mixture(u: Tensor, beta: float) -> Tensor:
    """log(m/p) of the mixture m = (1 - beta) p + beta q, exactly 0 where u = log p - log q is."""
    e = torch.exp(-u.abs())
    return torch.where(u < 0, torch.log(beta + (1 - beta) * e) - u, torch.log1p((e - 1) * beta))


def jensen_gap(t: Tensor) -> Tensor:
    """g(t) = (1 + t) log1p(t) - t >= 0; the series below 0.1, where the difference would cancel."""
    series = sum(((-t) ** k / (k * (k - 1)) for k in range(2, 12)), torch.zeros_like(t))
    return torch.where(t.abs() < 0.1, series, times(1 + t, torch.log1p(t)) - t)


def divergences_to_mixture(p: Tensor, q: Tensor, u: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m); where p is 0, q/m = 1/beta."""
    l = log_mixture(u, beta)
    return -l, torch.where(p == 0, torch.full_like(u, -math.log(beta)), -u - l)


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kind: int,
    beta: float,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
    inf_mask: bool,
) -> tuple[Tensor, Tensor]:
    """KL(p||q) = sum p (e^-u - 1 + u), every term >= 0.

    (kl (...), stats (..., 8) that only native kernels fill).
    """
    lp, lq = log_probs(
        logits,
        ref_logits,
        mask,
        scale,
        ref_scale,
        softcap,
        ref_softcap,
        inv_temperature,
        ref_inv_temperature,
        inf_mask,
    )
    p, q, u = lp.exp(), lq.exp(), gap(lp, lq)
    if kind == POLICY_REF:
        kl = torch.where(p > 0, times(p, torch.expm1(-u) + u), q).sum(-1)
    elif kind == REF_POLICY:
        kl = torch.where(q > 0, times(q, torch.expm1(u) - u), p).sum(-1)
    elif beta in (0.0, 1.0):
        kl = (p + q).sum(-1) * 0
    else:
        p_to_m, q_to_m = divergences_to_mixture(p, q, u, beta)
        eps = torch.expm1(-u)
        far = beta * times(q, q_to_m) + (1 - beta) * times(p, p_to_m)
        kl = (
            torch.where(u.abs() < 0.5, p * (beta * jensen_gap(eps) - jensen_gap(beta * eps)), far)
            .sum(-1)
            .clamp_min(0)
        )
    # a row of NaN (or of -inf alone) is NaN, also where the comparisons above dropped it
    kl = torch.where(torch.isnan(p.sum(-1) + q.sum(-1)), torch.full_like(kl, math.nan), kl)
    if mask is not None:
        kl = kl.masked_fill(~mask, 0.0)
    return kl, kl.new_zeros((*kl.shape, 8))


def token_kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    kind: int,
    beta: float,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
    inf_mask: bool,
    need_policy: bool,
    need_ref: bool,
) -> tuple[Tensor, Tensor]:
    lp, lq = log_probs(
        logits,
        ref_logits,
        mask,
        scale,
        ref_scale,
        softcap,
        ref_softcap,
        inv_temperature,
        ref_inv_temperature,
        inf_mask,
    )
    p, q, u = lp.exp(), lq.exp(), gap(lp, lq)
    # p - q without its rounding error
    difference = torch.where(u.abs() <= 1, -p * torch.expm1(-u), p - q)
    if kind == POLICY_REF:
        for_p, for_q = times(p, u - times(p, u).sum(-1, keepdim=True)), -difference
    elif kind == REF_POLICY:
        for_p, for_q = difference, times(q, -u + times(q, u).sum(-1, keepdim=True))
    elif beta in (0.0, 1.0):
        for_p, for_q = p * 0, q * 0
    else:
        p_to_m, q_to_m = divergences_to_mixture(p, q, u, beta)
        for_p = (1 - beta) * times(p, p_to_m - times(p, p_to_m).sum(-1, keepdim=True))
        for_q = beta * times(q, q_to_m - times(q, q_to_m).sum(-1, keepdim=True))
    out = []
    sides = (
        (for_p, logits, scale, softcap, inv_temperature, need_policy),
        (for_q, ref_logits, ref_scale, ref_softcap, ref_inv_temperature, need_ref),
    )
    for d, raw, s, cap, inv_t, need in sides:
        if not need:
            out.append(raw.new_empty(0))
            continue
        d = d * grad[..., None] * temper_slope(raw, s, cap, inv_t)
        if inf_mask:
            d = d.masked_fill((logits == -math.inf) | (ref_logits == -math.inf), 0.0)
        if mask is not None:
            d = d.masked_fill(~mask[..., None], 0.0)
        out.append(d.to(raw.dtype).contiguous())
    return out[0], out[1]


def token_kl_grad(
    token_weight: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kind: int,
    beta: float,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
    inf_mask: bool,
    need_policy: bool,
    need_ref: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl of every token, gradients of sum_n token_weight_n kl_n by both logits).

    One not asked for is empty.
    """
    options = (
        kind,
        beta,
        scale,
        ref_scale,
        softcap,
        ref_softcap,
        inv_temperature,
        ref_inv_temperature,
        inf_mask,
    )
    kl, stats = token_kl(logits, ref_logits, mask, *options)
    return (
        kl,
        *token_kl_backward(
            token_weight, logits, ref_logits, mask, stats, *options, need_policy, need_ref
        ),
    )


def token_kl_backward_(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    kind: int,
    beta: float,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
    inf_mask: bool,
    need_ref: bool,
) -> Tensor:
    """The policy's gradient written over `logits`; returns the reference's."""
    d_logits, d_ref = token_kl_backward(
        grad,
        logits,
        ref_logits,
        mask,
        stats,
        kind,
        beta,
        scale,
        ref_scale,
        softcap,
        ref_softcap,
        inv_temperature,
        ref_inv_temperature,
        inf_mask,
        True,
        need_ref,
    )
    logits.copy_(d_logits)
    return d_ref


# rows of what token_stats gives
LOGP, REF_LOGP, ENTROPY, LSE, KL_POLICY_REF, KL_REF_POLICY = range(6)


def _tempered_logp(
    logits: Tensor, mask: Tensor | None, scale: float, softcap: float, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    x = temper(logits, scale, softcap, inv_temperature)
    x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
    return x, x.log_softmax(-1)


def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
) -> tuple[Tensor, Tensor]:
    """(values (6, ...): logp, ref_logp, entropy, lse, KL(p||q), KL(q||p), those without ids or
    reference 0; stats (..., 11) that only native kernels fill).
    """
    x, lp = _tempered_logp(logits, mask, scale, softcap, inv_temperature)
    values = x.new_zeros((6, *x.shape[:-1]))
    index = None if ids is None else (ids if mask is None else ids.masked_fill(~mask, 0))[..., None]
    if index is not None:
        values[LOGP] = lp.gather(-1, index)[..., 0]
    values[ENTROPY] = -times(lp.exp(), lp).sum(-1)
    values[LSE] = x.logsumexp(-1)
    if ref_logits is not None:
        lq = _tempered_logp(ref_logits, mask, ref_scale, ref_softcap, ref_inv_temperature)[1]
        if index is not None:
            values[REF_LOGP] = lq.gather(-1, index)[..., 0]
        options = (
            scale,
            ref_scale,
            softcap,
            ref_softcap,
            inv_temperature,
            ref_inv_temperature,
            False,
        )
        for row, kind in ((KL_POLICY_REF, POLICY_REF), (KL_REF_POLICY, REF_POLICY)):
            values[row] = token_kl(logits, ref_logits, mask, kind, 0.0, *options)[0]
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    return values, x.new_zeros((*x.shape[:-1], 11))


def token_stats_backward(
    grads: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    scale: float,
    ref_scale: float,
    softcap: float,
    ref_softcap: float,
    inv_temperature: float,
    ref_inv_temperature: float,
    need_policy: bool,
    need_ref: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_s,n grads[s, n] values[s, n].

    Logp 1[id] - p, lse p, entropy -p (log p + H), the KLs as token_kl_backward. A value whose
    coefficient is 0 is not differentiated: its gradient may be NaN.
    """
    live = torch.ones_like(grads[0], dtype=torch.bool) if mask is None else mask
    x, y = wide(logits), None if ref_logits is None else wide(ref_logits)

    def one_row(
        raw: Tensor, logp_row: int, policy: bool, s: float, cap: float, inv_t: float
    ) -> Tensor:
        rows = [logp_row, ENTROPY, LSE] if policy else [logp_row]
        used = live & (grads[rows] != 0).any(0)
        lp = _tempered_logp(raw, used, s, cap, inv_t)[1]
        p, weight = lp.exp(), grads.masked_fill(~used, 0.0)[..., None]
        d = torch.zeros_like(p)
        if ids is not None:
            at = torch.zeros_like(p).scatter_(-1, ids.masked_fill(~used, 0)[..., None], 1.0)
            p_at_id = torch.where(at > 0, torch.expm1(lp), p)  # p - 1 without its rounding error
            d = d - p_at_id * weight[logp_row]
        if policy:
            entropy = -times(p, lp).sum(-1, keepdim=True)
            d = d + p * weight[LSE] - times(p, lp + entropy) * weight[ENTROPY]
        return times(used[..., None].to(d.dtype), d * temper_slope(raw, s, cap, inv_t))

    d_x = one_row(x, LOGP, True, scale, softcap, inv_temperature) if need_policy else x.new_empty(0)
    d_y = (
        x.new_empty(0)
        if y is None or not need_ref
        else one_row(y, REF_LOGP, False, ref_scale, ref_softcap, ref_inv_temperature)
    )
    if y is not None:
        options = (
            scale,
            ref_scale,
            softcap,
            ref_softcap,
            inv_temperature,
            ref_inv_temperature,
            False,
            need_policy,
            need_ref,
        )
        for row, kind in ((KL_POLICY_REF, POLICY_REF), (KL_REF_POLICY, REF_POLICY)):
            kl_x, kl_y = token_kl_backward(
                grads[row], x, y, live & (grads[row] != 0), stats, kind, 0.0, *options
            )
            d_x, d_y = d_x + kl_x, d_y + kl_y
    return d_x.to(logits.dtype), d_y.to(logits.dtype)
