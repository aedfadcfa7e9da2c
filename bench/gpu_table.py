"""README's table of the GPU: what is predicted, and what `make bench-gpu` has measured."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from bench import workloads

# bytes/s at the peak of the data sheet
PEAKS = {"H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}
# The share of that peak which a kernel is predicted to reach, by its machine code alone:
# instructions an entry, bytes in flight, blocks on an SM; in practice about 0.9 is the most.
SHARES = {
    "token_kl forward only, bfloat16": {"H100": 0.90, "H200": 0.78, "B200": 0.59},
    "ewc_add_grad_, float32": {"H100": 0.90, "H200": 0.90, "B200": 0.90},
    "AdamWEWC, float32": {"H100": 0.90, "H200": 0.90, "B200": 0.90},
}
_V = workloads.GPU_KL[0]
_P = workloads.GPU_PARAMETERS[0]
_COUNT = sum(prod(shape) for shape in _P[1])
ROWS = (  # case, size, the bytes that it must move
    ("token_kl forward only, bfloat16", _V[0], 4.0 * _V[1] * _V[2]),
    ("ewc_add_grad_, float32", _P[0], 20.0 * _COUNT),
    ("AdamWEWC, float32", _P[0], 36.0 * _COUNT),
)


def slug(name: str) -> str:
    """A GPU's name as a file's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def reports(folder: Path) -> list[dict[str, Any]]:
    """What has been measured: the files of bench/results that are of GPUs."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        report for report in found if report.get("command", "").startswith("python -m bench gpu")
    ]


def predicted_milliseconds(name: str, floor_bytes: float, gpu: str) -> float:
    """The least bytes at the predicted share of the peak."""
    return 1e3 * floor_bytes / (PEAKS[gpu] * SHARES[name][gpu])


def prediction() -> list[str]:
    """The table's lines where nothing is measured."""
    heads = " | ".join(f"{gpu}, predicted" for gpu in PEAKS)
    lines = [f"| case | size | {heads} | measured |", f"|---|---|{'---:|' * (len(PEAKS) + 1)}"]
    for name, size, floor in ROWS:
        cells = " | ".join(f"{predicted_milliseconds(name, floor, gpu):.2f} ms" for gpu in PEAKS)
        lines.append(f"| {name} | {size} | {cells} | not yet |")
    return [
        *lines,
        "",
        "Predicted, not measured: no GPU has run `make bench-gpu` yet. The least bytes of a case "
        "over the share of the peak bandwidth that its machine code allows (bench/gpu_table.py).",
    ]


def measured(report: dict[str, Any]) -> list[str]:
    """One GPU's lines."""
    name, rates = report["environment"]["gpu"], report["rates"]
    lines = [
        f"| case, on {name} | size | fasttax | share | predicted | others, times fasttax's time |",
        "|---|---|---:|---:|---:|---|",
    ]
    floors = {(case, size): floor for case, size, floor in ROWS}
    gpu = next((g for g in PEAKS if g in name), None)
    for r in (r for r in report["results"] if r["headline"]):
        key = (r["name"], r["shape"])
        guess = "-"
        if gpu and key in floors:
            guess = f"{predicted_milliseconds(r['name'], floors[key], gpu):.2f} ms"
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
