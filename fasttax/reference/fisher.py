"""The Fisher's ops in plain PyTorch: specification, test oracle, fallback.

Sums of squared per-example gradients. Example n of N is the rows cu_seqlens[n] to cu_seqlens[n + 1]
of flat inputs, w_n = example_weight[n] (1 without), and out is what sums are taken in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def example_of(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """(R,) int64: the example of each row."""
    lengths = cu_seqlens.diff().to(device)
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)


def example_sums(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N, O): the sum of each example's rows."""
    sums = rows.new_zeros(cu_seqlens.numel() - 1, rows.shape[1])
    return sums.index_add_(0, example_of(cu_seqlens, rows.device), rows)


def weighted(squares: Tensor, example_weight: Tensor | None, example: Tensor | None) -> Tensor:
    """(N, ...) or, with the `example` of each, (U, ...) squares times their examples' weights."""
    if example_weight is None:
        return squares
    if example is not None:
        example_weight = example_weight[example]
    return squares * example_weight[:, None]


def linear_sqgrad_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    example_weight: Tensor | None,
) -> None:
    """out[o, i] += sum_n w_n (sum_{t in n} grad_outputs[t, o] inputs[t, i])^2."""
    a, d = inputs.to(out.dtype), grad_outputs.to(out.dtype)
    # one by one in float32, 1e6 examples would be 1e-2 off
    total = torch.zeros_like(out, dtype=torch.float64)
    for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        g = d[begin:end].T @ a[begin:end]
        square = g * g
        if example_weight is not None:
            square = example_weight[n] * g * g
        total += square
    out += total


def bias_sqgrad_(
    out: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None
) -> None:
    """out[o] += sum_n w_n (sum_{t in n} grad_outputs[t, o])^2."""
    square = example_sums(grad_outputs.to(out.dtype), cu_seqlens).square()
    out += weighted(square, example_weight, None).sum(0)


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
    example = example_of(cu_seqlens, ids.device)
    key, inverse = torch.unique(example * num_embeddings + ids, return_inverse=True)
    rows = grad_outputs.new_zeros(key.numel(), grad_outputs.shape[1])
    rows.index_add_(0, inverse, grad_outputs)
    keys = torch.stack((key // num_embeddings, key % num_embeddings))
    if skip >= 0:
        rows = rows.masked_fill((keys[1] == skip)[:, None], 0.0)
    return keys, rows


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
    squares = weighted(rows.square(), example_weight, keys[0])
    words, at = torch.unique(keys[1], return_inverse=True)
    # one by one in float32, 1e6 examples would be 1e-2 off
    total = squares.new_zeros((words.numel(), out.shape[1]), dtype=torch.float64)
    total.index_add_(0, at, squares.double())
    out.index_add_(0, words, total.to(out.dtype))


def label_variance_(logits: Tensor) -> None:
    """`p (1 - p)`, p = softmax(logits), a row at a time in place.

    As e (Z - e) / Z^2 of e = exp(x - max), Z - 1 being summed without the maximum: where the row
    has collapsed onto one label 1 - p would cancel.
    """
    top = logits.amax(-1, keepdim=True)
    is_top = logits == top
    e = (logits - top).exp()
    others = e.masked_fill(is_top, 0.0).sum(-1, keepdim=True) + (is_top.sum(-1, keepdim=True) - 1)
    logits.copy_(e * ((1 - e) + others) / (others + 1).square())


def lm_head_fisher_(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_chunk: int
) -> None:
    """`out` += (p (1 - p))^T (hidden * hidden), p = softmax(hidden weight^T + bias).

    The mean over all labels of the head's squared gradient, tokens summed. `token_chunk` bounds the
    logits that kernels hold, and has no say in the sum.
    """
    if not hidden.shape[0] or not out.numel():
        return
    hidden = hidden.to(out.dtype)
    logits = hidden @ weight.to(out.dtype).T
    if bias is not None:
        logits += bias
    label_variance_(logits)
    out += logits.T @ hidden.square()


def accumulate_sqgrad_(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """`sums` += weight * grads^2, tensor by tensor."""
    for total, grad in zip(sums, grads, strict=True):
        g = grad.to(total.dtype)
        total.addcmul_(g, g, value=weight)
