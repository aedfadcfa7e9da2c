"""The ops over logits in plain PyTorch: specification, test oracle, fallback.

Symbols: p = softmax(policy logits), q = softmax(reference logits), u = log p - log q; N tokens, V
vocabulary. Options come in the order of `Tempering.args`, and those of token_stats in that of
`Tempering.sides`; the last ones of a backward op are the gradients that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax.reference.numbers import empty_gradient, hide, hide_rows, times, wide
from fasttax.reference.rows import (
    ENTROPY,
    KL_POLICY_REF,
    KL_REF_POLICY,
    LOGP,
    LSE,
    REF_LOGP,
    SAVED_KL,
    SAVED_STATS,
    STATS,
)
from fasttax.reference.tempering import Side, Tempering


class Pair(NamedTuple):
    """Both rows of every token as distributions, (..., V)."""

    p: Tensor
    q: Tensor
    u: Tensor  # log p - log q, 0 where both are 0
    lp: Tensor  # log p
    lq: Tensor  # log q

    def apart(self) -> Tensor:
        """The difference p - q without its rounding error."""
        p, q, u = self[:3]
        return torch.where(u.abs() <= 1, -p * torch.expm1(-u), p - q)


def policy_ref(pair: Pair, beta: float) -> Tensor:
    """KL(p || q) = sum p (e^-u - 1 + u), every term >= 0; p e^-u is q where e^-u overflows."""
    p, q, u = pair[:3]
    near = times(p, torch.expm1(-u) + u)
    return torch.where(u.abs() <= 1, near, q - p + times(p, u)).sum(-1)


def policy_ref_slopes(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives p (u - KL) by the policy's tempered logits, q - p by the reference's."""
    p, _, u = pair[:3]
    return times(p, u - times(p, u).sum(-1, keepdim=True)), -pair.apart()


def ref_policy(pair: Pair, beta: float) -> Tensor:
    """KL(q || p) = sum q (e^u - 1 - u), every term >= 0; q e^u is p where e^u overflows."""
    p, q, u = pair[:3]
    near = times(q, torch.expm1(u) - u)
    return torch.where(u.abs() <= 1, near, p - q - times(q, u)).sum(-1)


