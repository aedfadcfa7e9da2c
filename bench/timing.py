"""What a benchmark ran on, and its results as JSON; the timing itself is fasttax's own."""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasttax._base.timing import Case as Case
from fasttax._base.timing import Result as Result
from fasttax._base.timing import bandwidth as bandwidth
from fasttax._base.timing import run as run

if TYPE_CHECKING:
    from bench.gpu_run import GpuResult


def environment(bytes_per_second: float) -> dict[str, Any]:
    """What the numbers of a run hold for."""
    import fasttax
    from fasttax._base import library

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        if info.exists()
        else []
    )
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "cpu": (names or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fasttax": fasttax.__version__,
        "commit": commit or "none",
        "simd": None if "_C" in library.problems else torch.ops.fasttax._simd_level(-1),
        "copy_GB_per_s": round(bytes_per_second / 1e9, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def as_json(result: Result | GpuResult) -> dict[str, Any]:
    """A result's fields, numbers to four decimals."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return round(value, 4) if isinstance(value, float) else value

    return {k: rounded(v) for k, v in asdict(result).items()}
