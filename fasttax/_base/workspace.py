"""Memory on the CPU that one call leaves to the next.

A fresh page costs more than the arithmetic on it (2.8 us on a virtual machine, 35 ms for 50 MB),
and glibc gives all that is larger than 32 MB back after every use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

KEPT_BYTES = 112 << 20  # at most, until the process ends
LINE = 64


class Workspace:
    """At most one piece of memory that nobody uses; calls at the same time get one each."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @property
    def holds(self) -> int:
        """Bytes that no call uses."""
        return sum(memory.numel() for memory in self._free)

    @contextmanager
    def lent(self, wanted: Sequence[tuple[int, torch.dtype]]) -> Iterator[list[Tensor]]:
        """Flat tensors of so many entries of a dtype each, of any contents, for this context."""
        sizes = [-(-count * dtype.itemsize // LINE) * LINE for count, dtype in wanted]
        memory = self._taken(sum(sizes))
        parts = memory[: sum(sizes)].split(sizes)
        try:
            yield [
                part[: count * dtype.itemsize].view(dtype)
                for part, (count, dtype) in zip(parts, wanted, strict=True)
            ]
        finally:
            if type(memory) is Tensor and memory.numel() <= KEPT_BYTES and not self._free:
                self._free.append(memory)

    def _taken(self, size: int) -> Tensor:
        # under FakeTensorMode and its kin what lies here, and what is made there, would meet
        # tensors of the other sort
        plain = type(torch.empty(0, device="cpu")) is Tensor
        try:
            memory = self._free.pop() if plain else None
        except IndexError:
            memory = None
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):  # where it may be written to in every mode
                memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return memory
