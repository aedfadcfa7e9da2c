"""The only timing code of benchmarks: contenders in turns, medians, the machine's bandwidth.

A shared machine drifts by tens of percent within a minute, so times of different runs do not
compare, nor do those of torch.utils.benchmark, whose timers measure one contender after the other.
Here contenders take turns, round after round; a ratio is the median of the rounds' ratios; the
floor is what the case's bytes cost at the bandwidth that a large copy reached in the same run.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass
class Case:
    """One row of a table: named contenders, of which the last is fasttax's.

    The floors are the least bytes and flops that the task needs.
    """

    name: str
    shape: str
    contenders: dict[str, Callable[[], Any]]
    floor_bytes: float
    floor_flops: float = 0.0
    rounds: int = 7
    headline: bool = True  # in docs/speed.md; bench/results has all
    memory: bool = False  # also measure what each contender allocates at its peak


@dataclass
class Result:
    """What was measured of a case: medians over its rounds."""

    name: str
    shape: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]  # contender's time over fasttax's, median over rounds
    floor_bytes: float
    floor_flops: float
    share_of_bandwidth_floor: float
    rounds: int
    extra: dict[str, float] = field(default_factory=dict)
    headline: bool = True
    peak_extra_MB: dict[str, float] = field(default_factory=dict)


def now() -> float:
    """Seconds, after all that was started has ended."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device: str = "cpu") -> float:
    """Bytes/s of copying 512 MB (read + write), best of five."""
    source, target = torch.ones(1 << 27, device=device), torch.empty(1 << 27, device=device)
    best = 0.0
    for _ in range(5):
        begin = now()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (now() - begin))
    return best


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once for `call`, over what it held before.

    Inputs are not in it, gradients are. Every allocation and release is in the profiler's trace, so
    the number is the same in every run; RSS is not, and has freed pages in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no warnings of missing GPUs
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = accumulate(
        e["args"]["Bytes"]
        for e in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    )
    return max(held, default=0)


def run(case: Case, bytes_per_second: float) -> Result:
    """Times a case's contenders in turns.

    Args:
        case: every contender is called twice before the first round.
        bytes_per_second: what a large copy reached in this run.
    """
    names = list(case.contenders)
    for call in case.contenders.values():  # warm-up: compilation, caches, page tables
        call()
        call()
    times = _times(case)
    ours = times[names[-1]]
    ratios = {
        name: median(t / o for t, o in zip(times[name], ours, strict=True)) for name in names[:-1]
    }
    peaks = {}
    if case.memory:
        peaks = {name: peak_extra_bytes(call) / 1e6 for name, call in case.contenders.items()}
    return Result(
        name=case.name,
        shape=case.shape,
        milliseconds={name: 1e3 * median(values) for name, values in times.items()},
        ratios=ratios,
        floor_bytes=case.floor_bytes,
        floor_flops=case.floor_flops,
        share_of_bandwidth_floor=case.floor_bytes / bytes_per_second / median(ours),
        rounds=case.rounds,
        headline=case.headline,
        peak_extra_MB=peaks,
    )


def _times(case: Case) -> dict[str, list[float]]:
    """Seconds by contender, a number a round; the garbage collector waits."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    order = list(case.contenders)
    gc.collect()
    gc.disable()
    try:
        for _ in range(case.rounds):
            for name in order:
                begin = now()
                result = case.contenders[name]()
                times[name].append(now() - begin)
                del result
            # what one leaves in caches and heap meets another in the next round
            order.reverse()
    finally:
        gc.enable()
    return times
