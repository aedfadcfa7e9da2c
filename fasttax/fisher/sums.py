"""The running sums of squares, one tensor a parameter, and when a layer's pieces may be squared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax._base import dtensor
from fasttax.fisher.ops import sum_dtype
from fasttax.fisher.passes import Pass, UnitGradients
from fasttax.fisher.pieces import (
    Piece,
    TiedHead,
    accumulate,
    add_head,
    add_squares,
    gradient_of,
    tied_head,
)
from fasttax.fisher.sharding import ShardedSum
from fasttax.fisher.tap import Tap


@dataclass(frozen=True)
class Slot:
    """What a sum is of: a parameter, or the full weight behind a packed (quantised) one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    param: Tensor | None = None

    @staticmethod
    def of(p: Tensor) -> Slot:
        """Float32 for a parameter of any dtype but float64."""
        return Slot(p.shape, sum_dtype(p.dtype), p.device, p)


class Sums:
    """Sums by parameter name.

    Accumulated in float32 whatever the model's dtype (float64 for float64 parameters).

    Attributes:
        slots: what is summed.
        tied: see DiagonalFisher.
        weight: of a square, 1 / mc_samples.
        values: the sums so far of parameters that are no DTensors; `shards` those of DTensors.
        taps: a parameter -> the taps that it has pieces from.
        routed: parameters of experts: they may take part in a batch or not.
        current: the pass that runs under the taps.
        damaged: a backward failed when some layers had added their squares and others had not.
        totals: inside `trial` and `scratch`, the sums of the gradients themselves.
    """

    def __init__(self, slots: Mapping[str, Slot], tied: str, weight: float = 1.0) -> None:
        self.slots, self.tied, self.weight = dict(slots), tied, weight
        self.values: dict[str, Tensor] = {}
        self.shards = {
            n: ShardedSum(s.param, s.dtype)
            for n, s in self.slots.items()
            if dtensor.is_sharded(s.param)
        }
        self.taps: dict[str, list[Tap]] = {}
        self.routed: set[str] = set()
        self.current: Pass | None = None
        self.damaged = False
        self.totals: dict[str, Tensor] | None = None

    @property
    def data_groups(self) -> list[Any]:
        """The groups over which FSDP2 has summed already, one a dimension of its mesh.

        Empty without FSDP2.
        """
        for shard in self.shards.values():
            if shard.data_dims:
                return [shard.mesh.get_group(d) for d in shard.data_dims]
        return []

    def approximates(self, name: str) -> bool:
        """Whether `name` is squared use by use, which is not the square of its gradient."""
        return self.tied == "sum_of_squares" and len(self.taps.get(name, ())) > 1

    def value(self, name: str) -> Tensor:
        """The sum of `name`: this rank's part for a DTensor parameter."""
        if name in self.shards:
            return self.shards[name].local
        if name not in self.values:
            slot = self.slots[name]
            with torch.inference_mode(False):
                self.values[name] = torch.zeros(slot.shape, dtype=slot.dtype, device=slot.device)
        return self.values[name]

    def numel(self, name: str) -> int:
        """How many numbers `value` has, without making it."""
        if name in self.shards:
            return self.shards[name].local.numel()
        return self.slots[name].shape.numel()

    def over(self, count: int) -> dict[str, Tensor]:
        """The sums over `count`, as their parameters lie; of DTensors a collective of their ranks.

        Raises:
            ValueError: some are not finite, be it on another rank.
        """
        values = {n: self.value(n) / count for n in self.squared()}
        odd = self._not_finite(values)
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ValueError(
                f"DiagonalFisher: expected finite squares, got NaN or infinite ones of "
                f"{', '.join(odd[:3])}{more}: a batch among them has a loss or gradients that are "
                "not finite; leave it out, and of a float16 model, which overflows at 65504, take "
                "bfloat16 or float32"
            )
        return {n: self.placed(n, v) for n, v in values.items()}

    def _not_finite(self, values: Mapping[str, Tensor]) -> list[str]:
        """The names with a value that is not; every rank of a shard's mesh has the same answer."""
        counts = {n: v.isfinite().all().logical_not().float() for n, v in values.items()}
        keys = {n: shard.everywhere for n, shard in self.shards.items() if n in counts}
        for key in dict.fromkeys(keys.values()):
            names = [n for n in counts if keys.get(n) == key]
            summed = dtensor.over_ranks(torch.stack([counts[n] for n in names]), key)
            counts.update(zip(names, summed, strict=True))
        found = {n: c.cpu() for n, c in counts.items()}
        return [n for n, c in found.items() if bool(c)]

    def placed(self, name: str, value: Tensor) -> Tensor:
        """`value`, as long as the sum of `name`, placed as its parameter is."""
        if name in self.shards:
            return self.shards[name].tensor(value)
        return value

    def watched(self, name: str) -> Tensor:
        """What of the sum of `name` tells how it still changes."""
        return self.value(name)

    def watched_numel(self, name: str) -> int:
        """How many numbers `watched` has, without making it."""
        return self.numel(name)

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by the names that a file has for them; who resumes copies into them."""
        return {f"sum.{n}": self.value(n) for n in self.squared()}

    def squared(self) -> list[str]:
        """The parameters whose squares are summed."""
        return [*self.slots]

    # --- passes -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self, passes: Sequence[Pass]) -> Iterator[None]:
        """Inside, what taps see is of the first of `passes`, until `current` is another."""
        self.current = passes[0]
        try:
            yield
        except BaseException:
            self.damaged = self.damaged or any(p.seen for p in passes)
            raise
        finally:
            self.current = None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Mapping[str, Tensor]]:
        """Inside, sums of their own, from nothing and of weight 1; the others are back after it.

        The sums of the gradients that are squared meanwhile are in `totals`.

        Yields:
            The sums.
        """
        before = self.values, self.weight, self.damaged
        self.values, self.weight, self.totals = {}, 1.0, {}
        try:
            yield self.values
        finally:
            self.values, self.weight, self.damaged = before
            self.totals = None

    @contextlib.contextmanager
    def trial(self) -> Iterator[Mapping[str, Tensor]]:
        """Inside, sums of their own, which are added to the others at the end, unless it fails.

        Yields:
            The sums of the gradients that are squared meanwhile, by parameter.
        """
        before, damaged = self.values, self.damaged
        self.values, self.totals = {}, {}
        try:
            yield self.totals
        except BaseException:
            self.values, self.damaged = before, damaged
            raise
        finally:
            self.totals = None
        found, self.values = self.values, before
        for name, t in found.items():
            self.values[name] = self.values[name].add_(t) if name in self.values else t

    def add_by_example(self, gradients: Iterable[Mapping[str, Tensor]]) -> None:
        """Adds the squares of gradients by name, as they come: an example's, or a draw's of it.

        Where they end in an error with some added, the sums are damaged.
        """
        added = False
        try:
            for found in gradients:
                added = True
                add_squares([self.value(n) for n in found], [*found.values()], self.weight)
        except BaseException:
            self.damaged = self.damaged or added
            raise

    def _total(self, name: str, gradient: Tensor) -> None:
        assert self.totals is not None
        if name in self.totals:
            gradient = gradient + self.totals[name]
        self.totals[name] = gradient

    @contextlib.contextmanager
    def _adding_to(self, name: str, parallel: bool = False) -> Iterator[Tensor]:
        """Inside, the tensor to add squares to.

        Yields:
            The sum itself, or for an FSDP2 parameter an unsharded one that then goes to the shards,
            a collective.
        """
        shard = self.shards.get(name)
        if shard is None:
            yield self.value(name)
            return
        shard.parallel |= parallel
        if not shard.data_dims:
            yield shard.local
            return
        part = shard.unsharded()
        yield part
        shard.add_everywhere(part)

    def _add(self, name: str, pieces: Sequence[Piece | TiedHead]) -> None:
        parallel = any(isinstance(p, Piece) and p.parallel for p in pieces)
        with self._adding_to(name, parallel) as out:
            accumulate(out, name, pieces, self.weight, self.tied)

    # --- the taps' side ---------------------------------------------------------------------------

    def take(self, current: Pass, name: str, piece: Piece) -> None:
        """Squares what one use of `name` left, or lets it wait for the parameter's other uses.

        Raises:
            RuntimeError: the parameter's gradient was squared already, in another backward of the
                same graph.
        """
        if current.diverted is not None:
            current.diverted.append(piece)
            return
        current.seen = True
        if name in current.done:
            raise RuntimeError(
                f"DiagonalFisher: {name} took part in two backward passes of one graph that were "
                "not seen together, so that its gradient would be squared in parts; sum the losses "
                "into one backward, or use checkpointing with use_reentrant=False"
            )
        if self.totals is not None:
            self._total(name, gradient_of(piece, self.slots[name].shape))
        waiting = current.waiting.setdefault(name, [])
        calls = sum(current.calls[tap] for tap in self.taps[name])
        if current.keeps() or name in self.routed:
            waiting.append(piece)
        elif piece.kind in ("linear", "head") and not waiting and self._is_tied(current, name):
            waiting.append(self._begin_tied(current, name, piece))
        elif calls > 1 and not any(isinstance(p, TiedHead) for p in waiting):
            waiting.append(piece)
        else:
            self._add(name, [*current.waiting.pop(name), piece])
            current.done.add(name)

    def _is_tied(self, current: Pass, name: str) -> bool:
        """Whether an embedding and a head share the weight and have each run once."""
        taps = self.taps[name]
        return (
            self.tied == "exact"
            and sorted(tap.role for tap in taps) == ["embedding", "head"]
            and name in current.ids
            and all(current.calls[tap] == 1 for tap in taps)
        )

    def _begin_tied(self, current: Pass, name: str, piece: Piece) -> TiedHead:
        """Adds the head's own square; returns the part of its gradient that the embedding needs.

        Its whole (V, H) gradient is let go.
        """
        ids = current.ids[name]
        bounds = current.layout.segments(ids.shape, name, None)
        exact = piece.kind == "head"
        with self._adding_to(name, piece.parallel) as out:
            tied = tied_head(piece, ids, bounds, out, whole=exact)
            # a sampled label in the rows of the unit's own tokens, where the head meets the
            # embedding; all labels elsewhere
            if exact:
                add_head(out, piece, self.weight, tied.keys)
            else:
                accumulate(out, name, [piece], self.weight, self.tied)
        return tied

    def take_gradients(
        self, current: Pass, tap: Tap, gradients: UnitGradients, *, last: bool
    ) -> None:
        """Squares the gradients of a module that runs again unit by unit, once all calls are in.

        Raises:
            RuntimeError: its gradients were squared already, in another backward of the same graph.
        """
        if current.diverted is not None:
            return
        current.seen = True
        names = set(tap.names.values())
        if names & current.done:
            raise RuntimeError(
                f"DiagonalFisher: {tap.where} took part in two backward passes of one graph that "
                "were not seen together; sum the losses into one backward"
            )
        current.reruns.setdefault(tap, []).append(gradients)
        alone = last and current.calls[tap] <= 1
        if alone and not current.keeps() and not names & self.routed:
            self._add_reruns(current, tap)

    def _add_reruns(self, current: Pass, tap: Tap) -> None:
        calls = current.reruns.pop(tap)
        units = current.layout.examples
        if current.layout.unit == "batch":
            units = 1
        with contextlib.ExitStack() as stack:
            sums = {n: stack.enter_context(self._adding_to(n)) for n in tap.names.values()}
            for unit in range(units):
                total: dict[str, Tensor] = {}
                for gradients in calls:
                    for name, g in gradients(unit).items():
                        total[name] = total[name] + g if name in total else g
                add_squares([sums[n] for n in total], list(total.values()), self.weight)
                if self.totals is not None:
                    for name, g in total.items():
                        self._total(name, g)
        current.done.update(tap.names.values())

    def finish(self, current: Pass) -> None:
        """At the end of a backward: squares what waited for other uses of its parameter."""
        for name in self.slots:  # one order on every rank
            pieces = current.waiting.pop(name, [])
            if pieces:
                self._add(name, pieces)
            elif name in self.routed and name in self.shards:
                with self._adding_to(name):
                    pass  # nothing of this rank's, in a collective of all
        for tap in list(current.reruns):
            self._add_reruns(current, tap)
        current.done.clear()

    # --- ranks ------------------------------------------------------------------------------------

    def reduce(self, groups: Sequence[Any]) -> None:
        """Sums over the ranks of all `groups`; FSDP2's sums are over all ranks already."""
        for name in self.squared():  # one order on every rank, also where it has seen nothing
            if name not in self.shards or not self.shards[name].data_dims:
                for group in groups:
                    dist.all_reduce(self.value(name), group=group)
