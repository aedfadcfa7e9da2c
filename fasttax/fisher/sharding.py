"""DTensors: local shards of activations under tensor parallelism, and of sums whose parameter FSDP2
has sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: Any) -> bool:
    # by name: importing torch.distributed.tensor costs every user a second
    return type(t).__name__ == "DTensor"


def placements(t: Any) -> Any:
    return t.placements if is_dtensor(t) else None


def local(t: Any, where: str, like: Any = None) -> Tensor:
    """This rank's part of an activation that is split by features alone.

    `like`: placements of the output that t is a gradient of.
    """
    if not is_dtensor(t):
        return t
    if like is not None:
        from torch.distributed.tensor import Replicate

        t = t.redistribute(placements=[Replicate() if p.is_partial() else p for p in like])
    split = [
        p
        for p in t.placements
        if p.is_partial() or (p.is_shard() and p.dim % t.dim() != t.dim() - 1)
    ]
    if split:
        raise ValueError(
            f"DiagonalFisher: {where}: an example's tokens live on several ranks ({split[0]}: "
            "sequence or context parallel), so that its gradient "
            "cannot be squared on one; estimate without it, or leave its parameters out with "
            "params="
        )
    return t.to_local()


def refuse_context_parallel(op: str, unit: str, *inputs: Any) -> None:
    """An example's tokens on several ranks.

    Its gradient is a sum over ranks, which squares on one rank do not know.
    """
    split = any(
        is_dtensor(x) and any(p.is_shard() and p.dim > 0 for p in x.placements) for x in inputs
    )
    if (split or _context_parallel_is_on()) and unit == "example":
        raise ValueError(
            f"{op}: unit: expected 'token' or 'batch' under context parallelism, got 'example': an "
            "example's tokens live on several ranks, and "
            "their gradients would be squared apart; estimate with each example on one rank (data "
            "parallel)"
        )


def _context_parallel_is_on() -> bool:
    """Inside torch.distributed.tensor.experimental.context_parallel, which replaces
    scaled_dot_product_attention.
    """
    attention = torch.nn.functional.scaled_dot_product_attention
    return getattr(attention, "__module__", "").startswith("torch.distributed.tensor.experimental")


def whole_ids(ids: Any, where: str) -> Tensor:
    """Token ids as a plain tensor: every rank of a tensor-parallel embedding sees all of them."""
    if is_dtensor(ids) and any(p.is_shard() for p in ids.placements):
        raise ValueError(
            f"DiagonalFisher: {where}: an example's tokens live on several ranks (sequence or "
            "context parallel), so that its gradient cannot be "
            "squared on one; estimate without it, or leave its parameters out with params="
        )
    plain: Tensor = ids.to_local() if is_dtensor(ids) else ids
    return plain


def own_rows(ids: Tensor, weight: Any) -> tuple[Tensor, Tensor | None]:
    """(ids as rows of this rank's part of an embedding, which of them lie in it).

    Those of other ranks become row 0, to be given zeros.
    """
    rows = [d for d, p in enumerate(weight.placements) if p.is_shard() and p.dim == 0]
    if not rows:
        return ids, None
    count = -(-weight.shape[0] // weight.device_mesh.size(rows[0]))  # as torch.chunk cuts
    first = weight.device_mesh.get_local_rank(rows[0]) * count
    here = (ids >= first) & (ids < first + count)
    return torch.where(here, ids - first, 0), here


class Shard:
    """The sum of one DTensor parameter.

    This rank's part of a float32 tensor placed as the parameter.

    `parallel`: its layer is tensor parallel, over the mesh's last dimension; FSDP2's dimensions
        come before it, if there are any.
    """

    def __init__(self, param: Any, dtype: torch.dtype) -> None:
        # until the layer has run: its activations are split too, and ranks of one mesh hold
        # different sums
        self.parallel = False
        self.mesh, self.placements, self.shape, self.stride = (
            param.device_mesh,
            param.placements,
            param.shape,
            param.stride(),
        )
        self.local = torch.zeros(
            param.to_local().shape, dtype=dtype, device=param.to_local().device
        )

    @property
    def data_dims(self) -> range:
        """The dimensions of the mesh along which ranks see different examples, whose sums come
        together as they are made.
        """
        return range(self.mesh.ndim - self.parallel)

    def unsharded(self) -> Tensor:
        """Zeros for one rank's contribution.

        whole, or of a tensor-parallel layer this rank's part of it.
        """
        shape, (split,) = list(self.shape), self.placements[-1:]
        if self.parallel and split.is_shard():
            last = self.mesh.ndim - 1
            count = -(-shape[split.dim] // self.mesh.size(last))
            shape[split.dim] = max(
                0, min(count, shape[split.dim] - self.mesh.get_local_rank(last) * count)
            )
        return torch.zeros(shape, dtype=self.local.dtype, device=self.local.device)

    def add_everywhere(self, part: Tensor) -> None:
        """Adds the sum of every data-parallel rank's `part`: a reduce-scatter.

        All of those ranks must call it, in one order.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Partial, Replicate
        from torch.distributed.tensor import Shard as Split

        # FSDP2 cuts what tensor parallelism has left to a rank, so each dimension is a mesh of its
        # own
        for d in self.data_dims:
            placement, mesh = (
                self.placements[d],
                DeviceMesh.from_group(self.mesh.get_group(d), self.mesh.device_type),
            )
            target = Replicate() if placement.is_replicate() else Split(placement.dim)
            part = (
                DTensor.from_local(part, mesh, [Partial()], run_check=False)
                .redistribute(placements=[target])
                .to_local()
            )
        self.local += part

    def tensor(self, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, shape=self.shape, stride=self.stride, run_check=False
        )
