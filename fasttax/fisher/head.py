"""The head's exact Fisher over all labels: two GEMMs a chunk of tokens, label_variance_ between.

What is registered for lm_head_fisher_ on every device; reference/fisher.py has the specification.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttax._base.gemm import gemm, mixed_gemm, narrow_gemm, project


def lm_head_fisher_(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_chunk: int
) -> None:
    """`out` += (p (1 - p))^T (hidden * hidden), p = softmax(hidden weight^T + bias).

    Logits in out's dtype, (token_chunk, V) of them at a time.
    """
    if not (hidden.shape[0] and out.numel()):
        return
    if not (narrow_gemm(weight.device) or mixed_gemm(weight.device)):
        weight = weight.to(out.dtype)
    buffer = out.new_empty(min(token_chunk, hidden.shape[0]), weight.shape[0])
    for part in hidden.split(token_chunk):
        q = project(part, weight, bias, buffer[: part.shape[0]])
        torch.ops.fasttax.label_variance_(q)
        gemm(q.T, part.to(out.dtype).square(), out, add=True)
