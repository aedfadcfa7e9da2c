"""The gradient of the Fisher's loss at the logits, for labels drawn from the model or taken from
the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax.fisher import batches


@torch.no_grad()
def score(logits: Tensor, batch: batches.Batch, generator: torch.Generator | None) -> Tensor:
    """The gradient of -sum log p(label) at the logits, float32 (float64).

    Softmax - onehot at the predictions that count, else 0.

    Labels are drawn from the logits' own distribution by `generator`; without one they are the
    batch's own.
    """
    p = torch.softmax(
        logits.detach(), -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32
    )
    if generator is not None:
        labels = sample(p, generator)
    else:
        labels = batch.targets.clamp_min(0)
        if int(labels.max()) >= p.shape[-1]:
            raise checks.fail(
                "DiagonalFisher.update",
                "batch['labels']",
                f"labels in [0, {p.shape[-1]})",
                f"{int(labels.max())}",
            )
    p.scatter_add_(-1, labels[..., None], torch.full_like(labels[..., None], -1, dtype=p.dtype))
    return p.masked_fill_(~batch.counted[..., None], 0.0)


_SAMPLE_BLOCK = 256


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row by inverse transform.

    The first v where the running sum of p passes u * (sum p).

    The block is found first, then the label in it: p is read once, and no running sum of the whole
    vocabulary is written.
    """
    V = p.shape[-1]
    whole = V - V % _SAMPLE_BLOCK
    masses = [p[..., :whole].unflatten(-1, (-1, _SAMPLE_BLOCK)).sum(-1)] + (
        [p[..., whole:].sum(-1, keepdim=True)] if whole < V else []
    )
    running = torch.cat(masses, -1).cumsum(-1)
    drawn = torch.rand(
        p.shape[:-1], dtype=p.dtype, device=generator.device, generator=generator
    ).to(p.device)
    u = drawn[..., None] * running[..., -1:]
    block = torch.searchsorted(running, u, right=True).clamp_max(running.shape[-1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp_min(0)), 0.0)
    index = block * _SAMPLE_BLOCK + torch.arange(min(_SAMPLE_BLOCK, V), device=p.device)
    inside = p.gather(-1, index.clamp_max(V - 1)).masked_fill(index >= V, 0.0).cumsum(-1)
    labels = (
        (block * _SAMPLE_BLOCK + torch.searchsorted(inside, u - before, right=True))
        .squeeze(-1)
        .clamp_max(V - 1)
    )
    # u = 0 on leading zeros, or rounding at a block's end, may land on a label of probability 0:
    # take the likeliest then
    impossible = p.gather(-1, labels[..., None]).squeeze(-1) <= 0
    return torch.where(impossible, p.argmax(-1), labels) if bool(impossible.any()) else labels
