"""What becomes of the tokens' values: estimates of the KL, weights, mask, sums.

`values` are rows of the tokens, each tensor (R, ...) some of them; rows are counted through all
tensors. `outputs` names a result each: a row by its number, or K1, K2, K3 (below 0) of the
log-probs whose rows `pair` lists: the policy's, the reference's and, to multiply by the importance
ratio, that of the policy that sampled. Every result is multiplied by `scale` and the token's
weight, is 0 where the mask is false, and is reduced as REDUCTIONS has it.

Plain PyTorch, so that torch.compile, torch.func and forward mode go through `weigh_tokens`; the
ops of the same names are the same in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fasttax.reference.kl import gap
from fasttax.reference.numbers import hide, times, wide, wide_dtype

NONE, SUM, MEAN = range(3)
REDUCTIONS = ("none", "sum", "mean")  # by these numbers
K1, K2, K3 = -1, -2, -3
SERIES = 14  # terms of e^r, exact to float64 for |r| < 1/2


def token_weights(
    like: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: int, scale: float
) -> Tensor:
    """What every token's value is multiplied by in its reduction; `like` gives shape and dtype."""
    if weight is None:
        by_token = torch.full_like(like, scale)
    else:
        by_token = hide(weight.to(like.dtype), mask) * scale
    return by_token / _count(like, mask) if reduction == MEAN else by_token.contiguous()


def weigh_tokens(
    values: Sequence[Tensor],
    outputs: Sequence[int],
    pair: Sequence[int],
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    scale: float,
    clip: float,
    reverse: bool,
) -> list[Tensor]:
    """The `outputs`, (...) or 0-d.

    Args:
        values: see the module.
        outputs: see the module.
        pair: see the module.
        mask: bool (...).
        weight: (...).
        reduction: of REDUCTIONS, by its number.
        scale: on every result.
        clip: the log-ratio above which an estimate's exponential goes on along its tangent.
        reverse: estimates have the gradient of KL(policy || ref), whatever their value.
    """
    rows = [row for value in values for row in value.unbind(0)]
    results = []
    for output in outputs:
        if output >= 0:
            value = hide(rows[output], mask)
        else:
            value = estimate([hide(rows[i], mask) for i in pair], output, clip, reverse)
        results.append(_reduced(value, mask, weight, reduction, scale))
    return results


def _reduced(
    value: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: int, scale: float
) -> Tensor:
    count = _count(value, mask) if reduction == MEAN else 1
    if weight is not None:
        by_token = hide(weight.to(value.dtype), mask)
        value = value * (by_token if scale == 1 else by_token * scale)
    elif reduction == NONE:
        return value * scale
    if reduction == NONE:
        return value
    total = value.sum()
    if weight is None and scale != 1:
        total = total * scale
    return total / count if reduction == MEAN else total


def weigh_tokens_backward(
    grads: Sequence[Tensor],
    which: Sequence[int],
    values: Sequence[Tensor],
    outputs: Sequence[int],
    pair: Sequence[int],
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    scale: float,
    clip: float,
    reverse: bool,
) -> Tensor:
    """Gradients by all rows, (rows, ...).

    Args:
        grads: of some results.
        which: their places in `outputs`.
        values: as in `weigh_tokens`.
        outputs: as in `weigh_tokens`.
        pair: as in `weigh_tokens`.
        mask: as in `weigh_tokens`.
        weight: as in `weigh_tokens`.
        reduction: as in `weigh_tokens`.
        scale: as in `weigh_tokens`.
        clip: as in `weigh_tokens`.
        reverse: as in `weigh_tokens`.
    """
    rows = [row for value in values for row in value.unbind(0)]
    by_token = token_weights(rows[0], mask, weight, reduction, scale)
    parts = [torch.zeros_like(by_token) for _ in rows]
    for grad, place in zip(grads, which, strict=True):
        upstream = hide(by_token * grad, mask)
        if outputs[place] >= 0:
            parts[outputs[place]] = parts[outputs[place]] + upstream
            continue
        logps = [hide(rows[i], mask) for i in pair]
        for i, slope in zip(pair, slopes(logps, outputs[place], clip, reverse), strict=True):
            parts[i] = parts[i] + times(upstream, slope)
    return torch.stack(parts)


PART = 1 << 20  # entries that are wide at a time