def ref_policy_slopes(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives p - q by the policy's tempered logits, -q (u + KL) by the reference's."""
    _, q, u = pair[:3]
    return pair.apart(), times(q, -u + times(q, u).sum(-1, keepdim=True))


def jsd(pair: Pair, beta: float) -> Tensor:
    """JSD: beta KL(q || m) + (1 - beta) KL(p || m) of the mixture m = (1 - beta) p + beta q.

    Of close rows p (beta g(e) - g(beta e)) with e = q/p - 1 and g of `jensen_gap`.
    """
    p, q, u = pair[:3]
    if beta in (0.0, 1.0):
        return (p + q).sum(-1) * 0
    p_to_m, q_to_m = divergences_to_mixture(pair, beta)
    eps = torch.expm1(-u)
    close = p * (beta * jensen_gap(eps) - jensen_gap(beta * eps))
    far = beta * times(q, q_to_m) + (1 - beta) * times(p, p_to_m)
    return torch.where(u.abs() < 0.5, close, far).sum(-1).clamp_min(0)


def jsd_slopes(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives (1 - beta) p (log(p/m) - KL(p || m)), and beta q (log(q/m) - KL(q || m))."""
    p, q, _ = pair[:3]
    if beta in (0.0, 1.0):
        return p * 0, q * 0
    p_to_m, q_to_m = divergences_to_mixture(pair, beta)
    for_p = (1 - beta) * times(p, p_to_m - times(p, p_to_m).sum(-1, keepdim=True))
    for_q = beta * times(q, q_to_m - times(q, q_to_m).sum(-1, keepdim=True))
    return for_p, for_q


def log_mixture(u: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m/p) and log(m/q) of the mixture m = (1 - beta) p + beta q, 0 where u = log p - log q is.

    Each by log(m / the larger of p and q): no large u cancels.
    """
    e = torch.exp(-u.abs())
    below = u < 0
    w = torch.where(below, beta + (1 - beta) * e, (1 - beta) + beta * e)
    near = torch.log1p(torch.where(below, (e - 1) * (1 - beta), (e - 1) * beta))
    larger = torch.where(w > 0.5, near, torch.log(w))
    return torch.where(below, larger - u, larger), torch.where(below, larger, larger + u)


def jensen_gap(t: Tensor) -> Tensor:
    """g(t) = (1 + t) log1p(t) - t >= 0; the series below 0.1, where the difference would cancel."""
    series = sum(((-t) ** k / (k * (k - 1)) for k in range(2, 12)), torch.zeros_like(t))
    return torch.where(t.abs() < 0.1, series, times(1 + t, torch.log1p(t)) - t)


def divergences_to_mixture(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m)."""
    over_p, over_q = log_mixture(pair.u, beta)
    return -over_p, -over_q


def renyi(pair: Pair, beta: float) -> Tensor:
    """Renyi divergence of order a = beta: log(sum p^a q^(1-a)) / (a - 1), >= 0.

    The sum is 1 + M, and every term of M = sum p [e^-cu - 1 - c (e^-u - 1)], c = 1 - a, has the
    sign of -c.
    """
    return (_log_sum(pair, beta) / (beta - 1)).clamp_min(0)[..., 0]


def renyi_slopes(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives a/(a - 1) (w - p) and q - w with w = p^a q^(1-a) / (1 + M).

    As p (w/p - 1) and q (1 - w/q), of the quotients' logarithms, where those are small. In close
    rows, where log(1 + M) is, u has more digits than log p and log q.
    """
    p, q, u = pair[:3]
    log_sum = _log_sum(pair, beta)
    log_w = _log_terms(pair, beta) - log_sum
    close = log_sum.abs() < 0.4
    from_p = torch.where(close, (beta - 1) * u - log_sum, log_w - pair.lp)
    from_q = torch.where(close, beta * u - log_sum, log_w - pair.lq)
    w = torch.exp(log_w)
    for_p = torch.where(from_p.abs() <= 1, p * torch.expm1(from_p), w - p)
    for_q = torch.where(from_q.abs() <= 1, -q * torch.expm1(from_q), q - w)
    return beta / (beta - 1) * for_p, for_q


def _log_terms(pair: Pair, beta: float) -> Tensor:
    """The logs of p^a q^(1-a); -inf where p is 0."""
    return torch.where(pair.lp == -math.inf, pair.lp, beta * pair.lp + (1 - beta) * pair.lq)


def _log_sum(pair: Pair, beta: float) -> Tensor:
    """The log of sum p^a q^(1-a) (..., 1): of M where it is small, or the sum's own logarithm."""
    p, q, u = pair[:3]
    c, terms = 1 - beta, _log_terms(pair, beta)
    near = (u.abs() <= 1) & ((c * u).abs() <= 1)
    close = p * (_bregman(c * u) - c * _bregman(u))
    by_p = torch.where((c * u).abs() <= 1, p * torch.expm1(-c * u), torch.exp(terms) - p)
    by_q = q * torch.expm1(beta * u) - beta * (p - q)  # keeps its digits where a is near 0
    far = torch.where((beta * u).abs() <= 1, by_q, by_p - c * (q - p))
    m = torch.where(near, close, far).sum(-1, keepdim=True)
    log_sum = terms.logsumexp(-1, keepdim=True)
    return torch.where(log_sum.abs() < 0.4, torch.log1p(m), log_sum)


def _bregman(t: Tensor) -> Tensor:
    """e^-t - 1 + t >= 0; the series below 0.1, where the difference would cancel."""
    series = sum(((-t) ** k / math.factorial(k) for k in range(2, 10)), torch.zeros_like(t))
    return torch.where(t.abs() < 0.1, series, torch.expm1(-t) + t)


class Divergence(NamedTuple):
    """A kind's formulas, as functions of both rows and beta.

    `in_double`: the log-probs' rounding in float32 would be all of a collapsed row's gradient, as
    that of capped logits is much of a small KL.
    """

    value: Callable[[Pair, float], Tensor]
    slopes: Callable[[Pair, float], tuple[Tensor, Tensor]]
    in_double: bool = False


POLICY_REF, REF_POLICY, JSD, RENYI = range(4)
DIVERGENCES = {  # by the ops' `kind`
    POLICY_REF: Divergence(policy_ref, policy_ref_slopes),
    REF_POLICY: Divergence(ref_policy, ref_policy_slopes),
    JSD: Divergence(jsd, jsd_slopes),
    RENYI: Divergence(renyi, renyi_slopes, in_double=True),
}


def log_probs(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering
) -> tuple[Tensor, Tensor]:
    """Both log-probs, log p and log q; uniform ones under the mask, where logits may be NaN."""
    x = hide_rows(t.policy.temper(logits), mask)
    y = hide_rows(t.ref.temper(ref_logits), mask)
    if t.inf_mask:
        gone = (logits == -math.inf) | (ref_logits == -math.inf)
        gone = hide_rows(gone, mask)
        x, y = x.masked_fill(gone, -math.inf), y.masked_fill(gone, -math.inf)
    return x.log_softmax(-1), y.log_softmax(-1)


def gap(lp: Tensor, lq: Tensor) -> Tensor:
    """The log-ratio u = log p - log q, 0 where both are -inf."""
    return torch.where((lp == -math.inf) & (lq == -math.inf), torch.zeros_like(lp), lp - lq)


def _pair(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering) -> Pair:
    if DIVERGENCES[t.kind].in_double or t.policy.softcap > 0 or t.ref.softcap > 0:
        logits, ref_logits = logits.double(), ref_logits.double()
    lp, lq = log_probs(logits, ref_logits, mask, t)
    return Pair(lp.exp(), lq.exp(), gap(lp, lq), lp, lq)


def token_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """(kl (...), what a backward wants (..., 8): only native kernels fill it)."""
    t = Tempering.of_args(options)
    pair = _pair(logits, ref_logits, mask, t)
    kl = DIVERGENCES[t.kind].value(pair, t.beta)
    # a row of NaN (or of -inf alone) is NaN, also where a divergence's comparisons dropped it
    broken = torch.isnan(pair.p.sum(-1) + pair.q.sum(-1))
    kl = hide(torch.where(broken, torch.full_like(kl, math.nan), kl), mask).to(wide(logits).dtype)
    return kl, kl.new_zeros((*kl.shape, SAVED_KL))


def token_kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_n grad_n kl_n by both logits; one that is not needed is empty."""
    *args, need_policy, need_ref = options
    t = Tempering.of_args(args)
    slopes = DIVERGENCES[t.kind].slopes(_pair(logits, ref_logits, mask, t), t.beta)

    def gradient(slope: Tensor, raw: Tensor, side: Side) -> Tensor:
        d = slope * grad[..., None] * side.slope(raw)
        if t.inf_mask:
            d = d.masked_fill((logits == -math.inf) | (ref_logits == -math.inf), 0.0)
        return hide_rows(d, mask).to(raw.dtype).contiguous()

    d_logits, d_ref = empty_gradient(logits, False), empty_gradient(ref_logits, False)
    if need_policy:
        d_logits = gradient(slopes[0], logits, t.policy)
    if need_ref:
        d_ref = gradient(slopes[1], ref_logits, t.ref)
    return d_logits, d_ref


def token_kl_grad(
    token_weight: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl of every token, gradients of sum_n token_weight_n kl_n by both logits)."""
    kl, saved = token_kl(logits, ref_logits, mask, *options[:-2])
    return kl, *token_kl_backward(token_weight, logits, ref_logits, mask, saved, *options)


def token_kl_backward_(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> Tensor:
    """The policy's gradient written over `logits`; returns the reference's."""
    *args, need_ref = options
    d_logits, d_ref = token_kl_backward(
        grad, logits, ref_logits, mask, saved, *args, True, need_ref
    )
    logits.copy_(d_logits)
    return d_ref


KINDS_OF_ROWS = ((KL_POLICY_REF, POLICY_REF), (KL_REF_POLICY, REF_POLICY))


def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor]:
    """(values (6, ...) in the order of STATS, what a backward wants (..., 11)).

    Values without their ids or reference are 0; only native kernels fill the second.
    """
    t = Tempering.of_sides(options)
    x = hide_rows(t.policy.temper(logits), mask)
    lp = x.log_softmax(-1)
    values = x.new_zeros((len(STATS), *x.shape[:-1]))
    values[ENTROPY] = -times(lp.exp(), lp).sum(-1)
    values[LSE] = x.logsumexp(-1)
    if ids is not None:
        ids = hide(ids, mask)[..., None]
        values[LOGP] = lp.gather(-1, ids)[..., 0]
    if ref_logits is not None:
        if ids is not None:
            lq = hide_rows(t.ref.temper(ref_logits), mask).log_softmax(-1)
            values[REF_LOGP] = lq.gather(-1, ids)[..., 0]
        for row, kind in KINDS_OF_ROWS:
            args = Tempering.of_sides(options, kind).args()
            values[row] = token_kl(logits, ref_logits, mask, *args)[0]
    return hide(values, mask), x.new_zeros((*x.shape[:-1], SAVED_STATS))


def token_stats_backward(
    grads: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_s,n grads[s, n] values[s, n] by both logits.

    Those of logp are 1[id] - p, of lse p, of entropy -p (log p + H), of the KLs as
    token_kl_backward's. A value whose coefficient is 0 is not differentiated: its gradient may be
    NaN.
    """
    *sides, need_policy, need_ref = options
    t = Tempering.of_sides(sides)
    live = torch.ones_like(grads[0], dtype=torch.bool) if mask is None else mask

    def of_one_row(raw: Tensor, side: Side, logp_row: int, others: tuple[int, ...]) -> Tensor:
        used = live & (grads[[logp_row, *others]] != 0).any(0)
        lp = hide_rows(side.temper(raw), used).log_softmax(-1)
        p, weight = lp.exp(), hide(grads, used)[..., None]
        d = torch.zeros_like(p)
        if ids is not None:
            at = torch.zeros_like(p).scatter_(-1, hide(ids, used)[..., None], 1.0)
            # p - 1 without its rounding error
            d = d - torch.where(at > 0, torch.expm1(lp), p) * weight[logp_row]
        if others:
            entropy = -times(p, lp).sum(-1, keepdim=True)
            d = d + p * weight[LSE] - times(p, lp + entropy) * weight[ENTROPY]
        return times(used[..., None].to(d.dtype), d * side.slope(raw))

    x = wide(logits)
    d_x, d_y = empty_gradient(x, False), empty_gradient(x, False)
    if need_policy:
        d_x = of_one_row(x, t.policy, LOGP, (ENTROPY, LSE))
    if ref_logits is not None:
        y = wide(ref_logits)
        if need_ref:
            d_y = of_one_row(y, t.ref, REF_LOGP, ())
        for row, kind in KINDS_OF_ROWS:
            args = Tempering.of_sides(sides, kind).args()
            used = live & (grads[row] != 0)
            kl_x, kl_y = token_kl_backward(
                grads[row], x, y, used, saved, *args, need_policy, need_ref
            )
            d_x, d_y = d_x + kl_x, d_y + kl_y
    return d_x.to(logits.dtype), d_y.to((logits if ref_logits is None else ref_logits).dtype)
