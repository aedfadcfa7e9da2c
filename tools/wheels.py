"""Wheels as they are published: stripped, tagged with the oldest glibc they load under, checked.

    python tools/wheels.py [--cuda] [--glibc 2.28] [--torch 2.13.0 ...]

writes dist/fasttax-*.whl and the source distribution; with --cuda the wheel has the CUDA kernels
too (compute capability 8.0 to 12.0, and PTX) and lies in dist/cu<version>. Each --torch installs
the wheel beside that torch in an empty environment and compares the kernels with the reference.
Needs auditwheel, abi3audit and build (`pip install --group wheels`). A wheel's glibc is that of the
machine that builds it, or --glibc, which is an error where the wheel asks for more:
.github/workflows/wheels.yml builds for 2.28, in manylinux_2_28's containers.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
DIST = HERE / "dist"
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so", "libc10.so")
CPU_LIMIT = 4 * 2**20  # bytes of a wheel without CUDA kernels
SMOKE = """
import torch, fasttax
from fasttax._base import library
x, y = torch.randn(4, 5003), torch.randn(4, 5003)
log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
exact = (log_p.exp() * (log_p - log_q)).sum(-1)
assert library.active("token_kl", "cpu")[0] == "C++", library.active("token_kl", "cpu")
assert (fasttax.token_kl(x, y) - exact).abs().max() < 1e-6 * exact.max()
print("torch", torch.__version__, "ok")
"""


def run(*command: str | Path, cwd: Path = HERE, **environment: str) -> str:
    print("+", *command, flush=True)
    tools = str(Path(sys.executable).parent)  # of an environment that may not be activated
    env = os.environ | {"PATH": os.pathsep.join([tools, os.environ["PATH"]])} | environment
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"fasttax wheels: {command[0]} failed\n{done.stdout}")
    return done.stdout


def wheel(cuda: bool, glibc: str | None) -> Path:
    """The checked wheel."""
    place = DIST
    if cuda:
        import torch

        place = DIST / f"cu{(torch.version.cuda or 'none').replace('.', '')}"
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        run(
            *(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"),
            *("-w", folder, "."),
            FASTTAX_CPP="1",
            FASTTAX_CUDA="1" if cuda else "0",
        )
        (raw,) = Path(folder).glob("*.whl")
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        before = set(place.glob("*.whl"))
        oldest = []
        if glibc is not None:
            tag = f"manylinux_{glibc.replace('.', '_')}_{platform.machine()}"
            oldest = ["--plat", tag, "--only-plat"]
        run("auditwheel", "repair", "--strip", *oldest, *excluded, "-w", place, raw)
    made = max(place.glob("*.whl"), key=lambda path: (path not in before, path.stat().st_mtime))
    print(run("abi3audit", "--strict", "--report", made))
    size = made.stat().st_size
    print(f"{made.relative_to(HERE)}: {size / 2**20:.2f} MB")
    if not cuda and size > CPU_LIMIT:
        raise SystemExit(f"fasttax wheels: {size} bytes; a CPU wheel has at most {CPU_LIMIT}")
    return made


def check_beside(torch: str, built: Path) -> None:
    """The wheel in an empty environment with that torch, whatever PYTHONPATH says (-I)."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder, "bin", "python")
        run(python, "-I", "-m", "pip", "install", "-q", f"torch=={torch}", built)
        print(run(python, "-I", "-c", SMOKE, cwd=Path(folder)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument("--torch", nargs="*", default=[], help="versions to try the wheel beside")
    parser.add_argument("--glibc", help="the oldest that the wheel is to load under, as 2.28")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    DIST.mkdir(exist_ok=True)
    built = wheel(arguments.cuda, arguments.glibc)
    for version in arguments.torch:
        check_beside(version, built)
    if not arguments.cuda:
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", DIST, ".")


if __name__ == "__main__":
    main()
