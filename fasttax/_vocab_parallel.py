"""Vocabulary-parallel logits: every rank of `tp_group` holds a consecutive shard of the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax import _checks


class _GatherVocab(torch.autograd.Function):
    """Concatenates the shards in rank order. Every rank computes the same loss from the whole, so a rank's gradient is its
    own slice: summing over ranks would multiply it by the world size."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Any) -> Tensor:
        size = torch.tensor([shard.shape[-1]], device=shard.device)
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, size, group=group)
        widths = [int(s) for s in sizes]
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
    """The whole (..., V) from this rank's shard; V need not divide by the number of ranks."""
    _checks.tensor(op, "logits", shard)
    if not dist.is_available() or not dist.is_initialized():
        raise _checks.fail(op, "tp_group", "an initialised torch.distributed", "none", "call torch.distributed.init_process_group first")
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
