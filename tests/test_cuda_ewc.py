"""The CUDA EWC kernels without a GPU: their source on a SIMT machine, their machine code, the built library.

tests/simt/simt.h runs csrc/cuda/ewc.cuh thread by thread (values, bounds, alignment, races), and four faults injected into a copy of it show
that each of these checks can fail. nvcc's code for sm_80 to sm_120 shows what the GPU executes. test_cuda_ewc_gpu.py is the part that needs one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fasttax
from fasttax import _library

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])
ARCHS = ("80", "90", "100", "120")
MODES = 4
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

# name -> (sanitizer flags, text of the kernel, what replaces it, what the run must say)
FAULTS = {
    "reads past the end": (ASAN, "end - end % kEwcGroup : 0", "(end + kEwcGroup - 1) / kEwcGroup * kEwcGroup : 0", "heap-buffer-overflow"),
    "ignores alignment": (ASAN, "tensor.aligned ?", "true ?", "misaligned address"),
    "no barrier": (("-fsanitize=thread",), "  __syncthreads();\n", "", "data race"),
    "second launch over the first": ((), "if (args.parts) args.parts += blocks;", "", "FAILED"),
}


def cuda_homes() -> list[Path]:
    return [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, SITE.glob("nvidia/cu*")))) if home]


def first(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


# --- the source, on the SIMT machine ---------------------------------------------------------------------------------


def host_headers() -> list[str]:
    """g++ options for CUDA's own host headers; the wheels of pip and Triton hold a half each."""
    parts = [first([home / "include" / part for home in (*cuda_homes(), SITE / "triton/backends/nvidia")]) for part in ("cuda_bf16.h", "crt/host_defines.h")]
    if None in parts or not (shutil.which("g++") and os.uname().machine == "x86_64"):
        pytest.skip("needs g++ on x86-64 and CUDA's host headers (cuda_bf16.h, crt/host_defines.h): install a CUDA toolkit, or a CUDA torch by pip")
    bf16, crt = (part for part in parts if part)
    return ["-isystem", str(bf16.parent), "-isystem", str(crt.parents[1])]


