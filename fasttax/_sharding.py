"""DTensors: local shards of activations under tensor parallelism, and of sums whose parameter FSDP2 has sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: Any) -> bool:
    return type(t).__name__ == "DTensor"  # by name: importing torch.distributed.tensor costs every user a second


def placements(t: Any) -> Any:
    return t.placements if is_dtensor(t) else None


def local(t: Any, where: str, like: Any = None) -> Tensor:
    """This rank's part of an activation that is split by features alone. `like`: placements of the output that t is a gradient of."""
    if not is_dtensor(t):
        return t
    if like is not None:
        from torch.distributed.tensor import Replicate

        t = t.redistribute(placements=[Replicate() if p.is_partial() else p for p in like])
    split = [p for p in t.placements if p.is_partial() or (p.is_shard() and p.dim % t.dim() != t.dim() - 1)]
    if split:
        raise ValueError(f"DiagonalFisher: {where}: an example's tokens live on several ranks ({split[0]}: sequence or context parallel), so that its gradient "
                         "cannot be squared on one; estimate without it, or leave its parameters out with params=")  # fmt: skip
    return t.to_local()


def refuse_context_parallel(op: str, unit: str, *inputs: Any) -> None:
    """An example's tokens on several ranks: its gradient is a sum over ranks, which squares on one rank do not know."""
    split = any(is_dtensor(x) and any(p.is_shard() and p.dim > 0 for p in x.placements) for x in inputs)
    if (split or _context_parallel_is_on()) and unit == "example":
        raise ValueError(f"{op}: unit: expected 'token' or 'batch' under context parallelism, got 'example': an example's tokens live on several ranks, and "
                         "their gradients would be squared apart; estimate with each example on one rank (data parallel)")  # fmt: skip


def _context_parallel_is_on() -> bool:
    """Inside torch.distributed.tensor.experimental.context_parallel, which replaces scaled_dot_product_attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return getattr(attention, "__module__", "").startswith("torch.distributed.tensor.experimental")


class Shard:
    """The sum of one DTensor parameter: this rank's part of a float32 tensor placed as the parameter."""

    def __init__(self, param: Any, dtype: torch.dtype) -> None:
        self.parallel = False  # tensor parallel: activations are split too, and ranks of one mesh hold different sums
        self.mesh, self.placements, self.shape, self.stride = param.device_mesh, param.placements, param.shape, param.stride()
        self.local = torch.zeros(param.to_local().shape, dtype=dtype, device=param.to_local().device)

    def add_everywhere(self, whole: Tensor) -> None:
        """Adds the sum of every rank's `whole`: a reduce-scatter. All ranks of the mesh must call it, in one order."""
        from torch.distributed.tensor import DTensor, Partial

        partial = DTensor.from_local(whole, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
        self.local += partial.redistribute(placements=self.placements).to_local()

    def tensor(self, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, self.mesh, self.placements, shape=self.shape, stride=self.stride, run_check=False)
