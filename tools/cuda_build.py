"""Whether setup.py builds the CUDA C++ kernels, and for which architectures.

They take minutes to compile, so they are built where something can run them or somebody asks:
for the GPUs that torch sees, or for TORCH_CUDA_ARCH_LIST where that is set.
FASTTAX_CUDA=1 builds them anywhere and fails with the reason where that is impossible;
FASTTAX_CUDA=0 leaves them out.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # what FASTTAX_CUDA=1 builds where torch sees no GPU
OLDEST = (8, 0)  # the oldest that the kernels are compiled and tested for


def note(message: str) -> None:
    print(f"fasttax setup: {message}", file=sys.stderr)


def choice(variable: str, kernels: str) -> str | None:
    """What the environment says of a library: 0, 1, or nothing."""
    chosen = os.environ.get(variable)
    if chosen not in (None, "0", "1"):
        raise SystemExit(
            f"fasttax setup: {variable} must be 0 (no {kernels}) or 1 ({kernels} or fail), "
            f"got {chosen!r}"
        )
    return chosen


def cuda_wanted() -> bool:
    """Sets TORCH_CUDA_ARCH_LIST where torch could not find the architectures by itself."""
    chosen = choice("FASTTAX_CUDA", "CUDA kernels")
    if chosen == "0":
        return False
    import torch

    seen = torch.version.cuda is not None and torch.cuda.is_available()
    if chosen is None and not seen and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        note("no CUDA C++ kernels: torch sees no GPU here; FASTTAX_CUDA=1 builds them all the same")
        return False
    if not seen:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _known(ARCHITECTURES))
    problem = _problem()
    if problem and chosen == "1":
        raise SystemExit(f"fasttax setup: FASTTAX_CUDA=1, but {problem}")
    if problem:
        note(f"no CUDA C++ kernels: {problem}; GPUs use Triton's, or the reference without Triton")
    return not problem


def _known(architectures: str) -> str:
    """Those that the nvcc at hand compiles for; PTX of the newest one serves what comes after it.

    All of them where it cannot be asked: `_problem` says why then.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    listed = architectures.removesuffix("+PTX").split(";")
    command = [str(Path(CUDA_HOME or "", "bin", "nvcc")), "--list-gpu-arch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return architectures
    known = {found for found in re.findall(r"compute_(\d+)", done.stdout)}
    left = [a for a in listed if a.replace(".", "") in known]
    if not left or left == listed:
        return architectures
    missing = ", ".join(a for a in listed if a not in left)
    note(f"this nvcc does not know compute capability {missing}: PTX of {left[-1]} serves those")
    return ";".join(left) + "+PTX"


def _problem() -> str:
    """Why CUDA kernels can't be built here; empty where they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that has it"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not nvcc.is_file():
        return "nvcc is missing; install the CUDA toolkit, or name its folder in CUDA_HOME"
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:  # torch builds for the GPUs that it sees
        gpus = range(torch.cuda.device_count())
        capability = min(torch.cuda.get_device_capability(gpu) for gpu in gpus)
        if capability < OLDEST:
            found, needed = (".".join(map(str, c)) for c in (capability, OLDEST))
            return (
                f"the kernels need a GPU of compute capability {needed}, and this one has {found}"
            )
    return _version_problem(nvcc, torch.version.cuda) or _compile_problem(nvcc)


def _version_problem(nvcc: Path, torch_cuda: str) -> str:
    """The headers and libraries of torch are those of one major version of CUDA."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release ([\d.]+)", done.stdout)
    if release and release[1].partition(".")[0] == torch_cuda.partition(".")[0]:
        return ""
    version = release[1] if release else "of an unknown version"
    return (
        f"{nvcc} is {version} and torch's CUDA {torch_cuda}; install a toolkit of the same major "
        "version and name its folder in CUDA_HOME"
    )


def _compile_problem(nvcc: Path) -> str:
    """What nvcc says to a kernel of one line: to its architectures, and to the host compiler."""
    listed = re.findall(r"(\d+)\.(\d+[af]?)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    archs = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in listed]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text("__global__ void probe() {}\n")
        command: list[str | Path] = [
            nvcc,
            *(archs or ["-arch=native"]),
            "-c",
            "probe.cu",
            "-o",
            "probe.o",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return f"nvcc can't compile for {listed or 'this GPU'}: {(done.stderr or done.stdout).strip()}"
