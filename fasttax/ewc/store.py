"""Where EWC keeps Fisher and anchor.

Beside the parameters, in pinned host memory, or in a memory-mapped file; and how they come over.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks, dtensor, mapped
from fasttax.fisher.estimate import BLOCK, Stored, encode

SPLIT = "bf16+8"
ANCHORS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# parameters that come over at once: 128 MB in float32, and as much again under way
STREAMED = 1 << 24


@dataclass
class Kept:
    """What is held of a parameter, or of a weight that LoRA moves.

    Its name without what wrappers insert, and its Fisher as stored.
    """

    name: str
    fisher: Stored


@dataclass
class Held(Kept):
    """One held parameter: the model's own tensor, and this rank's part of its Fisher and anchor as
    stored.
    """

    theta: Tensor
    anchor: Tensor

    @property
    def count(self) -> int:
        return self.fisher.values.numel()

    def decoded_anchor(self) -> Tensor:
        return decode_anchor(self.anchor, self.fisher.values.shape)


@dataclass
class Lists:
    """What one call of an op takes, on the parameters' device."""

    key: dtensor.Key
    owners: list[Tensor]  # the model's parameters; `params` are this rank's parts of them
    params: list[Tensor]
    anchors: list[Tensor]
    fishers: list[Tensor]
    scales: list[Tensor]


def checked_anchor_dtype(op: str, value: Any) -> torch.dtype | str | None:
    """None (each parameter's own), a torch.dtype, or "bf16+8"."""
    if value is None or value == SPLIT or value in checks.FLOATS:
        return value
    if value in ANCHORS:
        return ANCHORS[value]
    raise checks.fail(
        op,
        "anchor_dtype",
        f"None, a floating-point torch.dtype, 'fp32', 'bf16', 'fp16' or {SPLIT!r}",
        repr(value),
    )


def encode_anchor(anchor: Tensor, dtype: torch.dtype | str) -> Tensor:
    """In `dtype`, or split: bfloat16 hi and int8 lo, anchor = hi + lo ulp(hi)/254, 3 bytes and a
    relative error below 1.6e-5.
    """
    if isinstance(dtype, torch.dtype):
        return anchor.detach().to(dtype).contiguous()
    flat = anchor.detach().float().flatten()
    blocks = (flat.numel() + BLOCK - 1) // BLOCK
    padded = torch.zeros(blocks * BLOCK, device=flat.device)
    padded[: flat.numel()] = flat
    hi = padded.to(torch.bfloat16)
    step = (hi.float().view(torch.int32) & 0x7F800000).view(torch.float32) * reference.SPLIT_STEP
    lo = (
        torch.where(step > 0, (padded - hi.float()) / step.clamp_min(1e-45), 0.0)
        .round()
        .clamp(-127, 127)
        .to(torch.int8)
    )
    return torch.cat(
        (hi.view(torch.uint8).view(blocks, 2 * BLOCK), lo.view(torch.uint8).view(blocks, BLOCK)), 1
    ).flatten()


def decode_anchor(anchor: Tensor, shape: torch.Size) -> Tensor:
    return (
        reference.decode_split(anchor, shape.numel()).view(shape)
        if anchor.dtype == torch.uint8
        else anchor
    )