def build_and_run(folder: Path, headers: Sequence[str], flags: Sequence[str], csrc: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "ewc"
    # -O0: under ASan 5 s to compile and 4 to run, at -O2 25 and 2
    built = run("g++", "-std=c++17", "-O0", "-g1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", *flags, f"-I{csrc}",
                f"-I{ROOT / 'tests/simt'}", *headers, ROOT / "tests/simt/ewc_main.cpp", "-o", program)  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    quick = ["quick"] if "-fsanitize=thread" in flags else []
    return run(program, *quick, ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="halt_on_error=1")


def faulty(folder: Path, text: str, replacement: str) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    kernel = csrc / "cuda/ewc.cuh"
    source = kernel.read_text()
    assert source.count(text) == 1, f"{text!r} is no longer in ewc.cuh once"
    kernel.write_text(source.replace(text, replacement))
    return csrc


@pytest.fixture(scope="module")
def simt_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """All programs, built and run two at a time."""
    headers = host_headers()
    pool = ThreadPoolExecutor(2)
    runs = {}
    for name, flags in {"thread": ("-fsanitize=thread",), "address": ASAN, "plain": ()}.items():
        runs[name] = pool.submit(build_and_run, tmp_path_factory.mktemp("simt"), headers, flags, ROOT / "csrc")
    for name, (flags, text, replacement, _) in FAULTS.items():
        folder = tmp_path_factory.mktemp("fault")
        runs[name] = pool.submit(build_and_run, folder, headers, flags, faulty(folder, text, replacement))
    pool.shutdown(wait=False)
    return runs


def finished(runs: dict[str, Future[subprocess.CompletedProcess[str]]], name: str) -> subprocess.CompletedProcess[str]:
    done = runs[name].result()
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address randomisation is beyond g++'s ThreadSanitizer (sysctl vm.mmap_rnd_bits=28)")
    return done


@pytest.mark.parametrize("build", ["plain", "address", "thread"])
def test_kernels_on_the_simt_machine(simt_runs: dict[str, Any], build: str) -> None:
    done = finished(simt_runs, build)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # 4 modes x 2 runs x (2 for the 108 mixes, 1 for the chunks but under TSan, 1 for float64, 0 for nothing)
    assert f"ok: {24 if build == 'thread' else 32} launches" in done.stdout


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_simt_machine_catches(simt_runs: dict[str, Any], fault: str) -> None:
    done = finished(simt_runs, fault)
    assert done.returncode != 0
    assert FAULTS[fault][3] in done.stdout + done.stderr


# --- the machine code ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """arch -> (what ptxas says, cubin)."""
    nvcc = first([home / "bin/nvcc" for home in cuda_homes()])
    if nvcc is None:
        pytest.skip("needs nvcc: install a CUDA toolkit or set CUDA_HOME")
    folder = tmp_path_factory.mktemp("cubin")

    def build(arch: str) -> tuple[str, Path]:
        out = folder / f"ewc{arch}.cubin"
        done = run(nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", ROOT / "csrc/cuda/ewc.cu", "-o", out)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr, out

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHS, pool.map(build, ARCHS), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(cubins: dict[str, tuple[str, Path]], arch: str) -> None:
    report = cubins[arch][0]
    assert "warning" not in report, report
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == MODES + 1
    assert max(registers) <= 64, report  # 4 blocks of 256 per SM
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {("0", "0", "0")}


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses(cubins: dict[str, tuple[str, Path]], arch: str) -> None:
    nvdisasm = first([path / "nvdisasm" for path in (*(home / "bin" for home in cuda_homes()), SITE / "triton/backends/nvidia/bin")])
    if nvdisasm is None:
        pytest.skip("needs nvdisasm: in the CUDA toolkit, or pip install nvidia-cuda-nvdisasm")
    done = run(nvdisasm, "-c", cubins[arch][1])
    assert done.returncode == 0, done.stderr
    kernels = dict(re.findall(r"\.section\s+\.text\.(\S+?),(.*?)(?=\.section\s|\Z)", done.stdout, re.DOTALL))
    for mode, loads in enumerate((3, 4, 3, 3)):  # value, add, write, prox
        code = next(body for name, body in kernels.items() if f"EwcModeE{mode}E" in name)
        assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E|RED|ATOM)", code)  # local or unnamed memory, or an order that the hardware chooses
        steps = re.findall(r"\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code)
        wide = [i for i, step in enumerate(steps) if re.match(r"LDG\.E.*\.128$", step)]
        # the float32 loop: every operand's 16-byte load under way before the first arithmetic
        runs = [steps[wide[i] : wide[i + loads - 1]] for i in range(len(wide) - loads + 1)]
        assert any(len(steps) < 24 and not any(re.match("F(ADD|MUL|FMA)", step) for step in steps) for steps in runs)
        assert mode == 0 or any(re.match(r"STG\.E.*\.128$", step) for step in steps)


# --- the library -----------------------------------------------------------------------------------------------------


def test_library_needs_torchs_stable_abi_alone() -> None:
    library = first(sorted(Path(fasttax.__file__).parent.glob("_C_cuda*.so")))
    if library is None or not shutil.which("nm"):
        pytest.skip("_C_cuda is not built here (nvcc and a CUDA torch build it), or binutils' nm is missing")
    symbols = run("nm", "-D", "--undefined-only", "--demangle", library).stdout
    assert "torch_call_dispatcher" in symbols
    assert not re.search(r"\b(at|c10|torch)::", symbols)
    assert not re.search(r"\bcu(da)?[A-Z]", symbols)  # the CUDA runtime is inside, and finds the driver when first used


def test_library_registers_without_a_gpu() -> None:
    if "_C_cuda" in _library.problems:
        pytest.skip(f"_C_cuda is not loaded: {_library.problems['_C_cuda']}")
    for op in ("ewc_penalty", "ewc_penalty_backward", "ewc_add_grad_", "ewc_prox_"):
        assert _library.active(op, "cuda") == ("CUDA C++", "built and registered")
