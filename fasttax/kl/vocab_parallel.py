"""Vocabulary-parallel logits.

Every rank of `tp_group` holds a consecutive shard of the last dimension.

A few floats a token cross the ranks. With P_k, Q_k the shares of the two models' mass that lie in
shard k (from the shards' lse) and p_k, q_k the distributions within it, the chain rule merges what
each rank has of its own:

    KL(p || q) = sum_k P_k KL(p_k || q_k) + KL(P || Q)        H(p) = sum_k P_k H(p_k) + H(P)

Every term is >= 0, so a small KL keeps its digits. The order of the sum is that of the ranks: all
of them get the same bits.

The mixture m of jsd is where beta KL(q || m) + (1 - beta) KL(p || m) is smallest, so its gradient
through m is 0: with log m known from the two global lse, jsd is two such KLs against a constant.
It, and inf="mask", work on float32 copies of the shards.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax import reference
from fasttax._base import checks

if TYPE_CHECKING:
    from fasttax.kl.token_kl import Tempering

MERGED = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy")


def _check_group(op: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise checks.fail(
            op,
            "tp_group",
            "an initialised torch.distributed",
            "none",
            "call torch.distributed.init_process_group first",
        )


def _widths(width: int, device: torch.device, group: Any) -> Tensor:
    mine = torch.tensor([width], device=device)
    widths = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, mine, group=group)
    return torch.cat(widths)


class _Gather(torch.autograd.Function):
    """(ranks, ...) from everyone's `part`.

    Every rank computes the same loss from the whole, so a rank's gradient is its own slice: summing
    over ranks would multiply it by the world size.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


def _owned(whole: dict[str, Tensor], name: str, log_share: Tensor) -> Tensor:
    """The log-prob of the id from the rank that has it.

    NaN for an id that no rank has (on a GPU, where a look would be a sync).
    """
    mine = whole["mine"] > 0
    return (
        torch.where(mine, whole[name] + log_share, 0.0).sum(0).masked_fill(~mine.any(0), torch.nan)
    )


def _share(mass: Tensor, value: Tensor) -> Tensor:
    """sum_k mass_k value_k; a shard without mass has no distribution of its own, and counts 0."""
    return (mass * torch.where(mass > 0, value, 0.0)).sum(0)


def merge_shards(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    wanted: set[str],
    group: Any,
) -> dict[str, Tensor]:
    """The `wanted` of MERGED for every token, from this rank's shards of the logits (checked, of
    one dtype); `ids` are global.
    """
    _check_group(op)
    policy, ref = (
        (t.scale, t.softcap, t.inv_temperature),
        (t.ref_scale, t.ref_softcap, t.ref_inv_temperature),
    )
    pair, of_ref = (
        wanted & {"kl_policy_ref", "kl_ref_policy"},
        wanted & {"kl_policy_ref", "kl_ref_policy", "ref_logp"},
    )
    widths = _widths(logits.shape[-1], logits.device, group)
    local, mine = None, None
    if ids is not None:
        if ids.device.type == "cpu":
            checks.ids_in_range(op, "ids", ids, int(widths.sum()))
        local = ids - widths[: dist.get_rank(group)].sum()
        mine = (local >= 0) & (local < logits.shape[-1])
        local = torch.where(mine, local, 0)

    def sweep(
        x: Tensor, y: Tensor | None, x_options: tuple[float, ...], y_options: tuple[float, ...]
    ) -> dict[str, Tensor]:
        options = [value for both in zip(x_options, y_options, strict=True) for value in both]
        return dict(
            zip(
                MERGED,
                torch.ops.fasttax.token_stats(x, y, local, mask, *options)[0].unbind(0),
                strict=True,
            )
        )

    rows = sweep(logits, ref_logits if pair else None, policy, ref if pair else policy)
    parts = {name: rows[name] for name in {"lse", *(wanted - {"ref_logp"})}}
    if of_ref:
        assert ref_logits is not None
        ref_rows = sweep(ref_logits, None, ref, ref)
        parts["ref_lse"] = ref_rows["lse"]
        if "ref_logp" in wanted:
            parts["ref_logp"] = ref_rows["logp"]
    if mine is not None:
        parts["mine"] = mine.to(rows["lse"].dtype)
    names = sorted(parts)
    whole = dict(
        zip(
            names,
            _Gather.apply(torch.stack([parts[name] for name in names]), group).unbind(1),
            strict=True,
        )
    )
    return merge_parts(whole, wanted, mask)


