"""What the demo ran on: machine and versions, for results.json and the report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import fasttax


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use, where the system says it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, str | int]:
    """System, processor, cores, threads, and of a device that is a GPU its name."""
    found: dict[str, str | int] = {
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {
        "fasttax": fasttax.__version__,
        "python": platform.python_version(),
        **{
            name: metadata.version(name)
            for name in ("torch", "transformers", "numpy", "safetensors")
        },
    }
