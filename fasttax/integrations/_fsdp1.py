"""An EWC over the parameters that FSDP1 has flattened and cut.

With `use_orig_params` each keeps its own nn.Parameter, which between a backward and the next
forward is this rank's part of it, flat, as is its gradient. Where that part begins only FSDP's own
handles know (torch 2.11 to 2.14; test_fsdp1.py pins it).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttax._base import checks
from fasttax._base.gradient import gradient_of
from fasttax.ewc import ops
from fasttax.ewc.hold import Hold, one_value
from fasttax.integrations._shares import Share, Shares, trainable

FSDP1 = "FullyShardedDataParallel"
WAY_OUT = "use FSDP2 (fsdp_version: 2)"


class Part(NamedTuple):
    """What of a parameter lies on this rank, in the order in which its memory does."""

    first: int
    length: int
    stride: tuple[int, ...]  # of the whole parameter
    group: Any  # the ranks that share it

    def of(self, whole: Tensor) -> Tensor:
        """As a flat tensor of its own."""
        laid = whole.new_empty_strided(whole.shape, self.stride)
        laid.copy_(whole)
        line = laid.as_strided((whole.numel(),), (1,))
        return line[self.first : self.first + self.length].clone()


def wrapped_by(kind: str, model: nn.Module) -> Iterator[Any]:
    """Its modules of a class of torch.distributed.fsdp, which is imported where there is one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (m for m in model.modules() if isinstance(m, getattr(fsdp, kind)))


def has_fsdp1(model: nn.Module) -> bool:
    """Whether a part of it is FSDP1's."""
    return any(True for _ in wrapped_by(FSDP1, model))


def refuse_fsdp1(op: str, argument: str, model: nn.Module) -> None:
    """An error where a part of it is FSDP1's."""
    if has_fsdp1(model):
        raise checks.fail(
            op,
            argument,
            "plain, DDP or FSDP2 parameters",
            "FSDP1's flattened ones",
            "use FSDP2 (fsdp_version=2)",
        )


def _parts(op: str, model: nn.Module) -> Iterator[tuple[Tensor, Part]]:
    """Each parameter that has kept its own name, and what of it lies here."""
    handles = (vars(module)["_handle"] for module in wrapped_by(FSDP1, model))
    for handle in (h for h in handles if h is not None):
        if not handle.uses_sharded_strategy:
            raise checks.fail(
                op,
                "model",
                "parameters that FSDP1 has cut",
                "NO_SHARD, which it is, too, on one rank",
                "use DDP, or no launcher on one rank",
            )
        flat, group = handle.flat_param, handle.process_group
        for i, theta in enumerate(flat._params or ()):
            info, stride = flat._shard_param_infos[i], tuple(flat._strides[i])
            if info.in_shard:
                yield theta, Part(info.intra_param_start_idx, info.numel_in_shard, stride, group)
            else:
                yield theta, Part(0, 0, stride, group)


class FSDP1Shares(Shares):
    """The trainable parameters of an EWC that was made before FSDP1 cut them.

    Args:
        op: the caller, for errors.
        hold: of the EWC.
        model: with FSDP1's modules in it.

    Raises:
        ValueError: parameters that are not the model's or have lost their names
            (use_orig_params=False), NO_SHARD, more than one group of ranks; or as `trainable`.
    """

    def __init__(self, op: str, hold: Hold, model: nn.Module) -> None:
        self.op = op
        held = trainable(op, hold, "FSDP1", WAY_OUT)
        parts = {id(theta): part for theta, part in _parts(op, model)}
        strangers = [h.name for h in held if id(h.theta) not in parts]
        if strangers or not held:
            raise checks.fail(
                op,
                "ewc",
                "trainable parameters that FSDP1 has cut under their own names",
                f"{len(strangers)} that it has not, as {strangers[0]}" if strangers else "none",
                "make the EWC on the model before it is wrapped, and set use_orig_params=True "
                f"(Accelerate's fsdp_use_orig_params: true); or {WAY_OUT}",
            )
        groups = {parts[id(h.theta)].group for h in held}
        if len(groups) > 1:
            raise checks.fail(
                op, "model", "one group of ranks under FSDP1", f"{len(groups)} groups", WAY_OUT
            )
        self.group = groups.pop()
        shares = []
        for h in held:
            part = parts[id(h.theta)]
            fisher, anchor = (part.of(t) for t in (h.fisher.decode(), h.decoded_anchor()))
            home = h.theta.device
            shares.append(Share.of(h, fisher.to(home), anchor.to(home), hold.storage))
        super().__init__(hold, shares)

    def values(self) -> list[Tensor]:
        """The parameters, as they lie between a backward and the next forward.

        Raises:
            RuntimeError: FSDP1 has made them whole, as within a forward.
        """
        flat = [s.theta.detach() for s in self.shares]
        for s, value in zip(self.shares, flat, strict=True):
            if value.shape != s.anchor.shape:
                raise RuntimeError(
                    f"{self.op}: {s.name}: expected this rank's {s.anchor.numel()} values of it, "
                    f"got shape {tuple(value.shape)}: FSDP1 has it whole, within a forward, or "
                    "between a forward and its backward"
                )
        return flat

    @torch.no_grad()
    def add_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """As `EWC.add_grad_`; of a part that has no gradient yet FSDP1 takes up the one made."""
        values, grads = self.values(), []
        for s, value in zip(self.shares, values, strict=True):  # what is not here has no gradient
            grads.append(gradient_of(s.theta) if value.numel() else torch.zeros_like(value))
        factor, times = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        if times is not None:
            times = one_value(self.op, "scale", times, values[0])
        total = ops.add_grad_(
            values, grads, *self.beside(values), self.hold.strength, factor, times
        )
        return self.over_ranks(total)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Over the ranks that share the parameters."""
        dist.all_reduce(values, group=self.group)
        return values
