"""The device cases of the whole suite on this machine's GPU (`make test-gpu`).

CUDA C++ and Triton against float64, what surrounds them, one trainer of each integration, and where
there are two GPUs NCCL between them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """One run of pytest."""

    files: tuple[str, ...]
    words: str = ""  # the -k that picks its cases for GPUs
    backend: str = "auto"  # FASTTAX_BACKEND

    @property
    def name(self) -> str:
        on = "" if self.backend == "auto" else f" ({self.backend})"
        return " ".join(self.files) + on


GPUS = "cuda or triton"
DEVICE = ("tests/gpu/test_device.py", "tests/gpu/test_device_models.py")
PARTS = (
    Part((*DEVICE, "tests/gpu/test_cuda_ewc_gpu.py")),
    Part(DEVICE, backend="triton"),
    Part(("tests/kl/test_kl.py", "tests/kl/test_kl_rows.py", "tests/kl/test_kl_autograd.py"), GPUS),
    Part(("tests/kl/test_kl_stats.py", "tests/kl/test_kl_stats_rows.py"), GPUS),
    Part(("tests/kl/test_kl_reduced.py", "tests/kl/test_kl_frames.py"), GPUS),
    Part(("tests/gpu/test_device_trainers.py", "tests/integrations/test_examples.py")),
    Part(("tests/gpu/test_two_gpus.py",)),
)


def command_of(part: Part) -> list[str]:
    chosen = ("-k", part.words) if part.words else ()
    return [sys.executable, "-m", "pytest", "-q", *part.files, *chosen]


def main() -> int:
    """Runs them all; 0 if they pass, or if there is no GPU and nothing ran."""
    if not torch.cuda.is_available():
        print("test-gpu: torch sees no GPU here, so that nothing was run")
        return 0
    print(f"test-gpu: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}", flush=True)
    failed, begin = [], time.perf_counter()
    for part in PARTS:
        start = time.perf_counter()
        environment = {**os.environ, "FASTTAX_BACKEND": part.backend}
        if subprocess.run(command_of(part), env=environment).returncode:
            failed.append(part.name)
        print(f"test-gpu: {time.perf_counter() - start:.0f} s: {part.name}", flush=True)
    if failed:
        print("test-gpu: failed:", *failed, sep="\n  ")
    print(f"test-gpu: {time.perf_counter() - begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
