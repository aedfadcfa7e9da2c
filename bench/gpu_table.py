"""README's table of the GPU: what is predicted, and what `make bench-gpu` has measured."""

from __future__ import annotations

import json
import re
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from bench import workloads

ROOT = Path(__file__).parent.parent
_V = workloads.GPU_KL[0]
_P = workloads.GPU_PARAMETERS[0]
_ENTRIES, _COUNT = _V[1] * _V[2], sum(prod(shape) for shape in _P[1])
# case, size, the bytes that it must move, and the op of docs/machine-code.md that it is
ROWS = (
    ("token_kl forward only, bfloat16", _V[0], 4.0 * _ENTRIES, "forward, bfloat16"),
    ("token_kl forward+backward, bfloat16", _V[0], 6.0 * _ENTRIES, "both, bfloat16"),
    ("ewc_add_grad_, float32", _P[0], 20.0 * _COUNT, "EWC add_grad_, float32"),
    ("AdamWEWC, float32", _P[0], 36.0 * _COUNT, "AdamW with EWC, float32"),
)


@cache
def bandwidths() -> dict[str, dict[str, float]]:
    """Bytes/s by GPU and op, as `make machine-code` predicts them of the kernels' machine code."""
    text = (ROOT / "docs" / "machine-code.md").read_text().split("## Bandwidth")[1]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (_, *gpus), _, *rows = lines
    return {
        gpu: {op: 1e12 * float(cells[i].split()[0]) for op, *cells in rows}
        for i, gpu in enumerate(gpus)
    }


def slug(name: str) -> str:
    """A GPU's name as a file's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def reports(folder: Path) -> list[dict[str, Any]]:
    """What has been measured: the files of bench/results that are of GPUs."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        report for report in found if report.get("command", "").startswith("python -m bench gpu")
    ]


def predicted_milliseconds(floor_bytes: float, op: str, gpu: str) -> float:
    """The least bytes at the predicted bandwidth."""
    return 1e3 * floor_bytes / bandwidths()[gpu][op]


def prediction() -> list[str]:
    """The table's lines where nothing is measured."""
    gpus = list(bandwidths())
    heads = " | ".join(f"{gpu}, predicted" for gpu in gpus)
    lines = [f"| case | size | {heads} | measured |", f"|---|---|{'---:|' * (len(gpus) + 1)}"]
    for name, size, floor, op in ROWS:
        cells = " | ".join(f"{predicted_milliseconds(floor, op, gpu):.2f} ms" for gpu in gpus)
        lines.append(f"| {name} | {size} | {cells} | not yet |")
    return [
        *lines,
        "",
        "Predicted, not measured: no GPU has run `make bench-gpu` yet. The least bytes of a case "
        "over the bandwidth that [the machine code](docs/machine-code.md) allows.",
    ]


def measured(report: dict[str, Any]) -> list[str]:
    """One GPU's lines."""
    name, rates = report["environment"]["gpu"], report["rates"]
    lines = [
        f"| case, on {name} | size | fasttax | share | predicted | others, times fasttax's time |",
        "|---|---|---:|---:|---:|---|",
    ]
    known = {(case, size): (floor, op) for case, size, floor, op in ROWS}
    gpu = next((g for g in bandwidths() if g in name), None)
    for r in (r for r in report["results"] if r["headline"]):
        key = (r["name"], r["shape"])
        guess = "-"
        if gpu and key in known:
            guess = f"{predicted_milliseconds(*known[key], gpu):.2f} ms"
        others = ", ".join(f"{other} {ratio:.2f}x" for other, ratio in r["ratios"].items())
        absent = ", ".join(f"no {other}" for other in r["absent"])
        rate = {"copy": "of copying", "product": "of the GEMM rate"}[r["bound"]]
        lines.append(
            f"| {r['name']} | {r['shape']} | {r['milliseconds']['fasttax']:.2f} ms | "
            f"{100 * r['share']:.0f} % {rate} | {guess} | "
            f"{'; '.join(part for part in (others, absent) if part)} |"
        )
    products = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {d}" for d, rate in rates["products"].items())
    return [
        *lines,
        "",
        "{name}: copies {copy:.2f} TB/s, {products}; torch {torch}, commit {commit}, {date}. "
        "Device times from cold caches, medians of interleaved rounds, written by "
        "`make bench-gpu`.".format(
            name=name, copy=rates["copy"] / 1e12, products=products, **_run(report)
        ),
    ]


def _run(report: dict[str, Any]) -> dict[str, str]:
    return {key: report["environment"][key] for key in ("torch", "commit", "date")}


def table(folder: Path) -> str:
    """What has been measured, or what is predicted until then."""
    found = reports(folder)
    if not found:
        return "\n".join(prediction())
    return "\n\n".join("\n".join(measured(report)) for report in found)
