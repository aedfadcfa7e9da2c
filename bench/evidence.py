"""Tables of README and docs/ made of bench/results: `python -m bench.evidence` renews them.

What measures renews them too; tests/package/test_docs.py compares them with the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import gpu_table, marked
from fasttax.demo.methods import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
TABLES = {  # the file in which each stands between its marks
    "bench": "README.md",
    "bench-gpu": "README.md",
    "speed": "docs/speed.md",
    "provenance": "docs/numbers.md",
    "strengths": "docs/choosing.md",
}
MEASURED = ("kl", "linear_kl", "ewc", "fisher", "trainers")  # families with cases for a table
FIRST = (  # the cases that README has, of those of docs/speed.md
    ("token_kl forward+backward, float32", "512 x 49152"),
    ("token_kl forward+backward, bfloat16", "512 x 49152"),
    ("token_stats (logp, entropy, both KLs) forward+backward, bfloat16", "512 x 49152"),
    ("linear_token_kl forward+backward, float32", "512 tokens, 576 -> 49152"),
    ("ewc_add_grad_, float32", "134.5 M parameters"),
    ("AdamWEWC, bf16 Fisher, bfloat16 anchor", "134.5 M parameters"),
    ("exact Fisher of SmolLM2-135M, float32", "batch 8 x 128"),
    ("GRPO step, SmolLM2-135M", "2 x 96"),
)


def read(path: Path) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def threads(count: int) -> str:
    """How many a run had."""
    return f"{count} thread{'s' if count != 1 else ''}"


def ran_on(environment: dict[str, Any]) -> str:
    """Machine, threads, versions, commit and date of a file of results."""
    gpu = f"{environment['gpu']}, " if environment["gpu"] else ""
    return gpu + "{cpu}, {count}, torch {torch}, commit {commit}, {date}".format(
        count=threads(environment["threads"]), **environment
    )


def headlines() -> dict[tuple[str, str], str]:
    """The row of each case that is for a table, by its name and shape."""
    rows = {}
    for report in (read(RESULTS / f"cpu-{family}.json") for family in MEASURED):
        for r in (r for r in report["results"] if r["headline"]):
            peaks = {name: f", {size:.0f} MB" for name, size in r["peak_extra_MB"].items()}
            others = "; ".join(
                f"{name} {r['milliseconds'][name]:.0f} ms ({ratio:.2f}x){peaks.get(name, '')}"
                for name, ratio in r["ratios"].items()
            )
            rows[r["name"], r["shape"]] = (
                f"| {r['name']} | {r['shape']} | {r['milliseconds']['fasttax']:.1f} "
                f"ms{peaks.get('fasttax', '')} | {others} |"
            )
    return rows


def timed(rows: Iterable[str]) -> str:
    """A table of times."""
    heads = "| case | size | fasttax | others (their time over fasttax's) |", "|---|---|---:|---|"
    return "\n".join([*heads, *rows])


def bench() -> str:
    """README's cases, and where they ran."""
    rows = headlines()
    environments = [read(RESULTS / f"cpu-{family}.json")["environment"] for family in MEASURED]
    cpus = " and ".join(dict.fromkeys(environment["cpu"] for environment in environments))
    table = timed(rows[case] for case in FIRST if case in rows)
    return (
        f"{table}\n\n{cpus}, medians of interleaved rounds, written by `make bench`. Every "
        "case, with threads, versions and commits: [docs/speed.md](docs/speed.md)."
    )


def speed() -> str:
    """Every case, and where it ran."""
    environments = [read(RESULTS / f"cpu-{family}.json")["environment"] for family in MEASURED]
    runs = dict.fromkeys(map(ran_on, environments))
    return f"{timed(headlines().values())}\n\nRan on {'; '.join(runs)}."


def provenance() -> str:
    """Each file of bench/results: which command wrote it, when and on what."""
    rows = ["| file | written by | holds | on |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        report = read(path)
        if "results" in report:
            holds = f"{len(report['results'])} cases"
            on = ran_on(report["environment"])
        else:
            holds = f"{len(report['points'])} checkpoints of {len(METHODS) + 1} methods"
            on = f"{report['machine']['cpu']}, {threads(report['machine']['threads'])}"
            on += f", torch {report['versions']['torch']}, {report['started'][:10]}"
        link = f"[{path.name}](../bench/results/{path.name})"
        rows.append(f"| {link} | `{report['command']}` | {holds} | {on} |")
    return "\n".join(rows)


def strengths() -> str:
    """What each strength of each method kept of plain fine-tuning's gain, and cost."""
    report = read(RESULTS / "cpu-tax.json")
    points: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in report["points"]:
        points.setdefault((point["method"], point["label"]), []).append(point)
    rows = [
        "| method | strength | share of the gain | tax, nats a token | KL on general text |",
        "|---|---|---:|---:|---:|",
    ]
    for (method, label), seeds in points.items():
        if method not in METHODS or not METHODS[method].parts:
            continue
        kept = spread([p["share"] for p in seeds], 2)
        tax = spread([p["tax"] for p in seeds], 3)
        kl = spread([p["metrics"]["kl_general"]["mean"] for p in seeds], 3)
        rows.append(f"| {METHODS[method].title} | {label} | {kept} | {tax} | {kl} |")
    count = len({point["seed"] for point in report["points"]})
    return "\n".join(
        [
            *rows,
            "",
            f"Mean ± standard error over {count} training seeds, made by `{report['command']}` "
            f"({report['model']['name']}); all points are in "
            "[cpu-tax.json](../bench/results/cpu-tax.json).",
        ]
    )


def spread(values: list[float], digits: int) -> str:
    """The mean of values and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def tables() -> dict[str, str]:
    """The text between each pair of marks."""
    return {
        "bench": bench(),
        "bench-gpu": gpu_table.table(RESULTS),
        "speed": speed(),
        "provenance": provenance(),
        "strengths": strengths(),
    }


def renew() -> None:
    """Puts every table between its marks."""
    for name, text in tables().items():
        marked.renew(ROOT / TABLES[name], name, text)


if __name__ == "__main__":
    renew()
    sys.exit(0)
