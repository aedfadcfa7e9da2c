"""Tables of docs/ that are made of bench/results: `python -m bench.evidence` renews them.

What measures renews them too; tests/package/test_docs.py compares them with the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import marked
from fasttax.demo.methods import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
TABLES = {"provenance": "docs/numbers.md", "strengths": "docs/choosing.md"}


def read(path: Path) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def provenance() -> str:
    """Each file of bench/results: which command wrote it, when and on what."""
    rows = ["| file | written by | holds | on |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        report = read(path)
        if "results" in report:
            holds = f"{len(report['results'])} cases"
            on = "{cpu}, {threads} threads, torch {torch}, commit {commit}, {date}"
            on = on.format(**report["environment"])
            if report["environment"]["gpu"]:
                on = f"{report['environment']['gpu']}, {on}"
        else:
            holds = f"{len(report['points'])} checkpoints of {len(METHODS) + 1} methods"
            on = "{cpu}, {threads} threads".format(**report["machine"])
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
    return {"provenance": provenance(), "strengths": strengths()}


def renew() -> None:
    """Puts every table between its marks."""
    for name, text in tables().items():
        marked.renew(ROOT / TABLES[name], name, text)


if __name__ == "__main__":
    renew()
    sys.exit(0)
