"""Who finds a planted fault, by the first word of the catalog's last column:

    simt PROGRAM [thread | address]   tests/gpu/simt/PROGRAM_main.cpp, by g++ (and a sanitizer)
    launch SOURCES: CASES             tests/gpu/fake, those sources compiled again; "launch@12000"
                                      under a driver of CUDA 12.0; SOURCES "triton" are
                                      its launches, "users" test_device*.py
    cpu SOURCE                        tests on the CPU's library, that object compiled again
    triton FAMILY                     tests of the family in Triton's interpreter

Each is run without a fault first: what fails by itself finds nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from tests.mutants.catalog import ROOT, Mutant
from tests.tools import fake_cuda
from tests.tools.cuda_tools import ASAN, TSAN, Done, host_headers, run

MOST_SECONDS = 300  # a fault may make a loop endless
SANITIZERS = {"thread": TSAN, "address": ASAN}
# of each object of the CPU's library, the tests that a wrong kernel fails first, and then more
CPU_TESTS = {
    "ewc.cpp": (("ewc/test_ewc.py::test_penalty_add_grad_and_prox",), ("ewc/test_ewc.py",)),
    "adamw.cpp": (
        ("ewc/test_optim.py::test_steps_are_the_formula",),
        ("ewc/test_optim.py", "ewc/test_optim_training.py"),
    ),
    "fisher.cpp": (
        ("fisher/test_functional_fisher.py::test_native_equals_the_reference",),
        ("fisher/test_functional_fisher.py", "fisher/test_fisher.py"),
    ),
    "fisher_rows.cpp": (
        ("fisher/test_functional_fisher.py::test_native_equals_the_reference",),
        ("fisher/test_functional_fisher.py", "fisher/test_fisher.py"),
    ),
    "fisher_squares.cpp": (
        ("fisher/test_accumulate_sqgrad.py::test_equals_float64",),
        ("fisher/test_accumulate_sqgrad.py",),
    ),
    "kl.cpp": (
        ("kl/test_kl.py::test_options", "kl/test_kl.py::test_vocabularies"),
        ("kl/test_kl.py", "kl/test_kl_rows.py", "kl/test_kl_sweeps.py", "kl/test_kl_frames.py"),
    ),
    "stats.cpp": (
        ("kl/test_kl_stats_rows.py::test_options", "kl/test_kl_stats_rows.py::test_vocabularies"),
        ("kl/test_kl_stats.py", "kl/test_kl_stats_rows.py"),
    ),
}
CPU_FLAGS = ("-std=c++17", "-O1", "-g0", "-w", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
INTERPRETED = {
    "ewc": (("gpu/test_triton_ewc.py",), "not compil and not machine and not registers"),
    "fisher": (("gpu/test_triton_fisher.py",), "in_the_interpreter"),
    "kl": (("kl/test_kl_rows.py",), "more_than and not reference"),
    "weigh": (
        ("kl/test_weigh.py",),  # whose bfloat16 is cut off there, not rounded
        "not reference and not opcheck and not compil and not is_not_rounded"
        " and not (test_scale_held and bfloat16 and not powers)",
    ),
}


class Broken(Exception):
    """A fault that does not compile, or a check that fails without one."""


def _copied(folder: Path) -> Path:
    """A tree to plant in: sources and tests, and the built library."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for part in ("csrc", "fasttax", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for library in (ROOT / "fasttax").glob("_C.*.so"):
        (folder / "fasttax" / library.name).symlink_to(library)
    return folder


