"""`fasttax doctor`: per op, which kernel runs here and why; versions.

What is missing and the command that brings it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence

import torch

from fasttax._base import library
from fasttax._base.version import __version__

SIMD = ("portable vectors", "AVX2", "AVX-512")
EXTRAS = {
    "transformers": "transformers",
    "trl": "trl",
    "lightning": "lightning",
    "matplotlib": "report",
    "rich": "demo",
    "gguf": "demo",
}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "installed"


def missing() -> list[tuple[str, str]]:
    """(what is missing, the command that brings it)."""
    rows = []
    build = "pip install --no-build-isolation --force-reinstall --no-deps ."
    if "_C" in library.problems and library.problems["_C"] != "FASTTAX_BACKEND=reference":
        compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
        first = "" if compiler else "apt-get install g++ && "
        rows.append(
            (
                f"C++ CPU kernels ({library.problems['_C']})",
                f"{first}{build}   (in fasttax's source folder)",
            )
        )
    if torch.cuda.is_available() and "_C_cuda" in library.problems:
        rows.append(
            (
                f"CUDA C++ kernels ({library.problems['_C_cuda']})",
                f"FASTTAX_CUDA=1 {build}   (needs nvcc; CUDA_HOME names its folder)",
            )
        )
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            rows.append((f"{package} (optional)", f"pip install 'fasttax[{extra}]'"))
    return rows


def report() -> str:
    simd = (
        "none (no C++ kernels)"
        if "_C" in library.problems
        else SIMD[torch.ops.fasttax._simd_level(-1)]
    )
    lines = [
        f"fasttax {__version__}   torch {torch.__version__}   python {platform.python_version()}   "
        f"{platform.system()} {platform.machine()}",
        f"FASTTAX_BACKEND={os.environ.get('FASTTAX_BACKEND', 'auto (not set)')}   SIMD: {simd}   "
        f"threads: {torch.get_num_threads()}",
        f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}   torch's "
        f"CUDA: {torch.version.cuda or 'none'}   "
        f"triton: {_version('triton') or 'not installed'}",
        "",
        f"{'op':28} {'cpu':10} {'cuda':10} why",
    ]
    for name in sorted(library.OPS):
        (cpu, cpu_why), (cuda, cuda_why) = library.active(name, "cpu"), library.active(name, "cuda")
        lines.append(f"{name:28} {cpu:10} {cuda:10} cpu: {cpu_why}; cuda: {cuda_why}")
    rows = missing()
    lines += ["", "missing:" if rows else "nothing is missing"]
    lines += [f"  {what:44} {command}" for what, command in rows]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="fasttax doctor", description=__doc__).parse_args(argv)
    print(report())
    return 0
