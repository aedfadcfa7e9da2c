"""What the tests of CUDA kernels without a GPU share: a build for the SIMT machine of
tests/gpu/simt, faults put into a copy of the source, nvcc's machine code and what it says.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
ARCHS = ("80", "90", "100", "120")
LOAD, STORE, ARITHMETIC = r"LDG\.E.*\.128", r"STG\.E.*\.128", r"F(ADD|MUL|FMA)\b|MUFU"  # in SASS
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TSAN = ("-fsanitize=thread",)

Done = subprocess.CompletedProcess[str]


class Fault(NamedTuple):
    flags: tuple[str, ...]
    file: str  # below csrc
    text: str
    replacement: str
    says: str  # what the run must say
    quick: bool = True


def cuda_homes() -> list[Path]:
    return [
        Path(home)
        for home in (
            os.environ.get("CUDA_HOME"),
            "/usr/local/cuda",
            *sorted(map(str, SITE.glob("nvidia/cu*"))),
        )
        if home
    ]


def first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def nvcc() -> Path:
    """A test that needs it is skipped where it is missing."""
    found = first(home / "bin/nvcc" for home in cuda_homes())
    if found is None:
        pytest.skip("needs nvcc: install a CUDA toolkit or set CUDA_HOME")
    return found


def tool(name: str) -> Path:
    """Of those that read machine code, which Triton brings too."""
    folders = (*(home / "bin" for home in cuda_homes()), SITE / "triton/backends/nvidia/bin")
    found = first(folder / name for folder in folders)
    if found is None:
        pytest.skip(f"needs {name}: in the CUDA toolkit, or pip install nvidia-cuda-{name}")
    return found


def run(*command: object, **environment: str) -> Done:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


# --- the source, on the SIMT machine --------------------------------------------------------------


def host_headers() -> list[str]:
    """g++ options for CUDA's own host headers; the wheels of pip and Triton hold a half each."""
    parts = [
        first(
            [home / "include" / part for home in (*cuda_homes(), SITE / "triton/backends/nvidia")]
        )
        for part in ("cuda_bf16.h", "crt/host_defines.h")
    ]
    if None in parts or not (shutil.which("g++") and os.uname().machine == "x86_64"):
        pytest.skip(
            "needs g++ on x86-64 and CUDA's host headers (cuda_bf16.h, crt/host_defines.h): "
            "install a CUDA toolkit, or a CUDA torch by pip"
        )
    bf16, crt = (part for part in parts if part)
    return ["-isystem", str(bf16.parent), "-isystem", str(crt.parents[1])]


def build_and_run(
    program: str,
    folder: Path,
    headers: Sequence[str],
    flags: Sequence[str],
    csrc: Path,
    short: str = "",
) -> Done:
    out = folder / program
    # -Og: under ASan 35 s to compile and 29 to run (kl), at -O0 30 and 88, at -O1 79 and 29
    built = run(
        "g++",
        "-std=c++17",
        "-Og",
        "-g1",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        *flags,
        f"-I{csrc}",
        f"-I{ROOT / 'tests/gpu/simt'}",
        *headers,
        ROOT / f"tests/gpu/simt/{program}_main.cpp",
        "-o",
        out,
    )
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return run(
        out,
        *([short] if short else []),
        ASAN_OPTIONS="detect_leaks=0",
        TSAN_OPTIONS="halt_on_error=1",
    )


def faulty(folder: Path, fault: Fault) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    kernel = csrc / fault.file
    source = kernel.read_text()
    assert source.count(fault.text) == 1, f"{fault.text!r} is no longer in {fault.file} once"
    kernel.write_text(source.replace(fault.text, fault.replacement))
    return csrc


def start_runs(
    program: str, faults: Mapping[str, Fault], make_folder: pytest.TempPathFactory
) -> dict[str, Future[Done]]:
    """The builds "plain", "address" and "thread" and one for each fault, built and run two at a
    time. TSan's runs are few: it is slow, and a race does not depend on sizes.
    """
    headers = host_headers()
    pool = ThreadPoolExecutor(2)
    runs = {}
    for name, flags in {"thread": TSAN, "address": ASAN, "plain": ()}.items():
        runs[name] = pool.submit(
            build_and_run,
            program,
            make_folder.mktemp("simt"),
            headers,
            flags,
            ROOT / "csrc",
            "races" if name == "thread" else "",
        )
    for name, fault in faults.items():
        folder = make_folder.mktemp("fault")
        runs[name] = pool.submit(
            build_and_run,
            program,
            folder,
            headers,
            (*fault.flags, "-DONE_OP"),
            faulty(folder, fault),
            "quick" if fault.quick else "",
        )
    pool.shutdown(wait=False)
    return runs


def finished(runs: Mapping[str, Future[Done]], name: str) -> Done:
    done = runs[name].result()
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(
            "this kernel's address randomisation is beyond g++'s ThreadSanitizer (sysctl "
            "vm.mmap_rnd_bits=28)"
        )
    return done


def simt_tests(
    program: str, faults: Mapping[str, Fault], launches: Callable[[str], int]
) -> tuple[Any, Any, Any]:
    """The fixture `simt_runs` and the tests that a file of a kernel has of
    tests/gpu/simt/<program>_main.cpp: every build is right and makes so many `launches`, and says
    of each fault what it must.
    """

    @pytest.fixture(scope="module")
    def simt_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Done]]:
        return start_runs(program, faults, tmp_path_factory)

    @pytest.mark.parametrize("build", ["plain", "address", "thread"])
    def test_kernels(simt_runs: dict[str, Future[Done]], build: str) -> None:
        done = finished(simt_runs, build)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert f"ok: {launches(build)} launches" in done.stdout, done.stdout

    @pytest.mark.parametrize("fault", list(faults))
    def test_catches(simt_runs: dict[str, Future[Done]], fault: str) -> None:
        done = finished(simt_runs, fault)
        assert done.returncode != 0
        assert faults[fault].says in done.stdout + done.stderr

    return simt_runs, test_kernels, test_catches


# --- the machine code -----------------------------------------------------------------------------


@cache
def machine_code(cubin: Path) -> dict[str, str]:
    """kernel -> its SASS."""
    done = run(tool("nvdisasm"), "-c", cubin)
    assert done.returncode == 0, done.stderr
    return dict(
        re.findall(r"\.section\s+\.text\.(\S+?),(.*?)(?=\.section\s|\Z)", done.stdout, re.DOTALL)
    )


def steps(code: str) -> list[str]:
    """The opcodes of some SASS in their order."""
    return re.findall(r"\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code)


def basic_blocks(code: str) -> list[list[str]]:
    """The opcodes between labels and branches."""
    blocks: list[list[str]] = [[]]
    for line in code.splitlines():
        if re.match(r"\s*\.L\w*:", line):
            blocks.append([])
        for step in steps(line):
            blocks[-1].append(step)
            if re.match(r"BRA|EXIT|BRX|RET|JMP", step):
                blocks.append([])
    return [block for block in blocks if block]


def longest_run(opcodes: list[str], wanted: str, forbidden: str) -> int:
    """Most `wanted` with no `forbidden` between them."""
    most = count = 0
    for step in opcodes:
        count = 0 if re.match(forbidden, step) else count + bool(re.match(wanted, step))
        most = max(most, count)
    return most
