"""Measures all cases, writes bench/results/cpu.json, and renews the table between README's bench markers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from bench import bench_ewc, bench_fisher, bench_kl, timing

ROOT = Path(__file__).parent.parent
FAMILIES: dict[str, Callable[[], Iterator[timing.Case]]] = {"kl": bench_kl.cases, "ewc": bench_ewc.cases, "fisher": bench_fisher.cases}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(report: dict[str, object]) -> str:
    env = report["environment"]
    assert isinstance(env, dict)
    rows = ["| case | size | fasttax | others, and how many times fasttax's time |", "|---|---|---:|---|"]
    results = report["results"]
    assert isinstance(results, list)
    for r in results:
        others = ", ".join(f"{name} {r['milliseconds'][name]:.0f} ms ({ratio:.2f}x)" for name, ratio in r["ratios"].items())
        rows.append(f"| {r['name']} | {r['shape']} | {r['milliseconds']['fasttax']:.1f} ms | {others} |")
    machine = f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}, {env['date']}"
    rows.append(f"\n{machine}; medians of interleaved rounds, written by `make bench`.")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"some of {', '.join(FAMILIES)} (default: all, and README is renewed)")
    args = parser.parse_args()
    unknown = set(args.family) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    rate = timing.bandwidth()
    results = []
    for name in args.family or FAMILIES:
        for case in tqdm(FAMILIES[name](), desc=name, unit="case"):
            result = timing.run(case, rate)
            results.append(timing.as_json(result))
            ratios = ", ".join(f"{k} {v:.2f}x" for k, v in result.ratios.items())
            share = f"{100 * result.share_of_bandwidth_floor:.0f} % of the bandwidth floor"
            tqdm.write(f"{result.name}, {result.shape}: {result.milliseconds['fasttax']:.1f} ms; {ratios}; {share}")
    report: dict[str, object] = {"command": " ".join(["python -m bench", *args.family]), "environment": timing.environment(rate), "results": results}
    target = ROOT / "bench" / "results" / ("cpu.json" if not args.family else f"cpu-{'-'.join(args.family)}.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    if not args.family:
        readme = ROOT / "README.md"
        text = readme.read_text()
        head, tail = text.index(BEGIN) + len(BEGIN), text.index(END)
        readme.write_text(f"{text[:head]}\n{table(report)}\n{text[tail:]}")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
