"""The running sums of squares, one tensor a parameter, and when a layer's pieces may be squared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax.fisher.local import ModuleTap
from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import HeadRows, Rows, accumulate, add_squares, closed_form, head_rows
from fasttax.fisher.sharding import Shard, is_dtensor
from fasttax.fisher.taps import EmbeddingTap, LinearTap, Tap


@dataclass(frozen=True)
class Slot:
    """What a sum is of: a parameter, or the full weight behind a packed (quantised) one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    param: Tensor | None = None

    @staticmethod
    def of(p: Tensor) -> Slot:
        return Slot(
            p.shape, torch.float64 if p.dtype == torch.float64 else torch.float32, p.device, p
        )


class Sums:
    """Sums by parameter name.

    Accumulated in float32 whatever the model's dtype (float64 for float64 parameters).
    """

    def __init__(self, slots: Mapping[str, Slot], tied: str) -> None:
        self.slots, self.tied = dict(slots), tied
        self.values: dict[str, Tensor] = {}
        self.shards = {
            n: Shard(s.param, s.dtype) for n, s in self.slots.items() if is_dtensor(s.param)
        }
        self.taps: dict[str, list[Tap]] = {}
        self.routed: set[str] = set()  # parameters of experts: they may take part or not
        self.current: Pass | None = None
        self.weight: float | None = None  # of a square: 1 / mc_samples

    @property
    def data_groups(self) -> list[Any]:
        """The groups over which FSDP2 has summed already, one a dimension of its mesh.

        None without FSDP2.
        """
        return next(
            (
                [s.mesh.get_group(d) for d in s.data_dims]
                for s in self.shards.values()
                if s.data_dims
            ),
            [],
        )

    def value(self, name: str) -> Tensor:
        """The sum of `name`: this rank's part for a DTensor parameter."""
        if name in self.shards:
            return self.shards[name].local
        if name not in self.values:
            slot = self.slots[name]
            with torch.inference_mode(False):
                self.values[name] = torch.zeros(slot.shape, dtype=slot.dtype, device=slot.device)
        return self.values[name]

    def _run(self, name: str, add: Callable[[Tensor], Any], parallel: bool = False) -> Any:
        """Calls `add` with what to add to.

        The sum, or for an FSDP2 parameter an unsharded tensor that is then reduced to shards.
        """
        if name not in self.shards:
            return add(self.value(name))
        shard = self.shards[name]
        shard.parallel |= parallel
        if not shard.data_dims:
            return add(shard.local)
        part = shard.unsharded()
        result = add(part)
        shard.add_everywhere(part)
        return result

    # --- the taps' side ------------------------------------------------------------------------------------------------

    def take(self, current: Pass, name: str, piece: Rows) -> None:
        if current.muted:
            return
        current.seen = True
        if name in current.done:
            raise RuntimeError(
                f"DiagonalFisher: {name} took part in two backward passes of one graph that were "
                "not seen together, so that its gradient would "
                "be squared in parts; sum the losses into one backward, or use checkpointing with "
                "use_reentrant=False"
            )
        waiting = current.waiting.get(name, [])
        if current.keeps() or name in self.routed:
            current.waiting.setdefault(name, []).append(piece)
        elif piece.kind in ("linear", "head") and not waiting and self._is_tied_pair(current, name):
            ids = current.ids[name]
            bounds = current.segments(ids.shape, name, None)
            current.waiting[name] = [
                self._run(
                    name, lambda out: self._tied_head(out, piece, ids, bounds), piece.parallel
                )
            ]
        elif sum(current.calls[tap] for tap in self.taps[name]) > 1 and not any(
            isinstance(p, HeadRows) for p in waiting
        ):
            current.waiting.setdefault(name, []).append(piece)
        else:
            pieces = [*current.waiting.pop(name, []), piece]
            self._run(
                name,
                lambda out: accumulate(out, name, pieces, self.weight, self.tied),
                piece.parallel,
            )
            current.done.add(name)

    def _is_tied_pair(self, current: Pass, name: str) -> bool:
        """An embedding and a head that share a weight and have each run once."""
        taps = self.taps[name]
        kinds = {type(tap) for tap in taps}
        return (
            len(taps) == 2
            and kinds == {EmbeddingTap, LinearTap}
            and self.tied == "exact"
            and name in current.ids
            and all(current.calls[tap] == 1 for tap in taps)
        )

    def _tied_head(self, out: Tensor, piece: Rows, ids: Tensor, bounds: Tensor) -> HeadRows:
        """The head's own square, and the rows of its gradient that the embedding will need.

        Its (R, V) gradient is let go.
        """
        exact = piece.kind == "head"
        rows = head_rows(piece, ids, bounds, out, whole=exact)
        # a sampled label in the rows of the unit's own tokens, where the head meets the embedding;
        # all labels elsewhere
        if exact:
            closed_form(out, piece, self.weight, rows.keys)
        else:
            accumulate(out, "", [piece], self.weight, self.tied)
        return rows

    def take_gradients(self, current: Pass, tap: Any, call: tuple[Any, ...], several: bool) -> None:
        if current.muted:
            return
        current.seen = True
        if any(name in current.done for name in tap.names.values()):
            raise RuntimeError(
                f"DiagonalFisher: {tap.where} took part in two backward passes of one graph that "
                "were not seen together; "
                "sum the losses into one backward"
            )
        current.local.setdefault(tap, []).append(call)
        if not (
            several
            or current.keeps()
            or current.calls[tap] > 1
            or self.routed & set(tap.names.values())
        ):
            self._add_gradients(current, tap)

    def _add_gradients(self, current: Pass, tap: ModuleTap) -> None:
        calls = current.local.pop(tap, [])
        names = tap.names.values()
        parts = {
            n: self.value(n)
            if n not in self.shards
            else torch.zeros(
                self.slots[n].shape, dtype=self.slots[n].dtype, device=self.slots[n].device
            )
            for n in names
        }
        for unit in range(1 if current.unit == "batch" else current.examples):
            found = tap.gradients(current, calls, unit)
            add_squares(
                [parts[name] for name in found],
                list(found.values()),
                1.0 if self.weight is None else self.weight,
            )
        for name in names:
            if name in self.shards:
                self.shards[name].add_everywhere(parts[name])
            current.done.add(name)

    def finish(self, current: Pass) -> None:
        """At the end of a backward: squares what waited for other uses of its parameter."""
        for name in self.slots:  # one order on every rank
            pieces = current.waiting.pop(name, [])
            if pieces:
                parallel = any(isinstance(p, Rows) and p.parallel for p in pieces)
                self._run(
                    name,
                    lambda out, name=name, pieces=pieces: accumulate(
                        out, name, pieces, self.weight, self.tied
                    ),
                    parallel,
                )  # type: ignore[misc]
            elif name in self.routed and name in self.shards:
                self._run(name, lambda out: None)
        for tap in [*current.local]:
            self._add_gradients(current, tap)
        current.done.clear()

    # --- ranks ----------------------------------------------------------------------------------------------------------

    def reduce(self, groups: list[Any]) -> None:
        """Sums over the ranks of all `groups`; FSDP2's sums are over all ranks already."""
        for name in self.slots:  # one order on every rank, also where a rank has seen nothing
            if name not in self.shards or not self.shards[name].data_dims:
                for group in groups:
                    dist.all_reduce(self.value(name), group=group)
