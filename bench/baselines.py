"""What people write today, as contenders: eager PyTorch, torch.compile of it, torch._foreach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax.cli.bench import eager_kl as eager_kl
from fasttax.cli.bench import eager_linear_kl as eager_linear_kl
from fasttax.cli.bench import foreach_ewc as foreach_ewc


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Mean log-prob of the ids by whole logits."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None]).mean()


def trl_linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """TRL's beta = 1 is KL(policy || ref)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence: Tensor = ChunkedDivergenceFunction.apply(
        hidden, weight, None, ref_hidden, ref_weight, None, 1.0
    )[0]
    return divergence.mean()


def trl_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """TRL's fused op, asked for log-probs alone, by as many columns as its divergence takes."""
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp: Tensor = ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return logp.mean()


def eager_stats(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Tensor:
    """The sum of log-probs, entropies and both KLs."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    p, q = logp.exp(), ref_logp.exp()
    sampled = logp.gather(-1, ids[:, None])[:, 0]
    return (
        sampled
        - (p * logp).sum(-1)
        + (p * (logp - ref_logp)).sum(-1)
        + (q * (ref_logp - logp)).sum(-1)
    ).sum()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape."""
    return torch.compile(function, dynamic=False)


def autograd_ewc(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor], strength: float
) -> Tensor:
    """The penalty as a loop over parameters, and its gradient by autograd."""
    total = torch.zeros(())
    for p, a, f in zip(params, anchors, fishers, strict=True):
        total = total + (f * (p - a) ** 2).sum()
    penalty = strength / 2 * total
    penalty.backward()
    return penalty


def loop_ewc(
    grad: Tensor, theta: Tensor, anchor: Tensor, fisher: Tensor, strength: float
) -> Tensor:
    """One tensor's fused penalty, for torch.compile."""
    pull = fisher * (theta - anchor)
    grad.add_(pull, alpha=strength)
    return (pull * (theta - anchor)).sum()


def materialised_sqgrad(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Per-example gradients as Opacus has them, squared and summed."""
    return torch.einsum("nto,nti->noi", grad_outputs, inputs).square_().sum(0)