def _run(command: Sequence[object], cwd: Path, **environment: str) -> Done:
    parts = [str(part) for part in command]
    try:
        return subprocess.run(
            parts,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(parts, 124, "it does not end", "")


def _pytest(tree: Path, files: Sequence[str], words: str, **environment: str) -> Done:
    paths = [f"tests/{name}" for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    given = {"PYTHONPATH": str(tree), **environment}
    return _run([*command, "-k", words, *paths], tree, **given)


def _found(done: Done) -> bool:
    """Whether a run of pytest has failed a test, or died; nothing chosen is a mistake."""
    if done.returncode in (2, 3, 4, 5):
        raise Broken(done.stdout[-3000:] + done.stderr[-2000:])
    return done.returncode != 0


class Killers:
    """All of them, with what they build, under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sound: dict[str, bool] = {}
        self._count = 0

    def finds(self, mutant: Mutant) -> bool:
        """Plants the fault, and runs who must find it.

        Raises:
            Broken: the fault does not compile, or its check fails without one.
        """
        word = mutant.killer.split()[0].partition("@")[0]
        check = {"simt": self._simt, "launch": self._launch, "cpu": self._cpu}.get(
            word, self._triton
        )
        if mutant.killer not in self._sound:
            self._sound[mutant.killer] = not check(mutant, False)
        if not self._sound[mutant.killer]:
            raise Broken(f"{mutant.killer} fails without a fault")
        return check(mutant, True)

    def _new(self) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return folder

    def _csrc(self, mutant: Mutant, planted: bool) -> Path:
        folder = self._new()
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        if planted:
            mutant.plant(folder)
        return folder

    @cached_property
    def _tree(self) -> Path:
        return _copied(self._new())

    # --- the SIMT machine ----------------------------------------------------------------------

    def _simt(self, mutant: Mutant, planted: bool) -> bool:
        _, program, *with_sanitizer = mutant.killer.split()
        flags = [flag for name in with_sanitizer for flag in SANITIZERS[name]]
        folder = self._csrc(mutant, planted)
        options = ("-std=c++17", "-O0", "-g0", "-w", "-fno-strict-aliasing", *flags)
        includes = (f"-I{folder / 'csrc'}", f"-I{ROOT / 'tests/gpu/simt'}", *host_headers())
        source = ROOT / f"tests/gpu/simt/{program}_main.cpp"
        built = run("g++", *options, *includes, source, "-o", folder / program)
        if built.returncode:
            raise Broken(built.stderr[-3000:])
        sanitizers = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        # the quick cases, which find most, then all, but for TSan, whose tables are too large
        once = "thread" in with_sanitizer or not planted
        for given in [["quick"]] if once else [["quick"], []]:
            done = _run([folder / program, *given], folder, **sanitizers)
            if "unexpected memory mapping" in done.stderr:
                raise Broken("g++'s ThreadSanitizer wants sysctl vm.mmap_rnd_bits=28")
            if done.returncode:
                return True
        return False

    # --- the fake CUDA -------------------------------------------------------------------------

    @cached_property
    def _built(self) -> fake_cuda.Built:
        return fake_cuda.build(self._new())

    def _launch(self, mutant: Mutant, planted: bool) -> bool:
        launch = launch_of(mutant)
        library, root = self._built.library, ROOT
        if planted:
            library, root = fake_cuda.faulty(self._built, mutant, launch.sources, self._new())
        return _found(launch.run(self._built, library, root))

    # --- the CPU's library ---------------------------------------------------------------------

    @cached_property
    def _objects(self) -> Path:
        folder = self._new()
        sources = [
            "module.cpp",
            *(f"cpu/{p.name}" for p in sorted((ROOT / "csrc/cpu").glob("*.cpp"))),
        ]
        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(self._compile, s, ROOT / "csrc", folder) for s in sources]:
                job.result()
        return folder

    def _compile(self, source: str, csrc: Path, folder: Path) -> None:
        level = {"AVX512": "512", "AVX2": "256"}.get(torch.backends.cpu.get_cpu_capability(), "128")
        include = fake_cuda.TORCH / "include"
        folders = (include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"])
        paths = [part for path in folders for part in ("-isystem", str(path))]
        defined = (f"-DFASTTAX_ONE_ISA={level}", fake_cuda.TARGET)
        out = folder / f"{Path(source).name}.o"
        done = run("g++", *CPU_FLAGS, *defined, *paths, "-c", csrc / source, "-o", out)
        if done.returncode:
            raise Broken(done.stderr[-3000:])

    def _cpu(self, mutant: Mutant, planted: bool) -> bool:
        source = mutant.killer.split()[1]
        folder = self._csrc(mutant, planted)
        self._compile(f"cpu/{source}", folder / "csrc", folder)
        others = [p for p in sorted(self._objects.glob("*.o")) if p.name != f"{source}.o"]
        out = self._tree / "fasttax/_C.abi3.so"
        out.unlink(missing_ok=True)
        libraries = ("-Wl,--no-as-needed", "-ltorch_cpu", "-lc10")
        done = run(
            "g++", "-shared", "-o", out, *folder.glob("*.o"), *others, *fake_cuda.PATH, *libraries
        )
        if done.returncode:
            raise Broken(done.stderr[-3000:])
        words = "not reference-"
        rounds = CPU_TESTS[source] if planted else CPU_TESTS[source][:1]
        return any(_found(_pytest(self._tree, files, words)) for files in rounds)

    # --- Triton's interpreter ------------------------------------------------------------------

    def _triton(self, mutant: Mutant, planted: bool) -> bool:
        files, words = INTERPRETED[mutant.killer.split()[1]]
        path = self._tree / mutant.file
        before = path.read_text()
        if planted:
            mutant.plant(self._tree)
        try:
            # the Fisher's tests start the interpreter themselves
            interpreted = {"FASTTAX_BACKEND": "triton", "TRITON_INTERPRET": "1"}
            given = {} if "in_the_interpreter" in words else interpreted
            return _found(_pytest(self._tree, files, words, **given))
        finally:
            path.write_text(before)


class Launch(NamedTuple):
    """Which cases on the fake CUDA find a fault, and what is compiled again."""

    driver: int
    sources: tuple[str, ...]
    words: str  # pytest's -k
    cases: str  # of fake_cuda.CASES

    def run(self, built: fake_cuda.Built, library: Path, root: Path) -> Done:
        options = ("-x", "-k", self.words)
        return fake_cuda.pytest_on(
            built, *options, library=library, root=root, driver=self.driver, cases=self.cases
        )


def launch_of(mutant: Mutant) -> Launch:
    """As the catalog says it of a launch's fault."""
    match = re.fullmatch(r"launch(?:@(\d+))? ([^:]*): (.+)", mutant.killer)
    assert match, f"{mutant.source}: expected 'launch SOURCES: CASES', got {mutant.killer!r}"
    driver, what, words = int(match[1] or 13000), match[2], match[3]
    if what in fake_cuda.CASES:
        return Launch(driver, (), words, what)
    sources = tuple(name for name in what.split(",") if name != "none")
    return Launch(driver, sources, words, "csrc")
