"""Where EWC keeps Fisher and anchor, and how they come to the parameters' device.

They lie beside the parameters, in pinned host memory, or in a memory-mapped file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, dtensor, mapped, packed, placed
from fasttax._base.packed import Stored

ANCHORS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALUES = {**packed.FLOATS, "u8log": torch.uint8}  # the dtype of a Fisher's values by storage
# parameters that come over at once: 128 MB in float32, and as much again under way
STREAMED = 1 << 24


@dataclass
class Entry:
    """What is held of a parameter, or of a weight that LoRA moves.

    Its name without what wrappers insert, and its Fisher as stored.
    """

    name: str
    fisher: Stored


@dataclass
class Held(Entry):
    """One held parameter: the model's own tensor with its Fisher and anchor as stored.

    Of a sharded parameter these are this rank's part.
    """

    theta: Tensor
    anchor: Tensor

    @property
    def count(self) -> int:
        """How many numbers are held."""
        return self.fisher.values.numel()

    def decoded_anchor(self) -> Tensor:
        """The anchor as floats, of the parameter's (local) shape."""
        return packed.decode_anchor(self.anchor, self.fisher.values.shape)

    def follow(self) -> None:
        """Goes where the parameter has gone since, for good: trainers move their models."""
        device = self.theta.device
        if has_moved(self.anchor, device):
            with torch.inference_mode(False):  # an evaluation's copies would take no gradient later
                self.anchor, self.fisher = self.anchor.to(device), self.fisher.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it."""
        return {f"anchor.{self.name}": self.anchor, **self.fisher.tensors(self.name)}


@dataclass
class Lists:
    """What one call of an op takes, on the parameters' device."""

    key: dtensor.Key
    owners: list[Tensor]  # the model's parameters; `params` are this rank's parts of them
    params: list[Tensor]
    anchors: list[Tensor]
    fishers: list[Tensor]
    scales: list[Tensor]  # u8log's, one for each Fisher (empty where it is floats), or none at all


def has_moved(t: Tensor, device: torch.device) -> bool:
    """Whether `device`, a parameter's, is another one than that of what is held of it.

    A parameter that lies nowhere (meta, as Accelerate leaves those that it offloads) takes nothing
    along.
    """
    return t.device != device and device.type != "meta"


def checked_anchor_dtype(op: str, value: Any) -> torch.dtype | str | None:
    """None (each parameter's own), a torch.dtype, or "bf16+8"."""
    if value is None or value == packed.SPLIT or value in checks.FLOATS:
        return value
    if isinstance(value, str) and value in ANCHORS:
        return ANCHORS[value]
    raise checks.fail(
        op,
        "anchor_dtype",
        f"None, a floating-point torch.dtype, 'fp32', 'bf16', 'fp16' or {packed.SPLIT!r}",
        repr(value),
    )


def encode_for(theta: Tensor, fisher: Tensor, storage: str) -> Stored:
    """The Fisher in `storage`, that of a float64 parameter in float64."""
    if theta.dtype == torch.float64:
        return Stored(fisher.double().contiguous())
    return packed.encode(fisher, storage)


@dataclass
class Item:
    """A parameter about to be held.

    `make` gives its whole Fisher and whole anchor when its turn comes, so that one of each is in
    memory at a time.
    """

    name: str
    theta: Tensor
    make: Callable[[], tuple[Tensor, Tensor]]

    def held(self, storage: str, dtype: torch.dtype | str | None) -> Held:
        """This rank's part, encoded."""
        fisher, anchor = (dtensor.part_of(t, self.theta) for t in self.make())
        stored = encode_for(self.theta, fisher, storage)
        encoded = packed.encode_anchor(anchor, self._anchor_dtype(dtype))
        return Held(self.name, stored, self.theta, encoded)

    def specs(self, storage: str, dtype: torch.dtype | str | None) -> dict[str, mapped.Spec]:
        """What `held(...).tensors()` will be."""
        shape = dtensor.local(self.theta.detach()).shape
        wide = self.theta.dtype == torch.float64
        values = torch.float64 if wide else VALUES[storage]
        return {
            f"anchor.{self.name}": packed.anchor_spec(shape, self._anchor_dtype(dtype)),
            **packed.fisher_specs(self.name, shape, values),
        }

    def _anchor_dtype(self, dtype: torch.dtype | str | None) -> torch.dtype | str:
        wide = self.theta.dtype == torch.float64
        return self.theta.dtype if wide or dtype is None else dtype


