"""What of a parameter lies on this rank, and sums over the ranks that share it (FSDP2's DTensors.

Plain tensors pass through).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Key = Any  # None for a plain tensor, (mesh, mesh dimensions it is sharded over) for a DTensor


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "device_mesh") and hasattr(t, "placements")


def local(t: Any) -> Tensor:
    """This rank's part, differentiable."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Any) -> Tensor:
    """All of it; a collective on the ranks that share it."""
    return t.full_tensor() if is_sharded(t) else t


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
    """This rank's `part` of a tensor that is sharded as theta is."""
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


def key_of(theta: Any) -> Key:
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
    """The sum of this rank's `parts` over all ranks.

    One collective for each of `keys`, which every rank walks in the same order whether or not it
    has a part, so that ranks with nothing to add do not leave the others waiting.
    """
    sums: dict[Any, Tensor] = {}
    for key, value in parts:
        sums[key] = sums[key] + value.to(sums[key].device) if key in sums else value
    out = sums.get(None)
    for key in keys:
        if key is None:
            continue
        mine = sums.get(key)
        value = _SumOverRanks.apply(
            like.new_zeros((), dtype=torch.float32) if mine is None else mine, key
        )
        out = value if out is None else out.to(value.device) + value
    return like.new_zeros((), dtype=torch.float32) if out is None else out
