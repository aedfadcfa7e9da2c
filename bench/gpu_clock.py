"""What times a call on a GPU, and how fast that GPU copies and multiplies.

A `Clock` is all that the benchmark asks of a device, so that everything but the time itself runs on
a CPU too (`python -m bench gpu --dry-run`, and the tests).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
FLUSHED = 256 << 20  # bytes: five times an H100's L2, twice a B200's


class Clock(Protocol):
    """A device that measures."""

    name: str
    device: torch.device

    def seconds(self, call: Call) -> float:
        """How long the device works on one call that finds nothing of its data in caches."""

    def wall(self) -> float:
        """Seconds on the host, for the budget."""


class CudaClock:
    """Events on the device's stream, with its L2 written over before each call.

    The writes take about a millisecond, in which the host queues the call: what is measured is the
    device's work, and the host's only where it is slower than that.
    """

    WRITES = 8

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.name = torch.cuda.get_device_name()
        self._flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=self.device)

    def seconds(self, call: Call) -> float:
        """Between two events, in seconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.WRITES):
            self._flushed.zero_()
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3

    def wall(self) -> float:
        """After all that was started has ended."""
        torch.cuda.synchronize()
        return time.perf_counter()


class DryClock:
    """The CPU's own time, for runs that show that the benchmark itself works."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = "dry run"

    def seconds(self, call: Call) -> float:
        """By the host's clock; nothing is cold."""
        begin = time.perf_counter()
        call()
        return max(time.perf_counter() - begin, 1e-9)

    def wall(self) -> float:
        """The host's clock."""
        return time.perf_counter()


@dataclass(frozen=True)
class Rates:
    """What the device reached in this run, which shares are of."""

    copy: float  # bytes/s, read and written
    products: dict[str, float]  # flops/s by dtype


def rates(clock: Clock, copied: int = 1 << 30, side: int = 8192) -> Rates:
    """The best of five copies of so many bytes, and of three products side x side x side."""
    source = torch.ones(copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = max(2 * copied / clock.seconds(lambda: target.copy_(source)) for _ in range(5))
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(side, side, dtype=dtype, device=clock.device)
        taken = [clock.seconds(lambda a=a: a @ a) for _ in range(4)]  # type: ignore[misc]
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(taken[1:])
    return Rates(copy, products)