class Store:
    """The held parameters by name; `file` is the one that they are mapped from, if any."""

    def __init__(self, offload: str | None) -> None:
        self.offload = offload
        self.held: dict[str, Held] = {}
        self.file: mapped.Mapped | None = None
        self._stream: Any = None

    # --- what goes in ------------------------------------------------------------------------

    def fill(self, items: Sequence[Item], storage: str, dtype: torch.dtype | str | None) -> None:
        """Holds `items`.

        Under offload those on the CPU go to a file of their own in the temporary folder, mapped and
        unlinked.
        """
        on_file = [item for item in items if self._goes_to_file(item.theta)]
        for item in items:
            if not self._goes_to_file(item.theta):
                self._keep(item.held(storage, dtype))
        if on_file:
            specs: dict[str, mapped.Spec] = {}
            for item in on_file:
                specs |= item.specs(storage, dtype)
            held = (item.held(storage, dtype) for item in on_file)
            self._to_file(specs, held, {item.name: item.theta for item in on_file})

    def put(self, held: Sequence[Held]) -> None:
        """Holds parameters whose Fisher and anchor are encoded already, as `fill` does."""
        on_file = [h for h in held if self._goes_to_file(h.theta)]
        for h in held:
            if not self._goes_to_file(h.theta):
                self._keep(h)
        if on_file:
            tensors = [item for h in on_file for item in h.tensors().items()]
            specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors}
            self._to_file(specs, on_file, {h.name: h.theta for h in on_file})

    def adopt(self, file: mapped.Mapped, params: dict[str, Tensor]) -> None:
        """Holds `params` by what `file` has for them, without reading it."""
        self.file = file
        for name, theta in params.items():
            scales = file.tensor(f"scales.{name}") if f"scales.{name}" in file else None
            stored = Stored(file.tensor(f"fisher.{name}"), scales)
            self.held[name] = Held(name, stored, theta, file.tensor(f"anchor.{name}"))

    def over(self, copies: Mapping[int, Tensor]) -> Store:
        """The same Fishers and anchors over other parameters, by the ids of those held here."""
        twin = Store(self.offload)
        twin.file = self.file
        for name, h in self.held.items():
            twin.held[name] = Held(name, h.fisher, copies[id(h.theta)], h.anchor)
        return twin

    def _goes_to_file(self, theta: Tensor) -> bool:
        return self.offload is not None and theta.device.type == "cpu"

    def _keep(self, h: Held) -> None:
        values, scales = h.fisher.values, h.fisher.scales
        ranges = scales if scales is None else self._home(scales, h.theta)
        stored = Stored(self._home(values, h.theta), ranges)
        self.held[h.name] = Held(h.name, stored, h.theta, self._home(h.anchor, h.theta))

    def _home(self, t: Tensor, theta: Tensor) -> Tensor:
        if self.offload is None:
            return t.to(theta.device)
        t = t.cpu()
        return t.pin_memory() if torch.cuda.is_available() else t

    def _to_file(
        self, specs: dict[str, mapped.Spec], held: Iterable[Held], params: dict[str, Tensor]
    ) -> None:
        tensors = (item for h in held for item in h.tensors().items())
        # without a name, so that a killed process leaves none; the mapping keeps it
        with tempfile.TemporaryFile(prefix="fasttax-ewc-") as file:
            where = f"{tempfile.gettempdir()} (offload='cpu')"
            with placed.told(where):
                mapped.write_into(file, "EWC", specs, {}, tensors)
            file.seek(0)
            self.adopt(mapped.Mapped(mapped.TensorFile(where, file)), params)

    # --- what comes out ----------------------------------------------------------------------

    def meshes(self) -> list[dtensor.Key]:
        """What the held parameters are sharded over, in an order that all ranks share."""
        return list(dict.fromkeys(dtensor.key_of(h.theta) for h in self.held.values()))

    def blocks(
        self, only: Iterable[Tensor] | None = None, frozen: bool = False
    ) -> list[list[Held]]:
        """What one call each takes: by device, mesh and float64 or not.

        Under offload at most STREAMED parameters, in the model's order. Frozen parameters are left
        out unless `frozen` asks for them, and all but `only` where that is given.
        """
        wanted = None if only is None else {id(p) for p in only}
        groups: dict[Any, list[list[Held]]] = {}
        for h in self.held.values():
            if wanted is not None and id(h.theta) not in wanted:
                continue
            if h.theta.requires_grad or frozen:
                wide = h.theta.dtype == torch.float64
                group = (h.theta.device, wide, dtensor.key_of(h.theta))
                blocks = groups.setdefault(group, [[]])
                if self._is_full(blocks[-1], h):
                    blocks.append([])
                blocks[-1].append(h)
        return [block for blocks in groups.values() for block in blocks]

    def _is_full(self, block: list[Held], more: Held) -> bool:
        if self.offload is None or not block:
            return False
        return sum(h.count for h in block) + more.count > STREAMED

    def stream(self, blocks: Sequence[list[Held]]) -> Iterator[Lists]:
        """The blocks on their parameters' device.

        While one is worked on the next is under way (a side stream on a GPU, readahead of the file
        on a CPU), and one that is done with leaves the memory.

        Yields:
            Each block's lists, in order.
        """
        under_way = [self.bring(block) for block in blocks[:1]]
        for i, block in enumerate(blocks):
            here = under_way.pop()
            under_way += [self.bring(following) for following in blocks[i + 1 : i + 2]]
            yield self.arrived(here)
            self.leave(block)

    def bring(self, block: list[Held]) -> tuple[Lists, Any]:
        """Starts a block on its way; `arrived` makes it safe to use."""
        device = block[0].theta.device
        if device.type == "cuda" and self.offload:
            self._stream = self._stream or torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                lists = _lists(block)
                return lists, self._stream.record_event()
        if self.offload is None:
            for h in block:
                h.follow()
        if self.file is not None:
            self.file.prefetch(_names(block))
        return _lists(block), None

    def arrived(self, brought: tuple[Lists, Any]) -> Lists:
        """What `bring` gave, once its copies are ordered before the work of the current stream."""
        lists, event = brought
        if event is not None:
            current = torch.cuda.current_stream(lists.params[0].device)
            current.wait_event(event)
            for t in (*lists.anchors, *lists.fishers, *lists.scales):
                t.record_stream(current)
        return lists

    def leave(self, block: list[Held]) -> None:
        """Drops a block's pages of the file from memory."""
        if self.file is not None:
            self.file.release(_names(block))


def _lists(block: list[Held]) -> Lists:
    device = block[0].theta.device

    def over(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [t.to(device, non_blocking=True) for t in tensors]

    scales = [h.fisher.scales for h in block]
    empty = torch.empty(0, dtype=torch.float32, device=device)
    some = any(s is not None for s in scales)
    return Lists(
        key=dtensor.key_of(block[0].theta),
        owners=[h.theta for h in block],
        params=[dtensor.local(h.theta) for h in block],
        anchors=over(h.anchor for h in block),
        fishers=over(h.fisher.values for h in block),
        scales=over(empty if s is None else s for s in scales if some),
    )


def _names(block: Iterable[Held]) -> list[str]:
    return [f"{kind}.{h.name}" for h in block for kind in ("anchor", "fisher", "scales")]