def merge_parts(
    whole: dict[str, Tensor], wanted: set[str], mask: Tensor | None
) -> dict[str, Tensor]:
    """The `wanted` of MERGED, from (shards, ...) of what each shard has of its own.

    Lse and the wanted ones by their names, ref_lse for what is the reference's, and for log-probs
    `mine`, 1 in the shard that owns the id.
    """
    of_ref = wanted & {"kl_policy_ref", "kl_ref_policy", "ref_logp"}
    log_share, out = whole["lse"].log_softmax(0), {"lse": whole["lse"].logsumexp(0)}
    share = log_share.exp()
    if "logp" in wanted:
        out["logp"] = _owned(whole, "logp", log_share)
    if "entropy" in wanted:
        out["entropy"] = _share(share, whole["entropy"] - log_share)
    if of_ref:
        ref_log_share = whole["ref_lse"].log_softmax(0)
        ref_share = ref_log_share.exp()
        if "ref_logp" in wanted:
            out["ref_logp"] = _owned(whole, "ref_logp", ref_log_share)
        both = (share > 0) & (ref_share > 0)  # elsewhere KL(P || Q) is 0 or inf already
        for kind, (name, mass) in enumerate(
            (("kl_policy_ref", share), ("kl_ref_policy", ref_share))
        ):
            if name in wanted:
                shares = (
                    whole["lse"].movedim(0, -1).contiguous(),
                    whole["ref_lse"].movedim(0, -1).contiguous(),
                )
                between = torch.ops.fasttax.token_kl(
                    *shares, mask, kind, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, False
                )[0]
                out[name] = _share(mass, torch.where(both, whole[name], 0.0)) + between
    return {
        name: value if mask is None else value.masked_fill(~mask, 0.0)
        for name, value in out.items()
        if name in wanted
    }


CHUNK_BYTES = 64 << 20  # of logits that are turned into log m at a time


def _log_mixture(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """Log m, without a graph; equal to lp where lp and lq are equal."""
    V, m = lp.shape[-1], torch.empty_like(lp)
    rows = zip(
        *(z.detach().view(-1, V).split(max(1, CHUNK_BYTES // (4 * V))) for z in (lp, lq, m)),
        strict=True,
    )
    for p, q, out in rows:
        torch.where(
            p == -torch.inf,
            q + math.log(beta),
            p + reference.log_mixture(reference.gap(p, q), beta),
            out=out,
        )
    return m


def _tempered(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering
) -> tuple[Tensor, Tensor, Tempering]:
    """Tempered copies, with inf="mask" carried out (before a softcap makes its -inf finite), and
    the tempering that is left: none.
    """
    gone = (
        (logits == -torch.inf) | (ref_logits == -torch.inf)
        if t.inf_mask
        else logits.new_zeros((), dtype=torch.bool)
    )
    # NaN may lie there, and the slope of a softcap is then NaN too
    hidden = gone if mask is None else gone | ~mask[..., None]
    x = reference.temper(logits.masked_fill(hidden, 0.0), t.scale, t.softcap, t.inv_temperature)
    y = reference.temper(
        ref_logits.masked_fill(hidden, 0.0), t.ref_scale, t.ref_softcap, t.ref_inv_temperature
    )
    left = replace(
        t,
        scale=1.0,
        softcap=0.0,
        inv_temperature=1.0,
        ref_scale=1.0,
        ref_softcap=0.0,
        ref_inv_temperature=1.0,
        inf_mask=False,
    )
    return x.masked_fill(gone, -torch.inf), y.masked_fill(gone, -torch.inf), left


def merge_kl(
    op: str, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering, group: Any
) -> Tensor:
    """`token_kl` of every token from this rank's shards of the logits (checked, of one dtype)."""
    _check_group(op)
    jsd = t.kind == reference.JSD
    if t.inf_mask or jsd:
        logits, ref_logits, t = _tempered(logits, ref_logits, mask, t)
    if not jsd:
        name = ("kl_policy_ref", "kl_ref_policy")[t.kind]
        return merge_shards(op, logits, ref_logits, None, mask, t, {name}, group)[name]
    lse, ref_lse = (
        merge_shards(op, z, None, None, mask, t, {"lse"}, group)["lse"]
        for z in (logits, ref_logits)
    )
    if t.beta in (0.0, 1.0):  # 0; NaN for a row of NaN
        return (lse + ref_lse) * 0
    # a KL does not see the shift
    lp, lq = (
        logits - lse.detach()[..., None],
        ref_logits - ref_lse.detach()[..., None],
    )
    m = _log_mixture(lp, lq, t.beta)
    of_policy, of_ref = (
        merge_shards(op, z, m, None, mask, t, {"kl_policy_ref"}, group)["kl_policy_ref"]
        for z in (lp, lq)
    )
    return (1 - t.beta) * of_policy + t.beta * of_ref


class _ToGroup(torch.autograd.Function):
    """Identity whose backward sums over the group.

    Every rank's head shard gives a part of the hidden states' gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def to_group(x: Tensor, group: Any) -> Tensor:
    shared: Tensor = _ToGroup.apply(x, group)
    return shared
