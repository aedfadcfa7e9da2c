"""TRL's fused log-probs and entropy on fasttax's row kernels: same arguments, results, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base.gemm import pieces
from fasttax._base.interrupts import surfaced
from fasttax.integrations._trl_chunks import (
    Gradients,
    Logits,
    Tokens,
    compute_dtype,
    gathered,
    rows_at_a_time,
)
from fasttax.kl.call import KINDS, Side, Tempering
from fasttax.kl.token_stats import token_stats
from fasttax.reference.rows import ENTROPY, LOGP, STATS

EXTRA = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # results beside the log-prob


class LogProb(torch.autograd.Function):
    """(logp, entropy, log sum p^2, mean logit, target is the argmax) of hidden @ weight^T.

    Those not in `outputs` are None, and the last three have no gradient. hidden (N, H), weight (V,
    H), bias (V,) or None, targets (N,).
    """

    @staticmethod
    @surfaced
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """One sweep over each chunk's logits, and one for each output that needs its own."""
        ctx.set_materialize_grads(False)
        N = hidden.shape[0]
        side = Side(logit_scale, softcap or 0.0, 1 / temperature)
        ctx.options = Tempering.none(KINDS["policy_ref"].number).alone(side)
        ctx.dtype, ctx.step = compute_dtype(hidden), rows_at_a_time(hidden, weight.shape[0])
        head = Logits(
            hidden, weight, bias, dtype=ctx.dtype, out_dtype=ctx.dtype, rows=min(N, ctx.step)
        )
        logp, entropy, log_squares, mean = hidden.new_empty((4, N), dtype=torch.float32).unbind()
        top1 = hidden.new_empty((N,), dtype=torch.bool)
        saved = []
        for at in pieces(0, N, ctx.step):
            logits = head.of(at)[0]
            rows, stats = torch.ops.fasttax.token_stats(
                logits, None, targets[at], None, *ctx.options
            )
            saved.append(stats)
            logp[at], entropy[at] = rows[LOGP], rows[ENTROPY]
            if "log_sum_sq_probs" in outputs:
                log_squares[at] = _log_sum_squares(side.temper(logits.float()))
            if "mean_logits" in outputs:
                mean[at] = _mean(logits, side)
            if "is_top1" in outputs:
                top1[at] = logits.argmax(-1) == targets[at]
        of_rows = torch.cat(saved) if saved else logp.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, targets, of_rows)
        values = zip(EXTRA, (entropy, log_squares, mean, top1), strict=True)
        extra = [value if name in outputs else None for name, value in values]
        ctx.mark_non_differentiable(*(value for value in extra[1:] if value is not None))
        return (logp, *extra)

    @staticmethod
    @surfaced
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *others: Any) -> Any:
        """The chunks' logits again, for the tokens that have a gradient."""
        if d_logp is None and d_entropy is None:
            return (None,) * 8
        hidden, weight, bias, targets, saved = ctx.saved_tensors
        tokens = Tokens(d_logp, d_entropy)
        with gathered(weight, bias):
            gradients = Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
            head = Logits(
                hidden,
                weight,
                bias,
                dtype=ctx.dtype,
                out_dtype=ctx.dtype,
                rows=min(tokens.count, ctx.step),
            )
            for at in tokens.chunks(ctx.step):
                logits, h = head.of(at)
                upstream = hidden.new_zeros((len(STATS), h.shape[0]), dtype=torch.float32)
                for row, d in ((LOGP, d_logp), (ENTROPY, d_entropy)):
                    if d is not None:
                        upstream[row] = d[at]
                d_logits = torch.ops.fasttax.token_stats_backward(
                    upstream,
                    logits,
                    None,
                    targets[at],
                    None,
                    saved[at],
                    *ctx.options,
                    True,
                    False,
                )[0]
                gradients.add(at, d_logits, d_logits, h, head.weight)
        return *gradients.results(), None, None, None, None, None


def _log_sum_squares(x: Tensor) -> Tensor:
    """Log sum p^2 of logits, relative to their maximum.

    A difference of two large lse would lose its digits.
    """
    x = x - x.amax(-1, keepdim=True)
    return (2 * x).logsumexp(-1) - 2 * x.logsumexp(-1)


def _mean(logits: Tensor, side: Side) -> Tensor:
    """The mean tempered logit; without a softcap no tempered copy is made."""
    if side.softcap:
        return side.temper(logits.float()).mean(-1)
    return logits.mean(-1, dtype=torch.float32) * (side.scale * side.inv_temperature)


def selected_logp(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None
) -> Tensor:
    """TRL's selective_log_softmax for one index a token, in the logits' dtype as TRL's."""
    logp = token_stats(
        logits, None, index, outputs=("logp",), temperature=temperature, mask=row_mask
    ).logp
    assert logp is not None
    return logp.to(logits.dtype)
