"""A KL over ranks' shards of the vocabulary, from what each rank's own sweep has summed.

The native kernels sum a shard in frames of its own, (mx, my), and leave 8 numbers of it (KlRow in
csrc/math/kl_frame.h). Shards meet as a row's chunks do: with S_k, Y_k the two models' masses in
shard k, P_k and Q_k their shares of the whole, r_k = log(S_k / Y_k) and R = log(S / Y),

    KL(p || q) = sum_k P_k (KL_k + r_k - R)        R - R' = -log(1 + sum_k P_k (e^(R' - r_k) - 1))

and KL(q || p) with the rows changed over. R' is R from the two masses, whose rounding this undoes.
The numbers r_k come from the frames and the sums' own log-ratios: no rounding of an lse is in them,
however large the logits are. In float64, of a few numbers a token; equal rows give exactly 0.

The backward is that of a whole row: each rank gives its shard's sweep the whole row's numbers, in
the frame of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax import reference
from fasttax._base import checks, library
from fasttax._base.interrupts import surfaced
from fasttax._base.library import no_second_derivative
from fasttax.kl.call import Tempering
from fasttax.kl.gradients import only_needed
from fasttax.reference.numbers import hide

# A shard's numbers, as token_kl saves them: KlRow, whose sixth is another kind's.
MX, MY, SHIFT, INV_S, LOG_RATIO, GAP, VALUE, INV_S_REF = range(8)


def can_merge(logits: Tensor) -> bool:
    """Whether token_kl leaves its sums on this device and in this dtype.

    The reference does not, nor does float64, which has digits enough for shares of mass from lse.
    """
    native = library.active("token_kl", logits.device.type)[0] != "reference"
    return native and logits.dtype != torch.float64


def merge(shards: Tensor, rank: int, t: Tempering) -> tuple[Tensor, Tensor]:
    """A divergence of two whole rows, and the numbers of `rank`'s shard for its backward.

    Args:
        shards: (ranks, ..., 8), what each shard's sweep left.
        rank: whose numbers to give.
        t: a KL's, either way round.

    Returns:
        (value (...), numbers (..., 8)), in float64.
    """
    of = shards.double().unbind(-1)
    frame_x = of[MX] * t.policy.frame_scale
    frame_y = of[MY] * t.ref.frame_scale - of[SHIFT]
    log_s, log_y = frame_x - of[INV_S].log(), frame_y - of[INV_S_REF].log()
    all_s, all_y = log_s.logsumexp(0), log_y.logsumexp(0)
    p, q = (log_s - all_s).exp(), (log_y - all_y).exp()
    offset = frame_x - frame_y
    rough = all_s - all_y
    ratio = offset + of[LOG_RATIO] - rough
    lead, other, sign = (p, q, 1.0) if t.kind == reference.POLICY_REF else (q, p, -1.0)
    # a shard in which the leading row has no mass has no divergence of its own
    within = torch.where(lead > 0, of[VALUE] + sign * ratio, 0.0)
    nothing = (log_y if t.kind == reference.POLICY_REF else log_s) == -torch.inf
    within = torch.where((lead > 0) & nothing, torch.inf, within)
    near = (ratio.abs() <= 1) & (lead > 0)
    change = torch.where(near, lead * torch.expm1(-sign * ratio), other - lead)
    rest = torch.log1p(change.sum(0))
    value = ((lead * within).sum(0) + rest).clamp_min(0)
    gap = torch.where(lead > 0, of[GAP] + offset - offset[rank], 0.0)
    numbers = shards[rank].double().unbind(-1)
    merged = [
        *numbers[:INV_S],
        torch.where(p[rank] == 0, 0.0, (frame_x[rank] - all_s).exp()),
        rough - sign * rest - offset[rank],
        (lead * gap).sum(0),
        torch.zeros_like(value),
        torch.where(q[rank] == 0, 0.0, (frame_y[rank] - all_y).exp()),
    ]
    return value, torch.stack(merged, -1)


class _MergedKL(torch.autograd.Function):
    """One sweep over the shards and one gather of 8 numbers a token; a backward of one sweep."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        t: Tempering,
        of_all: Tempering,
        group: Any,
    ) -> Tensor:
        kl, saved = torch.ops.fasttax.token_kl(
            logits.detach(), ref_logits.detach(), mask, *t.args()
        )
        saved[..., VALUE] = kl
        shards = saved.new_empty((dist.get_world_size(group), *saved.shape))
        dist.all_gather(list(shards.unbind(0)), saved, group=group)
        value, numbers = merge(shards, dist.get_rank(group), of_all)
        ctx.options = t.args()
        ctx.save_for_backward(logits, ref_logits, mask, numbers.to(saved.dtype))
        return hide(value.to(kl.dtype), mask)

    @staticmethod
    @surfaced
    def backward(ctx: Any, d_kl: Tensor) -> Any:
        checks.no_tangent("token_kl", "the gradient of its result", d_kl)
        logits, ref_logits, mask, numbers = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        gradients = torch.ops.fasttax.token_kl_backward(
            d_kl.detach().contiguous(),
            logits.detach(),
            ref_logits.detach(),
            mask,
            numbers,
            *ctx.options,
            *needs,
        )
        return *no_second_derivative(only_needed(gradients, needs), "token_kl"), *[None] * 4


def merged_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    t: Tempering,
    of_all: Tempering,
    group: Any,
) -> Tensor:
    """The KL of every token, either way round, from this rank's shards of the logits.

    Args:
        logits: of the policy, on this rank.
        ref_logits: of the reference.
        mask: of the tokens.
        t: what this rank's sweep does with its own shard.
        of_all: the call's, by which the shards' frames are read.
        group: the ranks.
    """
    kl: Tensor = _MergedKL.apply(logits, ref_logits, mask, t, of_all, group)
    return kl
