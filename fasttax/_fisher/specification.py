"""The specification of the Fisher's row ops and of its head in plain PyTorch, as reference.py is of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttax.reference import wide


def example_sums(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N, O): the sum of each example's rows."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    example = torch.repeat_interleave(torch.arange(lengths.numel(), device=rows.device), lengths.to(rows.device))
    return torch.zeros(lengths.numel(), rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, example, rows)


def bias_sqgrad_(out: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None) -> None:
    """out[o] += sum_n w_n (sum_{t in n} grad_outputs[t, o])^2."""
    square = example_sums(grad_outputs.to(out.dtype), cu_seqlens).square()
    out += (square if example_weight is None else square * example_weight[:, None]).sum(0)


def norm_sqgrad_(out: Tensor, inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None) -> None:
    """out[i] += sum_n w_n (sum_{t in n} grad_outputs[t, i] inputs[t, i])^2."""
    bias_sqgrad_(out, inputs.to(out.dtype) * grad_outputs.to(out.dtype), cu_seqlens, example_weight)


def embedding_rows(ids: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, num_embeddings: int, skip: int) -> tuple[Tensor, Tensor]:
    """The rows of every example's embedding gradient that its tokens touch: keys (2, U) of (example, id), rows (U, H); 0 for `skip`."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    example = torch.repeat_interleave(torch.arange(lengths.numel(), device=ids.device), lengths.to(ids.device))
    key, inverse = torch.unique(example * num_embeddings + ids, return_inverse=True)
    rows = torch.zeros(key.numel(), grad_outputs.shape[1], dtype=grad_outputs.dtype, device=ids.device).index_add_(0, inverse, grad_outputs)
    keys = torch.stack((key // num_embeddings, key % num_embeddings))
    return keys, rows if skip < 0 else rows.masked_fill((keys[1] == skip)[:, None], 0.0)


def embedding_sqgrad_(out: Tensor, ids: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, example_weight: Tensor | None, skip: int) -> None:
    """out[v, h] += sum_n w_n (sum_{t in n: ids[t] = v} grad_outputs[t, h])^2; the row `skip` takes none."""
    keys, rows = embedding_rows(ids, grad_outputs.to(out.dtype), cu_seqlens, out.shape[0], skip)
    square = rows.square() if example_weight is None else rows.square() * example_weight[keys[0]][:, None]
    out.index_add_(0, keys[1], square)


def lm_head_fisher_(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_chunk: int) -> None:
    """out += (p (1 - p))^T (hidden * hidden), p = softmax(hidden weight^T + bias), `token_chunk` tokens' logits at a time."""
    for part in hidden.split(token_chunk):
        p = wide(torch.nn.functional.linear(part, weight, bias)).softmax(-1)
        out.addmm_((p * (1 - p)).T, wide(part).square())
