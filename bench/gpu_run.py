"""Runs GPU cases within a budget of time: contenders in turns, and what is absent said."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.gpu_clock import Clock, Rates

BUDGET = 390.0  # seconds: `make bench-gpu` in 7 minutes, with torch's start and the rates
FEWEST, MOST = 3, 15  # rounds
OURS = "fasttax"


@dataclass
class GpuCase:
    """One row: contenders by name, the last of which is fasttax's, and the least that it takes."""

    contenders: dict[str, Callable[[], Any]]
    floor_bytes: float
    floor_flops: float = 0.0
    dtype: str = "bfloat16"  # of the products that floor_flops are
    absent: dict[str, str] = field(default_factory=dict)  # contender -> why


@dataclass(frozen=True)
class Spec:
    """A case before its tensors are made."""

    name: str
    shape: str
    make: Callable[[], GpuCase]
    headline: bool = True  # in README's table of the GPU


@dataclass
class GpuResult:
    """What was measured of a case: medians over its rounds."""

    name: str
    shape: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]  # contender's time over fasttax's, median over rounds
    floor_bytes: float
    floor_flops: float
    bound: str  # which of the two floors is the higher: "copy" or "product"
    share: float  # of that rate, which the device reached in this run
    absent: dict[str, str]
    rounds: int
    headline: bool


@dataclass
class Report:
    """All results, and the cases that the budget or the device left out, with the reason."""

    results: list[GpuResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def run_all(
    specs: Sequence[Spec],
    clock: Clock,
    rate: Rates,
    budget: float = BUDGET,
    say: Callable[[str], None] = print,
) -> Report:
    """The cases in their order, most important first: each has an even part of the time left."""
    report = Report()
    end = clock.wall() + budget
    for i, spec in enumerate(specs):
        left = end - clock.wall()
        title = f"{spec.name}, {spec.shape}"
        if left <= 0:
            report.left_out[title] = f"the budget of {budget:.0f} s was used up"
            continue
        try:
            # twice the even part: cases differ, and what one leaves is the next ones'
            result = measure(spec, clock, rate, min(left, 2 * left / (len(specs) - i)))
        except torch.OutOfMemoryError as error:
            report.left_out[title] = _first_line(error)
            continue
        finally:
            gc.collect()
        report.results.append(result)
        say(line(result))
    for title, why in report.left_out.items():
        say(f"left out: {title}: {why}")
    return report


def measure(spec: Spec, clock: Clock, rate: Rates, seconds: float) -> GpuResult:
    """One case, in about so many seconds."""
    case = spec.make()
    assert list(case.contenders)[-1] == OURS, spec.name
    begin = clock.wall()
    calls, absent = {}, dict(case.absent)
    for name, call in case.contenders.items():
        if name == OURS:
            _warm(call, clock)
        else:
            why = _warmed(call, clock)
            if why:
                absent[name] = why
                continue
        calls[name] = call
    once = sum(clock.seconds(call) for call in calls.values())
    left = seconds - (clock.wall() - begin)
    rounds = int(max(FEWEST, min(MOST, left / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for names in _turns(list(calls), rounds):
        for name in names:
            times[name].append(clock.seconds(calls[name]))
    ours = times[OURS]
    taken = median(ours)
    by_bytes, by_flops = case.floor_bytes / rate.copy, case.floor_flops / rate.products[case.dtype]
    return GpuResult(
        name=spec.name,
        shape=spec.shape,
        milliseconds={name: 1e3 * median(values) for name, values in times.items()},
        ratios={
            name: median(t / o for t, o in zip(values, ours, strict=True))
            for name, values in times.items()
            if name != OURS
        },
        floor_bytes=case.floor_bytes,
        floor_flops=case.floor_flops,
        bound="product" if by_flops > by_bytes else "copy",
        share=max(by_bytes, by_flops) / taken,
        absent=absent,
        rounds=rounds,
        headline=spec.headline,
    )


def _turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Forwards and backwards: what one leaves behind meets another in the next round."""
    for i in range(rounds):
        yield names if i % 2 == 0 else names[::-1]


def _warm(call: Callable[[], Any], clock: Clock) -> None:
    for _ in range(3):  # compilation, the allocator, clocks
        clock.seconds(call)


def _warmed(call: Callable[[], Any], clock: Clock) -> str:
    """Why a peer does not run here, or ""; that is no failure of the benchmark."""
    try:
        _warm(call, clock)
    except Exception as error:  # noqa: BLE001 (said beside the case)
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def line(result: GpuResult) -> str:
    """A result as it is printed."""
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result.ratios.items())
    absent = "".join(f"; no {name}: {why}" for name, why in result.absent.items())
    rate = {"copy": "copy bandwidth", "product": "GEMM rate"}[result.bound]
    return (
        f"{result.name}, {result.shape}: {result.milliseconds[OURS]:.3f} ms; {ratios or 'alone'}; "
        f"{100 * result.share:.0f} % of the measured {rate}{absent}"
    )
