"""The machine's library: compiled by g++ once for its sources, and kept in build/."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.tools.cuda_tools import ROOT

HERE = Path(__file__).parent
# -march: lanes eight or sixteen at a time; no contraction: PTX says where a multiply-add is
FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-Wall",
    "-Werror",
)
P, I32, U32, U64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
SIGNATURES = {
    "ptx_handler": (P, [ctypes.c_char_p]),
    "ptx_program": (P, [P, I32, P, I32, P, I32, P, I32, P, I32, I32]),
    "ptx_program_delete": (None, [P]),
    "ptx_memory": (P, []),
    "ptx_memory_delete": (None, [P]),
    "ptx_add": (None, [P, U64, U64, ctypes.c_char_p, I32, I32, I32, I32]),
    "ptx_remove": (None, [P, U64, U64]),
    "ptx_write": (None, [P, U64, U64]),
    "ptx_unwritten": (U64, [P, U64, U64]),
    "ptx_run": (P, [P, P, P, I32]),
    "ptx_launch_delete": (None, [P]),
    "ptx_faults": (I32, [P]),
    "ptx_fault": (ctypes.c_char_p, [P, I32, P, P, P, P, P]),
    "ptx_executed": (P, [P]),
    "ptx_lanes": (P, [P]),
    "ptx_loads": (P, [P]),
    "ptx_stores": (P, [P]),
}


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def kept(stem: str, sources: Sequence[Path], build: Callable[[Path], None], of: str = "") -> Path:
    """What `build` makes of these sources, in a folder of its own: made once, by one process."""
    digest = hashlib.sha256(of.encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    folder = ROOT / "build/ptx"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{stem}-{digest.hexdigest()[:16]}"
    with (folder / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for old in folder.glob(f"{stem}-*"):
                shutil.rmtree(old)
            part = folder / f"part-{stem}-{os.getpid()}"
            part.mkdir(exist_ok=True)
            try:
                build(part)
                part.rename(made)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return made


def build(folder: Path) -> None:
    def compiled(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        run(["g++", *FLAGS, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(HERE.glob("*.cpp"))))
    run(["g++", "-shared", *objects, "-o", folder / "libptx.so"])


@cache
def library() -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("the PTX machine is compiled by g++, which is not here")
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.h")]
    loaded = ctypes.CDLL(str(kept("machine", sources, build, " ".join(FLAGS)) / "libptx.so"))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
