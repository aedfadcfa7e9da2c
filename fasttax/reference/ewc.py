"""The ops of EWC and AdamWEWC in plain PyTorch: specification, test oracle, fallback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fasttax.reference.numbers import wide


def decode_u8log(codes: Tensor, scales: Tensor) -> Tensor:
    """Fisher = 2^(lo + step (code - 1)) per block of 256, code 0 is 0.

    Scales (blocks, 2) float32 holds (lo, step).
    """
    flat = codes.flatten()
    lo, step = scales.repeat_interleave(256, 0)[: flat.numel()].unbind(-1)
    values = torch.exp2(lo + step * (flat.float() - 1))
    return torch.where(flat == 0, torch.zeros_like(lo), values).view_as(codes)


SPLIT_STEP = 2.0**-7 / 254
MOST = torch.finfo(torch.float64).max  # a finite factor, so that its product with 0 is 0


def decode_split(packed: Tensor, count: int) -> Tensor:
    """Anchor = hi + lo * ulp(hi) / 254.

    Per 256 elements 512 bytes of bfloat16 hi, then 256 of int8 lo.
    """
    blocks = packed.view(-1, 768)
    hi = blocks[:, :512].contiguous().view(torch.bfloat16).float().flatten()[:count]
    lo = blocks[:, 512:].contiguous().view(torch.int8).flatten()[:count]
    power = (hi.view(torch.int32) & 0x7F800000).view(torch.float32)
    return hi + lo.float() * (power * SPLIT_STEP)


def _anchor(anchor: Tensor, theta: Tensor) -> Tensor:
    split = anchor.dtype == torch.uint8
    return (decode_split(anchor, theta.numel()) if split else wide(anchor)).view_as(theta)


def _fisher(fisher: Tensor, scales: Sequence[Tensor], i: int, theta: Tensor) -> Tensor:
    coded = fisher.dtype == torch.uint8
    return (decode_u8log(fisher, scales[i]) if coded else wide(fisher)).view_as(theta)


def _floats(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(theta, anchor, fisher) of each parameter, in the dtype of the arithmetic."""
    for i, (theta, anchor, fisher) in enumerate(zip(params, anchors, fishers, strict=True)):
        yield wide(theta), _anchor(anchor, theta), _fisher(fisher, scales, i, theta)


def _penalty(params: Sequence[Tensor], terms: Iterable[Tensor], strength: float) -> Tensor:
    """strength/2 times the sum of float64 `terms`, float64 for float64 parameters."""
    if not params:
        return torch.zeros((), dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for term in terms:
        total = total + term
    return (strength / 2 * total).to(torch.promote_types(params[0].dtype, torch.float32))


def ewc_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> Tensor:
    """strength/2 * sum fisher * (theta - anchor)^2, summed in float64."""
    terms = (
        (fisher * (theta - anchor) * (theta - anchor)).sum(dtype=torch.float64)
        for theta, anchor, fisher in _floats(params, anchors, fishers, scales)
    )
    return _penalty(params, terms, strength)


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    """The product x * factor in x's dtype, for factors that the dtype cannot hold too.

    Inf where the product is, 0 where x is.
    """
    return (x.double() * factor).to(x.dtype)


def _timed(factor: float, times: Tensor | None) -> Tensor | float:
    """The product of a number and a value on the device; finite unless that is NaN."""
    if times is None:
        return factor
    return (times.double() * factor).reshape(()).clamp(-MOST, MOST)


def ewc_penalty_backward(
    grad: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> list[Tensor]:
    """Gradients grad * strength * fisher * (theta - anchor), in each parameter's dtype."""
    factor = grad.double() * strength
    return [
        _times(fisher * (theta - anchor), factor).to(own.dtype)
        for own, (theta, anchor, fisher) in zip(
            params, _floats(params, anchors, fishers, scales), strict=True
        )
    ]


def ewc_add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
    scale: float,
    times: Tensor | None = None,
) -> Tensor:
    """Adds times * scale * strength * fisher * (theta - anchor) to grads; returns `ewc_penalty`."""
    factor = _timed(strength * scale, times)
    for grad, (theta, anchor, fisher) in zip(
        grads, _floats(params, anchors, fishers, scales), strict=True
    ):
        pull = _times(fisher * (theta - anchor), factor)
        grad.copy_(wide(grad) + pull.view_as(grad))
    return ewc_penalty(params, anchors, fishers, scales, strength)


def prox(theta: Tensor, anchor: Tensor, metric: Tensor, pull: Tensor) -> Tensor:
    """argmin_t metric (t - theta)^2 / 2 + pull (t - anchor)^2 / 2.

    Exactly theta at pull = 0 and exactly the anchor at pull = inf.
    """
    delta, share = theta - anchor, 1 / (metric + pull)
    near, far = theta - delta * (pull * share), anchor + delta * (metric * share)
    return torch.where(pull < metric, near, far)


def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength_times_lr: float,
    times: Tensor | None = None,
) -> None:
    """Moves params to anchor + (theta - anchor) / (1 + times * strength_times_lr * fisher)."""
    step = _timed(strength_times_lr, times)
    for own, (theta, anchor, fisher) in zip(
        params, _floats(params, anchors, fishers, scales), strict=True
    ):
        pull = _times(fisher, step)
        own.copy_(prox(theta, anchor, torch.ones_like(theta), pull))


