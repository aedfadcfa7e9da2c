"""The gradient of the Fisher's loss at the logits, for labels of the model or of the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, waits
from fasttax.fisher import batches
from fasttax.fisher.ops import sum_dtype

_SAMPLE_BLOCK = 256  # labels whose masses are summed first


def generator_on(op: str, generator: Any, device: torch.device) -> torch.Generator:
    """What labels are drawn from: the given one, or one of its own on `device`, seeded with 0.

    Raises:
        TypeError: it is no generator.
    """
    if generator is None:
        return torch.Generator(device).manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise checks.fail(op, "generator", "a torch.Generator", generator, error=TypeError)
    return generator


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

    At the predictions that count, else 0:

    - softmax: softmax(logits) - onehot(label);
    - bernoulli: sigmoid(logits) - label, a label of 0 or 1 for each output;
    - gaussian: logits - label, of variance 1 around each output.

    Args:
        logits: (B, T, V), or a classifier's (B, V).
        batch: its labels and the predictions that count, settled.
        generator: draws labels from the logits' own distribution; None takes the batch's.

    Raises:
        ValueError: a label is no column of the logits, or has another shape.
    """
    if batch.likelihood in ("bernoulli", "gaussian"):
        return _output_scores(logits, batch, generator)
    p = torch.softmax(logits.detach(), -1, dtype=sum_dtype(logits.dtype))
    labels = _columns(batch, p.shape[-1]) if generator is None else sample(p, generator)
    p.scatter_add_(-1, labels[..., None], torch.full_like(labels[..., None], -1, dtype=p.dtype))
    return p.masked_fill_(~batch.counted[..., None], 0.0)


def _columns(batch: batches.Batch, count: int) -> Tensor:
    """The batch's labels as columns of the logits, 0 for none."""
    labels = batch.targets.masked_fill(~batch.counted, 0)

    def error(got: str) -> Exception:
        expected = f"labels in [0, {count}) or {batches.IGNORED}"
        return checks.fail("DiagonalFisher.update", "batch['labels']", expected, got)

    if waits.waits(labels):
        batch.ranges.add(f"labels of {count}", labels, 0, count - 1, error)
        return labels.clamp(0, count - 1)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise error(f"{int(labels.min())} to {int(labels.max())}")
    return labels


def _output_scores(
    logits: Tensor, batch: batches.Batch, generator: torch.Generator | None
) -> Tensor:
    """Of the likelihoods with a label for each output."""
    op, dtype = "DiagonalFisher.update", sum_dtype(logits.dtype)
    means = logits.detach().to(dtype)
    if batch.likelihood == "bernoulli":
        means = means.sigmoid()
    if generator is None:
        labels = batch.targets.to(dtype)
        if labels.shape != logits.shape:
            expected = f"shape {tuple(logits.shape)} as the outputs"
            raise checks.fail(op, "batch['labels']", expected, batch.targets)
        if batch.likelihood == "bernoulli":
            _probabilities(op, batch, labels)
        return means - labels
    device = generator.device
    if batch.likelihood == "gaussian":
        noise = torch.randn(means.shape, dtype=dtype, device=device, generator=generator)
        return waits.over(noise, means.device)
    drawn = torch.rand(means.shape, dtype=dtype, device=device, generator=generator)
    return means - (waits.over(drawn, means.device) < means).to(dtype)


def _probabilities(op: str, batch: batches.Batch, labels: Tensor) -> None:
    """Labels of a sigmoid's outputs must be in [0, 1]."""

    def error(got: str) -> Exception:
        return checks.fail(op, "batch['labels']", "labels in [0, 1]", got)

    if waits.waits(labels):
        batch.ranges.add("probabilities", labels, 0, 1, error)
    elif bool(((labels < 0) | (labels > 1)).any()):
        raise error("others")


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
    u = waits.over(drawn, p.device)[..., None] * running[..., -1:]
    block = torch.searchsorted(running, u, right=True).clamp_max(running.shape[-1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp_min(0)), 0.0)
    index = block * _SAMPLE_BLOCK + torch.arange(min(_SAMPLE_BLOCK, V), device=p.device)
    inside = p.gather(-1, index.clamp_max(V - 1)).masked_fill(index >= V, 0.0).cumsum(-1)
    found = block * _SAMPLE_BLOCK + torch.searchsorted(inside, u - before, right=True)
    labels = found.squeeze(-1).clamp_max(V - 1)
    # u = 0 on leading zeros, or rounding at a block's end, may land on a label of probability 0:
    # take the likeliest of the heaviest block then
    impossible = p.gather(-1, labels[..., None]).squeeze(-1) <= 0
    heaviest = torch.cat(masses, -1).argmax(-1, keepdim=True) * _SAMPLE_BLOCK
    index = heaviest + torch.arange(min(_SAMPLE_BLOCK, V), device=p.device)
    there = p.gather(-1, index.clamp_max(V - 1)).masked_fill(index >= V, 0.0).argmax(-1)
    return torch.where(impossible, heaviest.squeeze(-1) + there, labels)
