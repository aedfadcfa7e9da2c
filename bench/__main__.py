"""Measures all cases, writes bench/results, and renews the table between README's bench markers.

A family's file is bench/results/cpu-FAMILY.json, the GPU's is gpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    marked,
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
    GPU: bench_gpu.cases,
}


def results_of(family: str) -> Path:
    """The file that a family's results are written to."""
    return RESULTS / ("gpu.json" if family == GPU else f"cpu-{family}.json")


def measure(family: str) -> Path:
    """Runs a family's cases, prints each, and writes them with what they ran on."""
    torch.manual_seed(0)
    rate = timing.bandwidth("cuda" if family == GPU else "cpu")
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
    report = {
        "command": f"python -m bench {family}",
        "environment": timing.environment(rate),
        "results": results,
    }
    target = results_of(family)
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    return target


def table() -> str:
    """README's table, from the results of every family that has been measured."""
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text()) for f in FAMILIES if (path := results_of(f)).exists()
    ]
    rows = [
        "| case | size | fasttax | others, and how many times fasttax's time |",
        "|---|---|---:|---|",
    ]
    for r in (r for report in reports for r in report["results"] if r.get("headline", True)):
        peaks = {name: f", {size:.0f} MB" for name, size in r.get("peak_extra_MB", {}).items()}
        others = ", ".join(
            f"{name} {r['milliseconds'][name]:.0f} ms ({ratio:.2f}x){peaks.get(name, '')}"
            for name, ratio in r["ratios"].items()
        )
        rows.append(
            f"| {r['name']} | {r['shape']} | {r['milliseconds']['fasttax']:.1f} "
            f"ms{peaks.get('fasttax', '')} | {others} |"
        )
    machines = [
        {
            **report["environment"],
            "cpu": report["environment"].get("gpu") or report["environment"]["cpu"],
        }
        for report in reports
    ]
    runs = dict.fromkeys(
        "{cpu}, {threads} threads, torch {torch}, commit {commit}, {date}".format(**machine)
        for machine in machines
    )
    return "\n".join(
        [
            *rows,
            "",
            f"{'; '.join(runs)}. Medians of interleaved rounds, written by `make bench`; all cases "
            "in `bench/results`.",
        ]
    )


def renew_readme() -> None:
    """Puts `table` between README's marks."""
    marked.renew(ROOT / "README.md", "bench", table())


def main() -> int:
    """Measures the families asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "family", nargs="*", help=f"some of {', '.join(FAMILIES)} (default: all but {GPU})"
    )
    families = parser.parse_args().family or [family for family in FAMILIES if family != GPU]
    unknown = set(families) - set(FAMILIES)
    if unknown:
        parser.error(
            f"unknown family {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}"
        )
    if GPU in families and not torch.cuda.is_available():
        parser.error(f"{GPU} needs a GPU, and torch sees none")
    if len(families) == 1:
        print(measure(families[0]))
    else:
        # a process each: what one family leaves in the heap makes the next one's allocations
        # cheaper
        for family in families:
            subprocess.run([sys.executable, "-m", "bench", family], check=True, cwd=ROOT)
    renew_readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
