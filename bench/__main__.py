"""Measures all cases, writes bench/results, and renews the tables that are made of it.

A family's file is bench/results/cpu-FAMILY.json, of the CPU that ran it last; those of a CPU of
another make stay beside it, as cpu-FAMILY-intel.json. `python -m bench gpu` has a table of its own,
a budget of time, and writes bench/results/<gpu>.json; with --dry-run it runs small cases on the
CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import (
    bench_ewc,
    bench_fisher,
    bench_gpu,
    bench_kinds,
    bench_kl,
    bench_linear_kl,
    bench_trainers,
    evidence,
    gpu_clock,
    gpu_run,
    gpu_table,
    timing,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
GPU = "gpu"
FAMILIES: dict[str, Callable[[], Iterator[timing.Case]]] = {
    "kl": bench_kl.cases,
    "kinds": bench_kinds.cases,
    "linear_kl": bench_linear_kl.cases,
    "ewc": bench_ewc.cases,
    "fisher": bench_fisher.cases,
    "trainers": bench_trainers.cases,
}


def results_of(family: str) -> Path:
    """The file that a family's results are written to."""
    return RESULTS / f"cpu-{family}.json"


def make_of(cpu: str) -> str:
    """Who made it, as a file's name has that: "AMD EPYC" is of amd."""
    found = re.match("[a-z0-9]+", cpu.lower())
    return found[0] if found else "other"


def set_aside(target: Path, cpu: str) -> None:
    """Results that a CPU of another make than this one left in `target` get its maker's name."""
    if target.exists():
        before = make_of(json.loads(target.read_text())["environment"]["cpu"])
        if before != make_of(cpu):
            target.rename(target.with_stem(f"{target.stem}-{before}"))
    target.with_stem(f"{target.stem}-{make_of(cpu)}").unlink(missing_ok=True)


def measure(family: str) -> Path:
    """Runs a family's cases, prints each, and writes them with what they ran on."""
    torch.manual_seed(0)
    rate = timing.bandwidth()
    results = []
    for case in tqdm(FAMILIES[family](), desc=family, unit="case"):
        result = timing.run(case, rate)
        results.append(timing.as_json(result))
        ratios = ", ".join(f"{k} {v:.2f}x" for k, v in result.ratios.items())
        share = f"{100 * result.share_of_bandwidth_floor:.0f} % of the bandwidth floor"
        peaks = "".join(
            f"; {name} {size:.0f} MB at its peak" for name, size in result.peak_extra_MB.items()
        )
        tqdm.write(
            f"{result.name}, {result.shape}: {result.milliseconds['fasttax']:.1f} ms; {ratios}; "
            f"{share}{peaks}"
        )
    environment = timing.environment(rate)
    report = {
        "command": f"python -m bench {family}",
        "environment": environment,
        "results": results,
    }
    target = results_of(family)
    RESULTS.mkdir(exist_ok=True)
    set_aside(target, environment["cpu"])
    target.write_text(json.dumps(report, indent=1) + "\n")
    return target


def measure_gpu(dry: bool, budget: float, folder: Path) -> Path:
    """Runs the GPU's cases within `budget` seconds and writes them to `folder`."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    clock: gpu_clock.Clock
    if dry:
        clock, sizes, copied, side = gpu_clock.DryClock(), bench_gpu.TINY, 1 << 20, 64
    else:
        clock, sizes, copied, side = gpu_clock.CudaClock(), bench_gpu.Sizes(), 1 << 30, 8192
    rates = gpu_clock.rates(clock, copied, side)
    specs = bench_gpu.specs(clock.device, sizes)
    report = gpu_run.run_all(specs, clock, rates, budget - (time.perf_counter() - begin))
    written = {
        "command": "python -m bench gpu",
        "environment": timing.environment(rates.copy),
        "rates": asdict(rates),
        "results": [timing.as_json(result) for result in report.results],
        "left_out": report.left_out,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{gpu_table.slug(clock.name)}.json"
    target.write_text(json.dumps(written, indent=1) + "\n")
    return target


def main() -> int:
    """Measures the families asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "family", nargs="*", help=f"some of {', '.join(FAMILIES)} (default: all of them); or {GPU}"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"{GPU}: small cases on the CPU, written to a temporary folder and not to README",
    )
    parser.add_argument(
        "--budget", type=float, default=gpu_run.BUDGET, help=f"{GPU}: seconds it may take"
    )
    given = parser.parse_args()
    families = given.family or list(FAMILIES)
    unknown = set(families) - {*FAMILIES, GPU}
    if unknown:
        parser.error(
            f"unknown family {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}, {GPU}"
        )
    if given.dry_run:
        if families != [GPU]:
            parser.error(f"--dry-run is of {GPU} alone")
        with tempfile.TemporaryDirectory() as folder:
            print(measure_gpu(True, given.budget, Path(folder)).read_text())
        return 0
    if GPU in families and not torch.cuda.is_available():
        parser.error(
            f"{GPU} needs a GPU, and torch sees none; `python -m bench {GPU} --dry-run` runs small "
            "cases on the CPU"
        )
    if families == [GPU]:
        print(measure_gpu(False, given.budget, RESULTS))
    elif len(families) == 1:
        print(measure(families[0]))
    else:
        # a process each: what one family leaves in the heap makes the next one's allocations
        # cheaper
        for family in families:
            subprocess.run([sys.executable, "-m", "bench", family], check=True, cwd=ROOT)
    evidence.renew()
    return 0


if __name__ == "__main__":
    sys.exit(main())
