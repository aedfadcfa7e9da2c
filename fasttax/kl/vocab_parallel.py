"""Vocabulary-parallel logits.

Every rank of `tp_group` holds a consecutive shard of the last dimension, which may be empty.

A few floats a token cross the ranks. token_kl's shards meet by their sums (shard_merge.py); what
token_stats gives of them, by the chain rule. With P_k, Q_k the shares of the two models' mass that
lie in shard k (from the shards' lse) and p_k, q_k the distributions within it

    KL(p || q) = sum_k P_k KL(p_k || q_k) + KL(P || Q)        H(p) = sum_k P_k H(p_k) + H(P)

Every term is >= 0, so a small KL keeps its digits. The order of the sum is that of the ranks: all
of them get the same bits.

The mixture m of jsd is where beta KL(q || m) + (1 - beta) KL(p || m) is smallest, so its gradient
through m is 0: with log m known from the two global lse, jsd is two KLs against a constant, on
float32 copies of the shards.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from fasttax import reference
from fasttax._base import checks
from fasttax.kl.call import KINDS, Side, Tempering, kind_of
from fasttax.kl.shard_merge import can_merge, merged_kl
from fasttax.reference.numbers import hide, hide_rows, wide_dtype
from fasttax.reference.rows import STATS

KL_ROWS = {kind.row for kind in KINDS.values() if kind.row}


def _check_kind(op: str, t: Tempering) -> None:
    reason = kind_of(t).whole_rows
    if reason:
        raise checks.fail(op, "tp_group", "None with this kind", "a group", reason)


def _check_group(op: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise checks.fail(
            op,
            "tp_group",
            "an initialised torch.distributed",
            "none",
            "call torch.distributed.init_process_group first",
        )


def _widths(op: str, shard: Tensor, group: Any) -> Tensor:
    """How wide every rank's shard is.

    Raises:
        ValueError: on every rank, where those of CPUs hold others than the same number of tokens,
            at which the collectives to come would hang, or no vocabulary at all. (On GPUs a look
            would be a sync.)
    """
    tokens = shard.shape[:-1].numel()
    # filled on the device: a copy of the host's numbers would wait for it
    mine = torch.empty(2, dtype=torch.int64, device=shard.device)
    for at, size in enumerate((shard.shape[-1], tokens)):
        mine[at : at + 1].fill_(size)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    widths, counts = torch.stack(sizes).unbind(1)
    if shard.device.type != "cpu":
        return widths
    if not bool(widths.any()):
        raise checks.fail(op, "tp_group", "a shard with V >= 1 on some rank", "none on any")
    if bool((counts != tokens).any()):
        raise checks.fail(
            op,
            "tp_group",
            "shards of the same tokens on every rank",
            f"{', '.join(map(str, counts.tolist()))} tokens on ranks 0 to {len(sizes) - 1}",
            "give every rank the whole batch (ranks that share tokens out are no tp_group)",
        )
    return widths


def _check_tokens(op: str, shard: Tensor, group: Any) -> None:
    """What `_widths` checks of ranks of CPUs."""
    if shard.device.type == "cpu":
        _widths(op, shard, group)


class _Shard(NamedTuple):
    """A rank's shard of both models, and how its own sweep tempers it."""

    logits: Tensor
    ref_logits: Tensor | None
    t: Tempering

    @classmethod
    def of(cls, logits: Tensor, ref_logits: Tensor | None, t: Tempering) -> _Shard:
        """A rank that holds nothing of the vocabulary has one entry without mass: -inf in both.

        Without a softcap, which would make it finite. So every rank goes the same way.
        """
        if logits.shape[-1]:
            return cls(logits, ref_logits, t)
        x, y = (
            None if z is None else functional.pad(z, (0, 1), value=-torch.inf)
            for z in (logits, ref_logits)
        )
        assert x is not None
        return cls(x, y, replace(t, policy=Side(), ref=Side()))


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


def combine_shards(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    wanted: set[str],
    group: Any,
) -> dict[str, Tensor]:
    """The `wanted` rows of token_stats for every token, from this rank's shards of the logits.

    The tensors are checked, the logits of one dtype; `ids` are global.
    """
    _check_group(op)
    widths = None
    if ids is None:
        _check_tokens(op, logits, group)
    else:
        widths = _widths(op, logits, group)
    own = _Shard.of(logits, ref_logits, t)
    return _combined(op, *own, ids, mask, wanted, widths, group)


