"""What fasttax adds to a training step, beside the same regulariser composed in plain PyTorch.

The two take turns; times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import fasttax
from fasttax.demo.compare import Estimate
from fasttax.demo.progress import bar as progress_bar
from fasttax.demo.training import Batch, answer_loss, forward, new_optimizer

Regulariser = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """`composed_kl`'s number by one op."""
    return fasttax.token_kl(logits, ref_logits, mask=mask, reduction="mean")


def composed_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(policy || reference) by log_softmax and kl_div, mean over the unmasked tokens."""
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return (per_token * mask).sum() / mask.sum()


def composed_ewc_(
    ewc: fasttax.EWC, fisher: dict[str, Tensor], anchors: dict[str, Tensor]
) -> Tensor:
    """The penalty as a loop over parameters, its gradient by autograd."""
    penalty = torch.zeros((), device=next(iter(anchors.values())).device)
    for name, theta in ewc.parameters().items():
        penalty = penalty + (fisher[name] * (theta - anchors[name]) ** 2).sum()
    penalty = ewc.strength / 2 * penalty
    penalty.backward()
    return penalty.detach()


def measure_step(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    ewc: fasttax.EWC,
    batches: Sequence[Batch],
    lr: float,
    rounds: int,
) -> dict[str, Any]:
    """Medians over rounds, and means with intervals of what the compositions take beyond fasttax.

    In each round, one after the other on the same batch: a plain step, the reference's forward, and
    the two regularisers by fasttax and by composition.

    KL is timed as what it adds to the loss: forward and backward of loss + KL down to the logits,
    minus those of the loss alone. EWC is timed as what brings its gradient into p.grad.
    """
    device = model.device
    times: dict[str, list[float]] = {}
    apart: dict[str, float] = {}

    def clock(name: str, work: Callable[..., Tensor], *args: Any) -> Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        result = work(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    model.train()
    ewc.strength = 1.0  # any: a step takes as long
    optimizer = new_optimizer(model, lr * 0.01)
    fisher, anchors = dict(ewc.fisher), ewc.anchor

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = forward(model, batch)
        answer_loss(logits, batch).backward()
        optimizer.step()
        return logits.detach()

    def reference_forward(batch: Batch) -> Tensor:
        with torch.no_grad():
            return forward(reference, batch)

    def loss_and(kl: Regulariser | None, batch: Batch, plain: Tensor, ref_logits: Tensor) -> Tensor:
        """The answers' loss, with a KL term or without, forward and backward to the logits."""
        logits = plain.requires_grad_(True)
        logits.grad = None
        loss = answer_loss(logits, batch)
        value = torch.zeros((), device=device)
        if kl is not None:
            value = kl(logits, ref_logits, batch["attention_mask"] != 0)
        (loss + value).backward()
        return value.detach()

    for number in progress_bar(range(rounds + 1), desc="timing a step's parts", unit="round"):
        batch = batches[number % len(batches)]
        plain = clock("plain step", step, batch)
        ref_logits = clock("reference forward", reference_forward, batch)
        clock("loss", loss_and, None, batch, plain, ref_logits)
        kls = [
            clock(f"loss + kl {kind}", loss_and, kl, batch, plain, ref_logits)
            for kind, kl in (("fasttax", fused_kl), ("composed", composed_kl))
        ]
        penalties = [
            clock("ewc fasttax", ewc.add_grad_),
            clock("ewc composed", composed_ewc_, ewc, fisher, anchors),
        ]
        for name, (ours, theirs) in (("kl", kls), ("ewc", penalties)):
            apart[name] = abs(float(ours) - float(theirs)) / max(abs(float(theirs)), 1e-12)
    model.eval()
    model.zero_grad(set_to_none=True)
    # the first round warms up
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    for kind in ("fasttax", "composed"):
        extra = [
            kl - base
            for kl, base in zip(times[f"loss + kl {kind}"][1:], times["loss"][1:], strict=True)
        ]
        seconds[f"kl {kind}"] = statistics.median(extra)
    # what the composition takes beyond fasttax, round by round
    saved = {
        name: vars(
            Estimate.of([b - a for a, b in zip(times[ours][1:], times[theirs][1:], strict=True)])
        )
        for name, ours, theirs in (
            ("kl", "loss + kl fasttax", "loss + kl composed"),
            ("ewc", "ewc fasttax", "ewc composed"),
        )
    }
    parts = ("reference forward", "kl fasttax", "kl composed", "ewc fasttax", "ewc composed")
    return {
        "rounds": rounds,
        "tokens": int(batches[0]["attention_mask"].sum()),
        "seconds": seconds,
        "percent_of_plain_step": {
            name: 100 * seconds[name] / seconds["plain step"] for name in parts
        },
        "saved_seconds": saved,
        "relative_difference": apart,
    }
