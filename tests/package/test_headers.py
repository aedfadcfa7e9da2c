"""Every header of csrc compiles alone: it includes what it needs.

A header of kernels for the CPU is compiled by isa.h, once for each instruction set; one of CUDA
kernels on the SIMT machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.tools.cuda_tools import host_headers

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HEADERS = sorted(CSRC.glob("*/*.h"))
KERNELS = [path for path in HEADERS if "defined(FASTTAX_ISA)" in path.read_text()]
# They start kernels, which the SIMT machine does by calls of its own (tests/gpu/simt/launch.h).
NVCC_ONLY = {"kl_launch.cuh", "launch.cuh"}
CUDA = sorted(path for path in CSRC.glob("cuda/*.cuh") if path.name not in NVCC_ONLY)


def compiles(source: str, *options: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    includes = [
        f"-I{CSRC}",
        f"-I{ROOT / 'tests/gpu/simt'}",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    command = [
        "g++",
        "-fsyntax-only",
        "-std=c++17",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        *includes,
        *options,
    ]
    done = subprocess.run(
        [*command, "-x", "c++", "-"], input=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def below_csrc(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_no_header_lies_loose() -> None:
    assert not list(CSRC.glob("*.h"))


def test_instruction_sets_know_no_formulas() -> None:
    for name in ("isa.h", "simd.h", "level.h", "fetch.h"):
        assert "math/" not in (CSRC / "cpu" / name).read_text(), name


def test_formulas_are_read_for_each_instruction_set() -> None:
    """A guard that stayed would leave the vectors to the scalars' functions."""
    guards = set()
    for path in CSRC.glob("math/*.h"):
        own = re.findall(r"^#if !defined\((FASTTAX_MATH_\w+)\)", path.read_text(), re.MULTILINE)
        assert len(own) == path.read_text().count("\nnamespace FASTTAX_MATH_NS {\n"), path.name
        guards |= set(own)
    text = (CSRC / "cpu/pass.h").read_text()
    assert guards
    assert set(re.findall(r"#undef (FASTTAX_MATH_\w+)", text)) == guards | {"FASTTAX_MATH_NS"}


@pytest.mark.parametrize(
    "header",
    [path for path in HEADERS if path.name not in ("isa.h", "pass.h", "simd.h")],
    ids=below_csrc,
)
def test_header_alone(header: Path) -> None:
    torch = [option for path in include_paths() for option in ("-isystem", path)]
    source = f'#include "{below_csrc(header)}"\n'
    if header in KERNELS:
        kernels = below_csrc(header).removeprefix("cpu/")
        source = f'#define FASTTAX_KERNELS "{kernels}"\n#include "cpu/isa.h"\n'
    compiles(source, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", *torch)


@pytest.mark.parametrize("header", CUDA, ids=below_csrc)
def test_cuda_header_alone(header: Path) -> None:
    compiles(f'#include "simt_cuda.h"\n#include "{below_csrc(header)}"\n', *host_headers())
