"""The gradient of the Fisher's loss at the logits, for labels of the model or of the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax.fisher import batches
from fasttax.fisher.ops import sum_dtype

_SAMPLE_BLOCK = 256  # labels whose masses are summed first


@contextlib.contextmanager
def unmoved(generator: torch.Generator | None) -> Iterator[None]:
    """The generator is at the end where it was."""
    if generator is None:
        yield
        return
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


@torch.no_grad()
def score(logits: Tensor, batch: batches.Batch, generator: torch.Generator | None) -> Tensor:
    """The gradient of -sum log p(label) at the logits, float32 (float64).

    Softmax - onehot at the predictions that count, else 0.

    Args:
        logits: (B, T, V), or a classifier's (B, V).
        batch: its labels and the predictions that count.
        generator: draws labels from the logits' own distribution; None takes the batch's.

    Raises:
        ValueError: a label is no column of the logits.
    """
    p = torch.softmax(logits.detach(), -1, dtype=sum_dtype(logits.dtype))
    if generator is not None:
        labels = sample(p, generator)
    else:
        labels = batch.targets.clamp_min(0)
        if int(labels.max()) >= p.shape[-1]:
            expected, got = f"labels in [0, {p.shape[-1]})", f"{int(labels.max())}"
            raise checks.fail("DiagonalFisher.update", "batch['labels']", expected, got)
    p.scatter_add_(-1, labels[..., None], torch.full_like(labels[..., None], -1, dtype=p.dtype))
    return p.masked_fill_(~batch.counted[..., None], 0.0)


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row of p (..., V) by inverse transform.

    The first v where the running sum of p passes u * (sum p). The block is found first, then the
    label in it: p is read once, and no running sum of the whole vocabulary is written.
    """
    V = p.shape[-1]
    whole = V - V % _SAMPLE_BLOCK
    masses = [p[..., :whole].unflatten(-1, (-1, _SAMPLE_BLOCK)).sum(-1)]
    if whole < V:
        masses.append(p[..., whole:].sum(-1, keepdim=True))
    running = torch.cat(masses, -1).cumsum(-1)
    shape, device = p.shape[:-1], generator.device
    drawn = torch.rand(shape, dtype=p.dtype, device=device, generator=generator)
    u = drawn.to(p.device)[..., None] * running[..., -1:]
    block = torch.searchsorted(running, u, right=True).clamp_max(running.shape[-1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp_min(0)), 0.0)
    index = block * _SAMPLE_BLOCK + torch.arange(min(_SAMPLE_BLOCK, V), device=p.device)
    inside = p.gather(-1, index.clamp_max(V - 1)).masked_fill(index >= V, 0.0).cumsum(-1)
    found = block * _SAMPLE_BLOCK + torch.searchsorted(inside, u - before, right=True)
    labels = found.squeeze(-1).clamp_max(V - 1)
    # u = 0 on leading zeros, or rounding at a block's end, may land on a label of probability 0:
    # take the likeliest then
    impossible = p.gather(-1, labels[..., None]).squeeze(-1) <= 0
    return torch.where(impossible, p.argmax(-1), labels) if bool(impossible.any()) else labels