def _combined(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    t: Tempering,
    ids: Tensor | None,
    mask: Tensor | None,
    wanted: set[str],
    widths: Tensor | None,
    group: Any,
) -> dict[str, Tensor]:
    parts, local = {}, None
    if ids is not None and widths is not None:
        if ids.device.type == "cpu":
            checks.ids_in_range(op, "ids", ids, int(widths.sum()))
        rank = dist.get_rank(group)
        local = ids - widths[:rank].sum()
        mine = (local >= 0) & (local < widths[rank])
        local = torch.where(mine, local, 0)
        parts["mine"] = mine.to(reference.wide_dtype(logits))

    def sweep(x: Tensor, y: Tensor | None, sides: tuple[float, ...]) -> dict[str, Tensor]:
        rows = torch.ops.fasttax.token_stats(x, y, local, mask, *sides)[0]
        return dict(zip(STATS, rows.unbind(0), strict=True))

    if wanted & KL_ROWS:
        rows = sweep(logits, ref_logits, t.sides())
    else:
        rows = sweep(logits, None, t.alone(t.policy))
    parts.update((name, rows[name]) for name in {"lse", *(wanted - {"ref_logp"})})
    if wanted & {*KL_ROWS, "ref_logp"}:
        assert ref_logits is not None
        ref_rows = sweep(ref_logits, None, t.alone(t.ref))
        parts["ref_lse"] = ref_rows["lse"]
        if "ref_logp" in wanted:
            parts["ref_logp"] = ref_rows["logp"]
    names = sorted(parts)
    gathered = _Gather.apply(torch.stack([parts[name] for name in names]), group).unbind(1)
    return combine_parts(dict(zip(names, gathered, strict=True)), wanted, mask)


def combine_parts(
    parts: dict[str, Tensor], wanted: set[str], mask: Tensor | None
) -> dict[str, Tensor]:
    """The `wanted` rows of token_stats, from (shards, ...) of what each shard has of its own.

    Lse and the wanted ones by their names, ref_lse for what is the reference's, and for log-probs
    `mine`, 1 in the shard that owns the id.

    In float64: torch's vectors and the ends of its loops round otherwise, and a token's float32
    would depend on its neighbours.
    """
    dtype = parts["lse"].dtype
    parts = {name: value.double() for name, value in parts.items()}
    log_share = parts["lse"].log_softmax(0)
    share, out = log_share.exp(), {}
    if "lse" in wanted:
        out["lse"] = parts["lse"].logsumexp(0)
    if "logp" in wanted:
        out["logp"] = _owned(parts, "logp", log_share)
    if "entropy" in wanted:
        out["entropy"] = _over_mass(share, parts["entropy"] - log_share)
    if wanted & {*KL_ROWS, "ref_logp"}:
        ref_log_share = parts["ref_lse"].log_softmax(0)
    if "ref_logp" in wanted:
        out["ref_logp"] = _owned(parts, "ref_logp", ref_log_share)
    if wanted & KL_ROWS:
        ref_share = ref_log_share.exp()
        # elsewhere KL(P || Q) is 0 or inf already; a share that is 0 may be rounded
        both = (log_share > -torch.inf) & (ref_log_share > -torch.inf)
        lses = [parts[name].movedim(0, -1).contiguous() for name in ("lse", "ref_lse")]
        for kind, mass in ((KINDS["policy_ref"], share), (KINDS["ref_policy"], ref_share)):
            if kind.row in wanted:
                args = Tempering.none(kind.number).args()
                between = torch.ops.fasttax.token_kl(*lses, mask, *args)[0]
                within = torch.where(both, parts[kind.row], 0.0)
                out[kind.row] = _over_mass(mass, within) + between
    return {name: hide(value.to(dtype), mask) for name, value in out.items()}


def _owned(parts: dict[str, Tensor], name: str, log_share: Tensor) -> Tensor:
    """The log-prob of the id from the shard that has it.

    NaN for an id that no shard has (on a GPU, where a look would be a sync).
    """
    mine = parts["mine"] > 0
    logp = torch.where(mine, parts[name] + log_share, 0.0).sum(0)
    return logp.masked_fill(~mine.any(0), torch.nan)


