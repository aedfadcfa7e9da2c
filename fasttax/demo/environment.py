"""What the demo ran on: machine and versions, for results.json and the report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import fasttax


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    found: dict[str, str | int] = {
        "system": platform.platform(),
        "cpu": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    return {
        "fasttax": fasttax.__version__,
        "python": platform.python_version(),
        **{
            name: metadata.version(name)
            for name in ("torch", "transformers", "numpy", "safetensors")
        },
    }
