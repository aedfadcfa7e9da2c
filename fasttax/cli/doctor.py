"""`fasttax doctor`: versions; per op, which kernel runs here and why; what is missing.

Each thing that is missing comes with the command that brings it. With --warm it compiles every
Triton kernel for the GPU instead, so that no first step of a training waits for that.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from fasttax import triton
from fasttax._base import library
from fasttax._base.version import __version__
from fasttax.cli import _warm

SIMD = ("portable vectors", "AVX2", "AVX-512")
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
EXTRAS = {
    "transformers": "transformers",
    "trl": "trl",
    "lightning": "lightning",
    "matplotlib": "report",
    "rich": "demo",
    "gguf": "demo",
}


def version_of(package: str) -> str:
    """The version, "installed" where the package has no metadata, or "not installed"."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed"


def missing() -> list[tuple[str, str]]:
    """(what is missing, the command that brings it)."""
    rows = []
    if "_C" in library.problems and library.problems["_C"] != "FASTTAX_BACKEND=reference":
        command = f"{BUILD}   (in fasttax's source folder)"
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            command = f"apt-get install g++ && {command}"
        rows.append((f"C++ CPU kernels ({library.problems['_C']})", command))
    problem = driver_problem() if not torch.cuda.is_available() else ""
    if problem:
        wanted = f"a driver for CUDA {torch.version.cuda}, or torch for the CUDA of this driver"
        rows.append((f"the GPU ({problem})", f"install {wanted}: https://pytorch.org/get-started"))
    if torch.cuda.is_available() and "_C_cuda" in library.problems:
        rows.append(
            (
                f"CUDA C++ kernels ({library.problems['_C_cuda']})",
                f"FASTTAX_CUDA=1 {BUILD}   (needs nvcc; CUDA_HOME names its folder)",
            )
        )
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            rows.append((f"{package} (optional)", f"pip install 'fasttax[{extra}]'"))
    return rows


def simd() -> str:
    """The widest vectors that the C++ CPU kernels use on this processor."""
    if "_C" in library.problems:
        return "none (no C++ kernels)"
    return SIMD[torch.ops.fasttax._simd_level(-1)]


def gpu() -> str:
    """The first GPU's name, or "none" with what torch says where a driver is there all the same."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    problem = driver_problem()
    return f"none ({problem})" if problem else "none"


def driver_problem() -> str:
    """Why torch does not use a GPU whose driver is there: it is too old, say; "" for no driver."""
    if torch.version.cuda is None or shutil.which("nvidia-smi") is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def report() -> str:
    """What the command prints: versions, a line an op, what is missing."""
    lines = [
        f"fasttax {__version__}   torch {torch.__version__}   python {platform.python_version()}   "
        f"{platform.system()} {platform.machine()}",
        f"FASTTAX_BACKEND={os.environ.get('FASTTAX_BACKEND', 'auto (not set)')}   SIMD: {simd()}   "
        f"threads: {torch.get_num_threads()}",
        f"GPU: {gpu()}   torch's "
        f"CUDA: {torch.version.cuda or 'none'}   "
        f"triton: {version_of('triton')}",
        "",
        f"{'op':28} {'cpu':10} {'cuda':10} why",
    ]
    for name in sorted(library.OPS):
        (cpu, cpu_why), (cuda, cuda_why) = library.active(name, "cpu"), library.active(name, "cuda")
        lines.append(f"{name:28} {cpu:10} {cuda:10} cpu: {cpu_why}; cuda: {cuda_why}")
    rows = missing()
    if not rows:
        return "\n".join([*lines, "", "nothing is missing"])
    lines += ["", "missing:"]
    lines += [f"  {what:44} {command}" for what, command in rows]
    return "\n".join(lines)


def warm_up() -> int:
    """Compiles the Triton kernels for the current GPU and says what and how long; 1 without one."""
    if not torch.cuda.is_available():
        where = "Triton's kernels are compiled on the GPU that they run on"
        return _refuse(f"torch sees no GPU here ({gpu()}); {where}")
    if not triton.available():
        return _refuse("triton is not installed; `pip install triton`")
    name = torch.cuda.get_device_name()
    device = torch.device("cuda", torch.cuda.current_device())
    done = _warm.warm(device, _say)
    total = sum(of.seconds for of in done)
    print(f"{len(done)} kinds of calls in {total:.1f} s for {name}; Triton keeps what it compiled")
    return 0


def _say(of: _warm.Warmed) -> None:
    print(f"{of.what:60} {of.seconds:6.1f} s", flush=True)


def _refuse(why: str) -> int:
    print(f"fasttax doctor --warm: {why}", file=sys.stderr)
    return 1


def main(argv: Sequence[str]) -> int:
    """Prints the report, or warms Triton's cache."""
    parser = argparse.ArgumentParser(prog="fasttax doctor", description=__doc__)
    parser.add_argument(
        "--warm",
        action="store_true",
        help="compile every Triton kernel for this machine's GPU; they stay in Triton's cache",
    )
    if parser.parse_args(argv).warm:
        return warm_up()
    print(report())
    return 0
