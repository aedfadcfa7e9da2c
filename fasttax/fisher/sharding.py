"""The estimator's side of DTensors.

Activations that tensor parallelism has split by features, token ids, and the sums of parameters
that FSDP2 has sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base import dtensor


def activation(t: Any, where: str, like: Any = None) -> Tensor:
    """This rank's part of an activation (..., features) that is split by features alone.

    Args:
        t: a plain tensor, which passes through, or a DTensor.
        where: the module, for the error.
        like: placements of the output that t is a gradient of; partial ones are summed first.

    Raises:
        ValueError: t is split by tokens, so that an example's gradient is a sum over ranks.
    """
    if not dtensor.is_sharded(t):
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
        raise ValueError(_spread(where, f" ({split[0]}: sequence or context parallel)"))
    return dtensor.local(t)


def whole_ids(ids: Any, where: str) -> Tensor:
    """Token ids as a plain tensor: every rank of a tensor-parallel embedding sees all of them.

    Raises:
        ValueError: the ids are split, so that an example's tokens live on several ranks.
    """
    if any(p.is_shard() for p in dtensor.placements_of(ids) or ()):
        raise ValueError(_spread(where, " (sequence or context parallel)"))
    return dtensor.local(ids)


def _spread(where: str, how: str) -> str:
    return (
        f"DiagonalFisher: {where}: an example's tokens live on several ranks{how}, so that its "
        "gradient cannot be squared on one; estimate without it, or leave its parameters out with "
        "params="
    )


def refuse_context_parallel(op: str, unit: str, *inputs: Any) -> None:
    """Refuses unit="example" where a model's inputs are split by tokens.

    An example's gradient is then a sum over ranks, whose square no rank can take alone.

    Raises:
        ValueError: the inputs are split, or context_parallel is on.
    """
    split = any(p.is_shard() and p.dim > 0 for x in inputs for p in dtensor.placements_of(x) or ())
    if unit == "example" and (split or _context_parallel_is_on()):
        raise ValueError(
            f"{op}: unit: expected 'token' or 'batch' under context parallelism, got 'example': an "
            "example's tokens live on several ranks, and their gradients would be squared apart; "
            "estimate with each example on one rank (data parallel)"
        )


def _context_parallel_is_on() -> bool:
    """Inside torch.distributed.tensor.experimental.context_parallel.

    It replaces scaled_dot_product_attention, which nothing else does from that module.
    """
    attention = torch.nn.functional.scaled_dot_product_attention
    return getattr(attention, "__module__", "").startswith("torch.distributed.tensor.experimental")


def own_rows(ids: Tensor, weight: Any) -> tuple[Tensor, Tensor | None]:
    """(ids as rows of this rank's part of an embedding, which of them lie in it; None: all).

    Those of other ranks become row 0, to be given zeros.
    """
    cut = [d for d, p in enumerate(weight.placements) if p.is_shard() and p.dim == 0]
    if not cut:
        return ids, None
    mesh, dim = weight.device_mesh, cut[0]
    first, count = dtensor.part_size(weight.shape[0], mesh.size(dim), mesh.get_local_rank(dim))
    here = (ids >= first) & (ids < first + count)
    return torch.where(here, ids - first, 0), here


class ShardedSum:
    """The sum of one DTensor parameter: this rank's part of a tensor placed as the parameter.

    Attributes:
        local: this rank's part, in the dtype that sums have.
        parallel: whether the parameter's layer is tensor parallel, over the mesh's last dimension
            (FSDP2's dimensions come before it, if there are any). False until the layer has run
            with split activations, since ranks of one mesh then hold different sums.
    """

    def __init__(self, param: Any, dtype: torch.dtype) -> None:
        self.param, self.mesh, self.parallel = param, param.device_mesh, False
        mine = param.to_local()
        self.local = torch.zeros(mine.shape, dtype=dtype, device=mine.device)

    @property
    def data_dims(self) -> range:
        """The dimensions of the mesh along which ranks see different examples.

        Their sums come together as they are made.
        """
        return range(self.mesh.ndim - self.parallel)

    @property
    def everywhere(self) -> dtensor.Key:
        """Of all ranks of the mesh, for `dtensor.over_ranks`."""
        return self.mesh, tuple(range(self.mesh.ndim))

    def unsharded(self) -> Tensor:
        """Zeros for one rank's contribution.

        Whole, or of a tensor-parallel layer this rank's part of it.
        """
        shape, split = list(self.param.shape), self.param.placements[-1]
        if self.parallel and split.is_shard():
            last = self.mesh.ndim - 1
            ranks, rank = self.mesh.size(last), self.mesh.get_local_rank(last)
            shape[split.dim] = dtensor.part_size(shape[split.dim], ranks, rank)[1]
        return torch.zeros(shape, dtype=self.local.dtype, device=self.local.device)

    def add_everywhere(self, part: Tensor) -> None:
        """Adds the sum of every data-parallel rank's `part`; all of those ranks must call it."""
        placements = self.param.placements
        self.local += dtensor.scatter_sum(part, self.mesh, self.data_dims, placements)

    def tensor(self, part: Tensor) -> Tensor:
        """`part`, this rank's of some tensor, as a DTensor placed as the parameter."""
        return dtensor.as_theta(part, self.param)