def _over_mass(mass: Tensor, value: Tensor) -> Tensor:
    """sum_k mass_k value_k; a shard without mass has no distribution of its own, and counts 0."""
    return (mass * torch.where(mass > 0, value, 0.0)).sum(0)


def combine_kl(
    op: str, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering, group: Any
) -> Tensor:
    """`token_kl` of every token from this rank's shards of the logits (checked, of one dtype).

    Raises:
        ValueError: the kind can't be had from shards.
    """
    kind = kind_of(t)
    _check_kind(op, t)
    _check_group(op)
    _check_tokens(op, logits, group)
    x, y, own = _Shard.of(logits, ref_logits, t)
    assert y is not None
    if kind.mixture:
        return _jsd(op, x, y, mask, own, group)
    return _kl(op, x, y, mask, own, t, group)


def _kl(
    op: str,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    t: Tempering,
    of_all: Tempering,
    group: Any,
) -> Tensor:
    """A divergence that is a row of token_stats; `t` is this rank's, `of_all` the others'."""
    if can_merge(logits):
        return merged_kl(logits, ref_logits, mask, t, of_all, group)
    if t.inf_mask:
        logits, ref_logits = _tempered(logits, ref_logits, mask, t)
        t = Tempering.none(t.kind)
    row = kind_of(t).row
    # what float32 rounds off an lse, of large logits above all, the shares of mass would lack
    x, y = logits.double(), ref_logits.double()
    kl = _combined(op, x, y, t, None, mask, {row}, None, group)[row]
    return kl.to(wide_dtype(logits))


def _jsd(
    op: str, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering, group: Any
) -> Tensor:
    """Jensen-Shannon as two KLs to the mixture."""
    x, y = _tempered(logits, ref_logits, mask, t)
    plain = Tempering.none(KINDS["policy_ref"].number)

    def lse_of(z: Tensor) -> Tensor:
        return _combined(op, z, None, plain, None, mask, {"lse"}, None, group)["lse"]

    lse, ref_lse = lse_of(x), lse_of(y)
    if t.beta in (0.0, 1.0):  # 0; NaN for a row of NaN
        return (lse + ref_lse) * 0
    # a KL does not see the shift
    lp, lq = x - lse.detach()[..., None], y - ref_lse.detach()[..., None]
    log_m = _log_mixture(lp, lq, t.beta)
    of_policy, of_ref = (_kl(op, z, log_m, mask, plain, plain, group) for z in (lp, lq))
    return (1 - t.beta) * of_policy + t.beta * of_ref


def _tempered(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering
) -> tuple[Tensor, Tensor]:
    """Tempered copies with inf="mask" carried out, before a softcap makes its -inf finite."""
    gone = logits.new_zeros((), dtype=torch.bool)
    if t.inf_mask:
        gone = (logits == -torch.inf) | (ref_logits == -torch.inf)
    # NaN may lie under the mask, and the slope of a softcap is then NaN too
    x, y = (hide_rows(z.masked_fill(gone, 0.0), mask) for z in (logits, ref_logits))
    x, y = t.policy.temper(x), t.ref.temper(y)
    return x.masked_fill(gone, -torch.inf), y.masked_fill(gone, -torch.inf)


CHUNK_BYTES = 64 << 20  # of logits that are turned into log m at a time


def _log_mixture(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """Log m, without a graph; equal to lp where lp and lq are equal."""
    V, m = lp.shape[-1], torch.empty_like(lp)
    step = max(1, CHUNK_BYTES // (4 * V))
    chunks = [z.detach().view(-1, V).split(step) for z in (lp, lq, m)]
    for p, q, out in zip(*chunks, strict=True):
        of_p = p + reference.log_mixture(reference.gap(p, q), beta)[0]
        torch.where(p == -torch.inf, q + math.log(beta), of_p, out=out)
    return m


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


def to_group(op: str, x: Tensor, t: Tempering, group: Any) -> Tensor:
    """`x`, (tokens, features), whose gradient is summed over the group's ranks."""
    _check_kind(op, t)
    _check_group(op)
    _check_tokens(op, x, group)
    shared: Tensor = _ToGroup.apply(x, group)
    return shared
