"""DTensors: what of a tensor lies on this rank, and sums over the ranks that share it.

Plain tensors pass through every function. torch.distributed.tensor is imported on use: it costs an
import a second, and most users hold no DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Key = Any  # None for a plain tensor, (mesh, mesh dimensions it is sharded over) for a DTensor


def is_sharded(t: Any) -> bool:
    """Whether `t` is a DTensor, replicated ones included."""
    return hasattr(t, "device_mesh") and hasattr(t, "placements")


def placements_of(t: Any) -> Any:
    """How a DTensor is laid over its mesh, one placement a dimension; None for a plain tensor."""
    return getattr(t, "placements", None)


def local(t: Any) -> Tensor:
    """This rank's part, differentiable."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Any) -> Tensor:
    """All of it; a collective on the ranks that share it."""
    return t.full_tensor() if is_sharded(t) else t


def part_size(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of the indices that `rank` holds of `size`, cut as torch.chunk cuts."""
    most = (size + ranks - 1) // ranks
    first = min(size, rank * most)
    return first, min(most, size - first)


def part_of(full: Tensor, theta: Any) -> Tensor:
    """The part of `full`, a tensor of theta's global shape, that this rank holds of theta.

    No communication for a plain `full`.
    """
    if not is_sharded(theta):
        return whole(full)
    if is_sharded(full):
        return local(full.redistribute(theta.device_mesh, theta.placements))  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(
        full.to(theta.device),
        theta.device_mesh,
        [Replicate()] * theta.device_mesh.ndim,
        run_check=False,
    )
    return local(same.redistribute(theta.device_mesh, theta.placements)).clone()


def as_theta(part: Tensor, theta: Any) -> Tensor:
    """This rank's `part` of a tensor that is sharded as theta is, as a DTensor."""
    if not is_sharded(theta):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        theta.device_mesh,
        theta.placements,
        run_check=False,
        shape=theta.shape,
        stride=theta.stride(),
    )


def scatter_sum(part: Tensor, mesh: Any, dims: Iterable[int], placements: Sequence[Any]) -> Tensor:
    """This rank's share of the sum of every rank's `part` along `dims` of the mesh.

    A reduce-scatter a dimension (an all-reduce where it is replicated), which all of those ranks
    must call in one order. FSDP2 cuts what tensor parallelism has left to a rank, so that each
    dimension is taken as a mesh of its own.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for d in dims:
        line = DeviceMesh.from_group(mesh.get_group(d), mesh.device_type)
        target: Any = Replicate()
        if not placements[d].is_replicate():
            target = Shard(placements[d].dim)
        summed = DTensor.from_local(part, line, [Partial()], run_check=False)
        part = summed.redistribute(placements=[target]).to_local()
    return part


def key_of(theta: Any) -> Key:
    """Which ranks share theta: None of a plain tensor, (mesh, sharded dimensions) of a DTensor."""
    if not is_sharded(theta):
        return None
    return theta.device_mesh, tuple(
        i for i, placement in enumerate(theta.placements) if not placement.is_replicate()
    )


def over_ranks(values: Tensor, key: Key) -> Tensor:
    """The sum over the ranks that share what `key` is of, in place."""
    if key is not None:
        mesh, dims = key
        for dim in dims:
            dist.all_reduce(values, group=mesh.get_group(dim))
    return values


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks going forward.

    Going back each rank's own part gets the gradient, for every rank's loss holds the whole sum.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, key: Key) -> Tensor:
        return over_ranks(value.detach().clone(), key)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def total(parts: Iterable[tuple[Key, Tensor]], keys: Sequence[Key], like: Tensor) -> Tensor:
    """The sum of this rank's `parts` over all ranks, a 0-d tensor; differentiable.

    One collective for each of `keys`, which every rank walks in the same order whether or not it
    has a part, so that ranks with nothing to add do not leave the others waiting.
    """
    zero = like.new_zeros((), dtype=torch.float32)
    sums: dict[Any, Tensor] = {}
    for key, value in parts:
        if key in sums:
            value = sums[key] + value.to(sums[key].device)
        sums[key] = value
    every = [_SumOverRanks.apply(sums.get(key, zero), key) for key in keys if key is not None]
    if None in sums:
        every.insert(0, sums[None])
    if not every:
        return zero
    out: Tensor = every[0]
    for value in every[1:]:
        out = out.to(value.device) + value
    return out