def ewc_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    prox_mode: bool,
    strength: float,
    second_moment: float,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """One step of AdamW with EWC (fasttax.AdamWEWC).

    An empty anchor leaves its parameter plain AdamW, an empty fisher takes second_moment *
    exp_avg_sq / (1 - beta2^t). Returns the penalty before the step, 0 where found_inf skips it.
    """
    terms = []
    for i, (theta, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        before, m, v = wide(theta), wide(exp_avgs[i]), wide(exp_avg_sqs[i])
        live = _live(found_inf, theta.device)
        t = step.to(theta.device).double() + 1
        rate = lr.to(theta.device).double()
        held = anchors[i].numel() > 0 or theta.numel() == 0
        anchor = _anchor(anchors[i], theta) if held else before
        fisher = torch.zeros_like(before)
        g = _loss_gradient(grad, maximize, grad_scale)
        if held and not prox_mode:
            fisher = _weight(fishers, scales, i, v, _unbiased(second_moment, beta2, t - 1))
            g = g + _times(fisher * (before - anchor), strength)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + (1 - beta2) * g * g
        most = torch.maximum(wide(max_exp_avg_sqs[i]), v) if max_exp_avg_sqs else v
        metric = most.sqrt() / (1 - beta2**t).sqrt() + eps
        after = before * (1 - rate * weight_decay) - rate / (1 - beta1**t) * m / metric
        if held and prox_mode:
            fisher = _weight(fishers, scales, i, v, _unbiased(second_moment, beta2, t))
            after = prox(after, anchor, metric, _times(fisher, (rate * strength).clamp(max=MOST)))
        if held:
            term = (fisher * (before - anchor) ** 2).sum(dtype=torch.float64)
            terms.append(torch.where(live, term, 0.0))
        written = [(theta, after), (exp_avgs[i], m), (exp_avg_sqs[i], v)]
        if max_exp_avg_sqs:
            written.append((max_exp_avg_sqs[i], most))
        for own, value in written:
            own.copy_(torch.where(live, value.to(own.dtype), own))
        step.add_(live.to(step.device, step.dtype))
    return _penalty(params, terms, strength)


def _live(found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Whether the step is taken, a 0-d bool: a GradScaler's found_inf skips it."""
    if found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return found_inf.to(device).reshape(()) == 0


def _loss_gradient(grad: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    """The gradient to descend, without a GradScaler's scale."""
    descent = -wide(grad) if maximize else wide(grad)
    return descent if grad_scale is None else descent * (1 / grad_scale.to(grad.device).double())


def _unbiased(factor: float, beta2: float, t: Tensor) -> Tensor:
    """Factor / (1 - beta2^t), 0 where no step has been."""
    return torch.where(t > 0, factor / (1 - beta2**t).clamp_min(1e-300), 0.0)


def _weight(
    fishers: Sequence[Tensor], scales: Sequence[Tensor], i: int, v: Tensor, factor: Tensor
) -> Tensor:
    """The i-th Fisher, or where it is empty factor * v."""
    own = fishers[i].numel() > 0 or v.numel() == 0
    return _fisher(fishers[i], scales, i, v) if own else v * factor


def lora_ewc_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    fisher: Tensor,
    scales: Tensor,
    scale: float,
    strength: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """strength/2 * sum fisher * (scale * B @ A)^2, and its gradients (empty where not asked for).

    With G = strength * scale * fisher * (scale B A), d_A = B^T G and d_B = G A^T. By blocks of rows
    of B, so that no dense B @ A is stored.
    """
    a, whole = wide(lora_A), wide(lora_B)
    fisher = decode_u8log(fisher, scales) if fisher.dtype == torch.uint8 else fisher
    rows = max(1, (1 << 20) // max(1, a.shape[1]))
    total = a.new_zeros(())
    d_a, d_b = (torch.zeros_like(x) if gradient else x.new_empty(0, 0) for x in (a, whole))
    for start in range(0, lora_B.shape[0], rows):
        b = whole[start : start + rows]
        delta = b @ a
        g = wide(fisher[start : start + rows]) * delta
        total = total + (g * delta).sum()
        if gradient:
            d_a += b.T @ g
            d_b[start : start + rows] = g @ a.T
    factor = strength * scale * scale
    return factor / 2 * total, factor * d_a, factor * d_b


def lora_ewc_penalty_backward(
    grad: Tensor, lora_A: Tensor, lora_B: Tensor, d_A: Tensor, d_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients that lora_ewc_penalty made with the value, times the upstream one.

    The factors come along so that a second derivative meets this op, which refuses it.
    """
    return (grad * d_A).to(lora_A.dtype), (grad * d_B).to(lora_B.dtype)