def scale_held_(held: Tensor, factor: Tensor) -> None:
    """Multiplies a contiguous gradient in place, not touching what a factor of 1 leaves as it is.

    Args:
        held: (...), multiplied in float32, or in float64, and rounded once.
        factor: one number, or one for each of held's first dimension.
    """
    if held.numel() == 0 or (factor.device.type == "cpu" and bool((factor == 1).all())):
        return
    rows, by_row = held.view(factor.numel(), -1), factor.to(wide_dtype(held)).reshape(-1, 1)
    for part in rows.split(max(1, PART // factor.numel()), 1):
        part.copy_(wide(part) * by_row)


# estimates of KL(policy || ref), from log-probs of the tokens that were sampled


def estimate(logps: Sequence[Tensor], kind: int, clip: float, reverse: bool) -> Tensor:
    """K1, K2 or K3 of the log-probs (policy, reference[, the policy that sampled])."""
    logp, r, ratio = _ratios(logps, clip)
    value = ratio * _estimator(kind, r, clip)
    if reverse:
        # finite, as is the log-prob that carries it: their product is no NaN
        slope = (ratio * -r).detach().nan_to_num(nan=torch.nan)
        through = torch.where(logp == -torch.inf, 0.0, logp)
        value = value.detach() + slope * (through - through.detach())
    return value


def slopes(logps: Sequence[Tensor], kind: int, clip: float, reverse: bool) -> list[Tensor]:
    """Derivatives of `estimate` by the log-probs, in their order."""
    logp, r, ratio = _ratios(logps, clip)
    nothing = torch.zeros_like(logp)
    if reverse:
        slope = (ratio * -r).nan_to_num(nan=torch.nan)
        return [torch.where(logp == -torch.inf, 0.0, slope), *[nothing] * (len(logps) - 1)]
    by_r = ratio * _slope(kind, r, clip)
    by_r = torch.where(_lost(logps[1], logp) | (ratio == 0), 0.0, by_r)
    if len(logps) == 2:
        return [-by_r, by_r]
    # the ratio's exponential is its own derivative, up to the clip
    by_old = times(ratio.clamp_max(math.exp(clip)), _estimator(kind, r, clip))
    by_old = torch.where(_lost(logp, logps[2]), 0.0, by_old)
    return [by_old - by_r, by_r, -by_old]


def _ratios(logps: Sequence[Tensor], clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's log-prob, the log-ratio r = ref_logp - logp, and the importance ratio."""
    logp, r = logps[0], gap(logps[1], logps[0])
    ratio = torch.ones_like(logp)
    if len(logps) == 3:
        ratio = _exp(gap(logp, logps[2]), clip)
        # what has no weight counts nothing, nor does an infinite slope of it
        r = torch.where(ratio == 0, 0.0, r)
    return logp, r, ratio


def _lost(lp: Tensor, lq: Tensor) -> Tensor:
    """Where `gap` is 0 because both are -inf, and has no slope."""
    return (lp == -math.inf) & (lq == -math.inf)


def _estimator(kind: int, r: Tensor, clip: float) -> Tensor:
    if kind == K1:
        return -r
    if kind == K2:
        return r * r / 2
    small, far = r.abs() < 0.5, r > clip
    near = _excess(torch.where(small, r, 0.0))
    between = torch.where(small | far, 0.0, r)
    # beyond the clip e^r goes on along its tangent, in a form that is inf at inf
    top = math.exp(clip)
    beyond = (top - 1) * (r - clip) + (top - 1 - clip)
    return torch.where(small, near, torch.where(far, beyond, torch.exp(between) - 1 - between))


def _excess(r: Tensor) -> Tensor:
    """e^r - 1 - r for |r| < 1/2; its derivative keeps its digits too (expm1's is 1 + (e^r - 1)).

    It is s + e y + (1 + e) (e^y - 1 - y), where e = e^r - 1 and its series s without the first
    term are constants and y, which is 0, carries the derivatives.
    """
    constant = r.detach()
    e, y = torch.expm1(constant), r - constant
    s = torch.zeros_like(constant)
    for n in range(SERIES, 1, -1):
        s = s * constant + 1 / math.factorial(n)
    return s * constant**2 + e * y + (1 + e) * (torch.expm1(y) - y)


def _slope(kind: int, r: Tensor, clip: float) -> Tensor:
    """The derivative of `_estimator` by r."""
    if kind == K1:
        return torch.full_like(r, -1.0)
    if kind == K2:
        return r
    return torch.expm1(torch.where(r > clip, clip, r))


def _exp(x: Tensor, clip: float) -> Tensor:
    """e^x up to `clip`, its tangent beyond.

    Large log-ratios give large finite values and gradients, never inf or 0 * inf. Each is chosen by
    itself: at the clip a clamp would count both gradients.
    """
    far = x > clip
    return torch.where(far, math.exp(clip) * (1 + (x - clip)), torch.where(far, clip, x).exp())


def _count(like: Tensor, mask: Tensor | None) -> int | Tensor:
    """The number of unmasked tokens, at least 1; no host sync."""
    return max(1, like.numel()) if mask is None else mask.sum().clamp(min=1)
