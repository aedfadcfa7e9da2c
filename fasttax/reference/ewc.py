"""The ops of EWC and AdamWEWC in plain PyTorch: specification, test oracle, fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttax.reference.numbers import wide


def decode_u8log(codes: Tensor, scales: Tensor) -> Tensor:
    """Fisher = 2^(lo + step (code - 1)) per block of 256, code 0 is 0.

    Scales (blocks, 2) float32 holds (lo, step).
    """
    flat = codes.flatten()
    lo, step = scales.repeat_interleave(256, 0)[: flat.numel()].unbind(-1)
    return torch.where(
        flat == 0, torch.zeros_like(lo), torch.exp2(lo + step * (flat.float() - 1))
    ).view_as(codes)


SPLIT_STEP = 2.0**-7 / 254


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
    return (
        decode_split(anchor, theta.numel()) if anchor.dtype == torch.uint8 else wide(anchor)
    ).view_as(theta)


def _fisher(fisher: Tensor, scales: Sequence[Tensor], i: int, theta: Tensor) -> Tensor:
    f = decode_u8log(fisher, scales[i]) if fisher.dtype == torch.uint8 else wide(fisher)
    return f.view_as(theta)


def ewc_penalty(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> Tensor:
    """strength/2 * sum fisher * (theta - anchor)^2, summed in float64."""
    if not params:
        return torch.zeros(())
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for i, (theta, anchor, fisher) in enumerate(zip(params, anchors, fishers, strict=True)):
        delta = wide(theta) - _anchor(anchor, theta)
        total = total + (_fisher(fisher, scales, i, theta) * delta * delta).sum(dtype=torch.float64)
    return (strength / 2 * total).to(
        torch.float64 if params[0].dtype == torch.float64 else torch.float32
    )


def _pull(theta: Tensor, anchor: Tensor, fisher: Tensor) -> Tensor:
    return fisher * (wide(theta) - _anchor(anchor, theta))


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    """X * factor in x's dtype, for factors that the dtype cannot hold too.

    Inf where the product is, 0 where x is.
    """
    return (x.double() * factor).to(x.dtype)


def ewc_penalty_backward(
    grad: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
) -> list[Tensor]:
    return [
        _times(
            _pull(theta, anchor, _fisher(fisher, scales, i, theta)), grad.double() * strength
        ).to(theta.dtype)
        for i, (theta, anchor, fisher) in enumerate(zip(params, anchors, fishers, strict=True))
    ]


def ewc_add_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength: float,
    scale: float,
) -> Tensor:
    for i, (theta, grad, anchor, fisher) in enumerate(
        zip(params, grads, anchors, fishers, strict=True)
    ):
        pull = _pull(theta, anchor, _fisher(fisher, scales, i, theta))
        grad.copy_(wide(grad) + _times(pull, strength * scale).view_as(grad))
    return ewc_penalty(params, anchors, fishers, scales, strength)


def prox(theta: Tensor, anchor: Tensor, metric: Tensor, pull: Tensor) -> Tensor:
    """argmin_t metric (t - theta)^2 / 2 + pull (t - anchor)^2 / 2.

    Exactly theta at pull = 0 and exactly the anchor at pull = inf.
    """
    delta, share = theta - anchor, 1 / (metric + pull)
    return torch.where(
        pull < metric, theta - delta * (pull * share), anchor + delta * (metric * share)
    )


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
    penalties = []
    for i, (theta, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        old, m, v = wide(theta), wide(exp_avgs[i]), wide(exp_avg_sqs[i])
        live = (
            torch.ones((), dtype=torch.bool, device=theta.device)
            if found_inf is None
            else found_inf.to(theta.device).reshape(()) == 0
        )
        t = step.to(theta.device).double() + 1
        rate = lr.to(theta.device).double()
        g = (
            wide(grad)
            * (-1 if maximize else 1)
            * (1 if grad_scale is None else 1 / grad_scale.to(theta.device).double())
        )
        held = anchors[i].numel() > 0 or theta.numel() == 0
        if held:
            anchor = _anchor(anchors[i], theta)
            own = fishers[i].numel() > 0 or theta.numel() == 0
            fisher = (
                _fisher(fishers[i], scales, i, theta)
                if own
                else v
                * torch.where(t > 1, second_moment / (1 - beta2 ** (t - 1)).clamp_min(1e-300), 0.0)
            )
            if not prox_mode:
                g = g + _times(fisher * (old - anchor), strength)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + (1 - beta2) * g * g
        most = torch.maximum(wide(max_exp_avg_sqs[i]), v) if len(max_exp_avg_sqs) else v
        metric = most.sqrt() / (1 - beta2**t).sqrt() + eps
        new = old * (1 - rate * weight_decay) - rate / (1 - beta1**t) * m / metric
        if held and prox_mode:
            fisher = fisher if own else v * (second_moment / (1 - beta2**t))
            new = prox(new, anchor, metric, _times(fisher, rate * strength))
        if held:
            penalties.append(
                torch.where(live, (fisher * (old - anchor) ** 2).sum(dtype=torch.float64), 0.0)
            )
        for target, value in (
            (theta, new),
            (exp_avgs[i], m),
            (exp_avg_sqs[i], v),
            *([(max_exp_avg_sqs[i], most)] if len(max_exp_avg_sqs) else []),
        ):
            target.copy_(torch.where(live, value.to(target.dtype), target))
        step.add_(live.to(step.device, step.dtype))
    dtype = torch.float64 if params and params[0].dtype == torch.float64 else torch.float32
    device = params[0].device if params else None
    return (strength / 2 * sum(penalties, torch.zeros((), dtype=torch.float64, device=device))).to(
        dtype
    )


def ewc_prox_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    scales: Sequence[Tensor],
    strength_times_lr: float,
) -> None:
    for i, (theta, anchor, fisher) in enumerate(zip(params, anchors, fishers, strict=True)):
        theta.copy_(
            prox(
                wide(theta),
                _anchor(anchor, theta),
                torch.ones_like(wide(theta)),
                _times(_fisher(fisher, scales, i, theta), strength_times_lr),
            )
        )


def lora_ewc_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    fisher: Tensor,
    scales: Tensor,
    scale: float,
    strength: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """strength/2 * sum fisher * (scale * B @ A)^2, by blocks of rows of B so that no dense B @ A is
    stored, and with G = strength * scale * fisher * (scale B A) the gradients d_A = B^T G and d_B =
    G A^T (empty where not asked for).
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
