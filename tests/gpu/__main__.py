"""The device cases of the whole suite on this machine's GPU (`make test-gpu`).

CUDA C++ and Triton against float64, what surrounds them, and one trainer of each integration.
"""

from __future__ import annotations

import subprocess
import sys

import torch

GPUS = "cuda or triton"
# what runs, and the -k that picks its cases for GPUs
PARTS = (
    (("tests/gpu/test_device.py", "tests/gpu/test_cuda_ewc_gpu.py"), ""),
    (
        ("tests/kl/test_kl.py", "tests/kl/test_kl_rows.py", "tests/kl/test_kl_autograd.py"),
        "cuda or triton",
    ),
    (("tests/kl/test_kl_stats.py", "tests/kl/test_kl_stats_rows.py"), "cuda or triton"),
    (("tests/kl/test_kl_reduced.py", "tests/kl/test_kl_frames.py"), "cuda or triton"),
    (("tests/integrations/test_examples.py",), ""),
)


def main() -> int:
    """Runs them all; 0 if they pass, or if there is no GPU and nothing ran."""
    if not torch.cuda.is_available():
        print("test-gpu: torch sees no GPU here, so that nothing was run")
        return 0
    print(f"test-gpu: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}", flush=True)
    failed = []
    for files, words in PARTS:
        command = [sys.executable, "-m", "pytest", "-q", *files, *(("-k", words) if words else ())]
        if subprocess.run(command).returncode:
            failed.append(" ".join(files))
    if failed:
        print("test-gpu: failed:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
