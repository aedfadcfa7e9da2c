"""The sums of squared per-example gradients in plain PyTorch: specification, test oracle, fallback."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def example_sums(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N, O): the sum of each example's rows."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    example = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=rows.device), lengths.to(rows.device)
    )
    return torch.zeros(
        lengths.numel(), rows.shape[1], dtype=rows.dtype, device=rows.device
    ).index_add_(0, example, rows)


def bias_sqgrad_(
    out: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None
) -> None:
    """out[o] += sum_n w_n (sum_{t in n} grad_outputs[t, o])^2."""
    square = example_sums(grad_outputs.to(out.dtype), cu_seqlens).square()
    out += (square if example_weight is None else square * example_weight[:, None]).sum(0)


def norm_sqgrad_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
) -> None:
    """out[i] += sum_n w_n (sum_{t in n} grad_outputs[t, i] inputs[t, i])^2."""
    bias_sqgrad_(out, inputs.to(out.dtype) * grad_outputs.to(out.dtype), cu_seqlens, example_weight)


def embedding_rows(
    ids: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, num_embeddings: int, skip: int
) -> tuple[Tensor, Tensor]:
    """The rows of every example's embedding gradient that its tokens touch.

    Keys (2, U) of (example, id), rows (U, H); 0 for `skip`.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    example = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=ids.device), lengths.to(ids.device)
    )
    key, inverse = torch.unique(example * num_embeddings + ids, return_inverse=True)
    rows = torch.zeros(
        key.numel(), grad_outputs.shape[1], dtype=grad_outputs.dtype, device=ids.device
    ).index_add_(0, inverse, grad_outputs)
    keys = torch.stack((key // num_embeddings, key % num_embeddings))
    return keys, rows if skip < 0 else rows.masked_fill((keys[1] == skip)[:, None], 0.0)


def embedding_sqgrad_(
    out: Tensor,
    ids: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
    skip: int,
) -> None:
    """out[v, h] += sum_n w_n (sum_{t in n: ids[t] = v} grad_outputs[t, h])^2.

    The row `skip` takes none.
    """
    keys, rows = embedding_rows(ids, grad_outputs.to(out.dtype), cu_seqlens, out.shape[0], skip)
    square = (
        rows.square()
        if example_weight is None
        else rows.square() * example_weight[keys[0]][:, None]
    )
    out.index_add_(0, keys[1], square)


def label_variance_(logits: Tensor) -> None:
    """P (1 - p), p = softmax(logits), a row at a time in place.

    As e (Z - e) / Z^2 of e = exp(x - max), Z - 1 being summed without the maximum: where the row
    has collapsed onto one label 1 - p would cancel.
    """
    top = logits.amax(-1, keepdim=True)
    is_top = logits == top
    e = (logits - top).exp()
    others = e.masked_fill(is_top, 0.0).sum(-1, keepdim=True) + (is_top.sum(-1, keepdim=True) - 1)
    logits.copy_(e * ((1 - e) + others) / (others + 1).square())


def accumulate_sqgrad_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """Sums += weight * grads^2, tensor by tensor."""
    for total, grad in zip(sums, grads, strict=True):
        g = grad.to(total.dtype)
        total.addcmul_(g, g, value=weight)


def linear_sqgrad_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
) -> None:
    """out[o, i] += sum_n w_n (sum_{t in n} grad_outputs[t, o] inputs[t, i])^2, example n being rows
    cu[n] to cu[n+1].
    """
    starts = cu_seqlens.tolist()
    a, d = inputs.to(out.dtype), grad_outputs.to(out.dtype)
    for n, (begin, end) in enumerate(pairwise(starts)):
        g = d[begin:end].T @ a[begin:end]
        out += g * g if example_weight is None else example_weight[n] * g * g