def spec_of(count_shape: torch.Size, dtype: torch.dtype | str) -> mapped.Spec:
    if isinstance(dtype, torch.dtype):
        return dtype, tuple(count_shape)
    return torch.uint8, ((count_shape.numel() + BLOCK - 1) // BLOCK * 3 * BLOCK,)


def encode_for(theta: Tensor, fisher: Tensor, storage: str) -> Stored:
    return (
        Stored(fisher.double().contiguous())
        if theta.dtype == torch.float64
        else encode(fisher, storage)
    )


@dataclass
class Item:
    """A parameter about to be held.

    `make` gives its whole Fisher and whole anchor when its turn comes, so that one is in memory at
    a time.
    """

    name: str
    theta: Tensor
    make: Callable[[], tuple[Tensor, Tensor]]

    def encoded(self, storage: str, dtype: torch.dtype | str | None) -> tuple[Stored, Tensor]:
        fisher, anchor = (dtensor.part_of(t, self.theta) for t in self.make())
        return encode_for(self.theta, fisher, storage), encode_anchor(anchor, self.kind(dtype))

    def kind(self, dtype: torch.dtype | str | None) -> torch.dtype | str:
        return torch.float64 if self.theta.dtype == torch.float64 else dtype or self.theta.dtype

    def specs(self, storage: str, dtype: torch.dtype | str | None) -> dict[str, mapped.Spec]:
        shape = dtensor.local(self.theta.detach()).shape
        wide = self.theta.dtype == torch.float64
        kind = (
            torch.float64
            if wide
            else {"fp32": torch.float32, "bf16": torch.bfloat16, "u8log": torch.uint8}[storage]
        )
        out = {
            f"anchor.{self.name}": spec_of(shape, self.kind(dtype)),
            f"fisher.{self.name}": (kind, tuple(shape)),
        }
        if kind == torch.uint8:
            out[f"scales.{self.name}"] = (torch.float32, ((shape.numel() + BLOCK - 1) // BLOCK, 2))
        return out


class Store:
    """The held parameters by name."""

    def __init__(self, offload: str | None) -> None:
        self.offload = offload
        self.held: dict[str, Held] = {}
        self._file: mapped.Mapped | None = None
        self._stream: Any = None

    def fill(self, items: Sequence[Item], storage: str, dtype: torch.dtype | str | None) -> None:
        """Holds `items`.

        Under offload those on the CPU go to a file of their own in the temporary folder, mapped and
        unlinked.
        """
        to_file = [item for item in items if self.offload and item.theta.device.type == "cpu"]
        for item in items:
            if not (self.offload and item.theta.device.type == "cpu"):
                fisher, anchor = item.encoded(storage, dtype)
                self.held[item.name] = Held(
                    item.name,
                    self._at_home(fisher, item.theta),
                    item.theta,
                    self._home(anchor, item.theta),
                )
        if not to_file:
            return
        specs: dict[str, mapped.Spec] = {}
        for item in to_file:
            specs.update(item.specs(storage, dtype))

        def produce() -> Iterator[tuple[str, Tensor]]:
            for item in to_file:
                fisher, anchor = item.encoded(storage, dtype)
                yield f"anchor.{item.name}", anchor
                yield f"fisher.{item.name}", fisher.values
                if fisher.scales is not None:
                    yield f"scales.{item.name}", fisher.scales

        self._to_file(specs, produce(), {item.name: item.theta for item in to_file})

    def put(self, *held: Held) -> None:
        """Holds parameters whose Fisher and anchor are encoded already."""
        on_file = [h for h in held if self.offload and h.theta.device.type == "cpu"]
        for h in held:
            if not any(h is other for other in on_file):
                self.held[h.name] = Held(
                    h.name, self._at_home(h.fisher, h.theta), h.theta, self._home(h.anchor, h.theta)
                )
        if on_file:
            tensors = {f"anchor.{h.name}": h.anchor for h in on_file} | {
                f"fisher.{h.name}": h.fisher.values for h in on_file
            }
            tensors |= {
                f"scales.{h.name}": h.fisher.scales for h in on_file if h.fisher.scales is not None
            }
            self._to_file(
                {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()},
                tensors.items(),
                {h.name: h.theta for h in on_file},
            )

    def _to_file(
        self,
        specs: dict[str, mapped.Spec],
        tensors: Iterable[tuple[str, Tensor]],
        params: dict[str, Tensor],
    ) -> None:
        handle, path = tempfile.mkstemp(prefix="fasttax-ewc-", suffix=".safetensors")
        os.close(handle)
        try:
            mapped.write_streamed(path, "EWC", specs, {}, tensors)
            self.adopt(mapped.Mapped(path), params)
        finally:
            os.unlink(path)  # the mapping keeps it

    def adopt(self, file: mapped.Mapped, params: dict[str, Tensor]) -> None:
        """Holds `params` by what `file` has for them, without reading it."""
        self._file = file
        for name, theta in params.items():
            scales = file.tensor(f"scales.{name}") if f"scales.{name}" in file else None
            self.held[name] = Held(
                name,
                Stored(file.tensor(f"fisher.{name}"), scales),
                theta,
                file.tensor(f"anchor.{name}"),
            )

    def _home(self, t: Tensor, theta: Tensor) -> Tensor:
        if self.offload is None or theta.device.type == "cpu":
            return t.to(theta.device)
        t = t.cpu()
        return t.pin_memory() if torch.cuda.is_available() else t

    def _at_home(self, fisher: Stored, theta: Tensor) -> Stored:
        return Stored(
            self._home(fisher.values, theta),
            None if fisher.scales is None else self._home(fisher.scales, theta),
        )

    def meshes(self) -> list[dtensor.Key]:
        return list(dict.fromkeys(dtensor.key_of(h.theta) for h in self.held.values()))

    def blocks(
        self, only: Iterable[Tensor] | None = None, frozen: bool = False
    ) -> list[list[Held]]:
        """What one call each takes: by device, mesh and float64 or not.

        Under offload at most STREAMED parameters, in the model's order.
        """
        wanted = None if only is None else {id(p) for p in only}
        groups: dict[Any, list[list[Held]]] = {}
        for h in self.held.values():
            if (h.theta.requires_grad or frozen) and (wanted is None or id(h.theta) in wanted):
                parts = groups.setdefault(
                    (h.theta.device, h.theta.dtype == torch.float64, dtensor.key_of(h.theta)), [[]]
                )
                if (
                    self.offload
                    and parts[-1]
                    and sum(x.count for x in parts[-1]) + h.count > STREAMED
                ):
                    parts.append([])
                parts[-1].append(h)
        return [part for parts in groups.values() for part in parts if part]

    def stream(self, blocks: Sequence[list[Held]]) -> Iterator[Lists]:
        """The blocks on their parameters' device.

        While one is worked on the next is under way (a side stream on a GPU, readahead of the file
        on a CPU), and one that is done with leaves the memory.
        """
        under_way = self.bring(blocks[0]) if blocks else None
        for i, block in enumerate(blocks):
            assert under_way is not None
            here = under_way
            under_way = self.bring(blocks[i + 1]) if i + 1 < len(blocks) else None
            yield self.arrived(here)
            self.leave(block)

    def bring(self, block: list[Held]) -> tuple[Lists, Any]:
        """Starts a block on its way; `arrived` makes it safe to use."""
        device = block[0].theta.device
        if device.type == "cuda" and self.offload:
            self._stream = self._stream or torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                lists = self._lists(block)
                return lists, self._stream.record_event()
        if self._file is not None:
            self._file.prefetch(_names(block))
        return self._lists(block), None

    def arrived(self, brought: tuple[Lists, Any]) -> Lists:
        lists, event = brought
        if event is not None:
            now = torch.cuda.current_stream(lists.params[0].device)
            now.wait_event(event)
            for t in (*lists.anchors, *lists.fishers, *lists.scales):
                t.record_stream(now)
        return lists

    def leave(self, block: list[Held]) -> None:
        if self._file is not None:
            self._file.release(_names(block))

    def _lists(self, block: list[Held]) -> Lists:
        def over(t: Tensor, h: Held) -> Tensor:
            return t if t.device == h.theta.device else t.to(h.theta.device, non_blocking=True)

        empty = torch.empty(0)
        packed = any(h.fisher.scales is not None for h in block)
        scales = (
            [over(empty if h.fisher.scales is None else h.fisher.scales, h) for h in block]
            if packed
            else []
        )
        params = [dtensor.local(h.theta) for h in block]
        return Lists(
            dtensor.key_of(block[0].theta),
            [h.theta for h in block],
            params,
            [over(h.anchor, h) for h in block],
            [over(h.fisher.values, h) for h in block],
            scales,
        )


def _names(block: Iterable[Held]) -> list[str]:
    return [f"{kind}.{h.name}" for h in block for kind in ("anchor", "fisher", "scales")]
