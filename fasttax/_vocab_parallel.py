"""Vocabulary-parallel logits: every rank of `tp_group` holds a consecutive shard of the last dimension.

A few floats a token cross the ranks. With P_k, Q_k the shares of the two models' mass that lie in shard k (from the shards' lse)
and p_k, q_k the distributions within it, the chain rule merges what each rank has of its own:

    KL(p || q) = sum_k P_k KL(p_k || q_k) + KL(P || Q)        H(p) = sum_k P_k H(p_k) + H(P)

Every term is >= 0, so a small KL keeps its digits. The order of the sum is that of the ranks: all of them get the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax import _checks

if TYPE_CHECKING:
    from fasttax.kl import Tempering

MERGED = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy")


def _check_group(op: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise _checks.fail(op, "tp_group", "an initialised torch.distributed", "none", "call torch.distributed.init_process_group first")


def _widths(width: int, device: torch.device, group: Any) -> Tensor:
    mine = torch.tensor([width], device=device)
    widths = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(widths, mine, group=group)
    return torch.cat(widths)


class _Gather(torch.autograd.Function):
    """(ranks, ...) from everyone's `part`. Every rank computes the same loss from the whole, so a rank's gradient is its own
    slice: summing over ranks would multiply it by the world size."""

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
    """The log-prob of the id from the rank that has it; NaN for an id that no rank has (on a GPU, where a look would be a sync)."""
    mine = whole["mine"] > 0
    return torch.where(mine, whole[name] + log_share, 0.0).sum(0).masked_fill(~mine.any(0), torch.nan)


def _share(mass: Tensor, value: Tensor) -> Tensor:
    """sum_k mass_k value_k; a shard without mass has no distribution of its own, and counts 0."""
    return (mass * torch.where(mass > 0, value, 0.0)).sum(0)


def merge_shards(op: str, logits: Tensor, ref_logits: Tensor | None, ids: Tensor | None, mask: Tensor | None, t: Tempering, wanted: set[str],
                 group: Any) -> dict[str, Tensor]:  # fmt: skip
    """The `wanted` of MERGED for every token, from this rank's shards of the logits (checked, of one dtype); `ids` are global."""
    _check_group(op)
    policy, ref = (t.scale, t.softcap, t.inv_temperature), (t.ref_scale, t.ref_softcap, t.ref_inv_temperature)
    pair, of_ref = wanted & {"kl_policy_ref", "kl_ref_policy"}, wanted & {"kl_policy_ref", "kl_ref_policy", "ref_logp"}
    widths = _widths(logits.shape[-1], logits.device, group)
    local, mine = None, None
    if ids is not None:
        if ids.device.type == "cpu":
            _checks.ids_in_range(op, "ids", ids, int(widths.sum()))
        local = ids - widths[: dist.get_rank(group)].sum()
        mine = (local >= 0) & (local < logits.shape[-1])
        local = torch.where(mine, local, 0)

    def sweep(x: Tensor, y: Tensor | None, x_options: tuple[float, ...], y_options: tuple[float, ...]) -> dict[str, Tensor]:
        options = [value for both in zip(x_options, y_options, strict=True) for value in both]
        return dict(zip(MERGED, torch.ops.fasttax.token_stats(x, y, local, mask, *options)[0].unbind(0), strict=True))

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
    whole = dict(zip(names, _Gather.apply(torch.stack([parts[name] for name in names]), group).unbind(1), strict=True))
    return merge_parts(whole, wanted, mask)


def merge_parts(whole: dict[str, Tensor], wanted: set[str], mask: Tensor | None) -> dict[str, Tensor]:
    """The `wanted` of MERGED, from (shards, ...) of what each shard has of its own: lse and the wanted ones by their names, ref_lse for
    what is the reference's, and for log-probs `mine`, 1 in the shard that owns the id."""
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
        for kind, (name, mass) in enumerate((("kl_policy_ref", share), ("kl_ref_policy", ref_share))):
            if name in wanted:
                shares = (whole["lse"].movedim(0, -1).contiguous(), whole["ref_lse"].movedim(0, -1).contiguous())
                between = torch.ops.fasttax.token_kl(*shares, mask, kind, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, False)[0]
                out[name] = _share(mass, torch.where(both, whole[name], 0.0)) + between
    return {name: value if mask is None else value.masked_fill(~mask, 0.0) for name, value in out.items() if name in wanted}


class _GatherVocab(torch.autograd.Function):
    """Concatenates the shards in rank order; a rank's gradient is its slice, as in _Gather."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Any) -> Tensor:
        widths = _widths(shard.shape[-1], shard.device, group).tolist()
        padded = torch.nn.functional.pad(shard, (0, max(widths) - shard.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=group)
        rank = dist.get_rank(group)
        ctx.start, ctx.width = sum(widths[:rank]), widths[rank]
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.start, ctx.width), None


def gather_vocab(op: str, shard: Any, group: Any) -> Tensor:
    """The whole (..., V) from this rank's shard, for what does not merge: the mixture of jsd, and inf="mask"."""
    _checks.tensor(op, "logits", shard)
    _check_group(op)
    whole: Tensor = _GatherVocab.apply(shard, group)
    return whole


class _ToGroup(torch.autograd.Function):
    """Identity whose backward sums over the group: every rank's head shard gives a part of the hidden states' gradient."""

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
