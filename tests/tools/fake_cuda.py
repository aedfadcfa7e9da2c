"""csrc/cuda's launchers as a library without nvcc or a GPU, and programs run on the fake CUDA.

The kernels are functions of the host, for the SIMT machine (tests/gpu/simt); tests/gpu/fake stands
in for CUDA's runtime under torch and this library alike. A fault is put into a copy of the source,
of which only the objects that it concerns are compiled again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.mutants.catalog import Mutant
from tests.tools.cuda_tools import ROOT, Done, cuda_homes, first, run

FAKE = ROOT / "tests/gpu/fake"
WARNINGS = ("-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fno-strict-aliasing")
TORCH = Path(torch.__file__).parent
PATH = (f"-L{TORCH / 'lib'}",)
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # tools/native_build.py's TORCH_FLOOR


def headers() -> str:
    """The folder of CUDA's own headers."""
    found = first([home / "include/cuda_runtime_api.h" for home in cuda_homes()])
    if found is None or not shutil.which("g++") or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64 and CUDA's headers (cuda_runtime_api.h): a CUDA toolkit")
    if not torch.version.cuda:
        pytest.skip("needs a torch with CUDA, whose calls of the runtime are looked at")
    return str(found.parent)


def _done(done: Done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def build_fake(folder: Path) -> Path:
    """The library that stands in for libcudart.so and libcuda.so.1."""
    out = folder / "libfake_cuda.so"
    sources = sorted(FAKE.glob("*.cpp"))
    options = (
        "-std=c++17",
        "-O1",
        "-g0",
        "-fPIC",
        "-shared",
        *WARNINGS,
        "-Wl,-soname,libcuda.so.1",
    )
    _done(run("g++", *options, "-isystem", headers(), *sources, "-o", out))
    return out


def sources() -> list[str]:
    """What the library is made of, below csrc."""
    cuda = ROOT / "csrc/cuda"
    names = sorted(path.name for part in ("*.cpp", "*.cu") for path in cuda.glob(part))
    return ["module.cpp", *(f"cuda/{name}" for name in names)]


def compile_one(source: str, csrc: Path, folder: Path) -> None:
    """Its object, in `folder`."""
    own: tuple[str, ...]
    if source.endswith(".cu"):
        kernels = ("-x", "c++", "-include", "cuda_runtime.h")
        own = (*kernels, f"-I{FAKE / 'include'}", f"-I{ROOT / 'tests/gpu/simt'}")
    else:
        include = sysconfig.get_paths()["include"]
        folders = (TORCH / "include", TORCH / "include/torch/csrc/api/include", include)
        defined = (
            "-DFASTTAX_MODULE_CUDA",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
        )
        paths = [part for path in folders for part in ("-isystem", str(path))]
        own = ("-fvisibility=hidden", *defined, *paths)
    options = ("-std=c++17", "-O0", "-g0", "-fPIC", *WARNINGS, *own, "-isystem", headers())
    _done(run("g++", *options, "-c", csrc / source, "-o", folder / f"{Path(source).name}.o"))


def link(objects: Sequence[Path], out: Path) -> Path:
    """The library of these objects."""
    libraries = ("-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch_cuda", "-lc10")
    _done(run("g++", "-shared", "-o", out, *objects, *PATH, *libraries))
    return out


class Cases(NamedTuple):
    """Files of tests/gpu, and what they run under."""

    files: tuple[str, ...]
    backend: str = "auto"
    plugins: tuple[str, ...] = ("tests.gpu.fake.plugin",)


EMULATED = ("tests.gpu.fake.plugin", "tests.gpu.fake.emulation")
CASES = {
    "csrc": Cases(("fake/cases.py", "fake/steps.py")),
    "triton": Cases(("fake/triton_cases.py",), "triton", ()),
    "users": Cases(("test_device.py", "test_device_models.py"), plugins=EMULATED),
    "trainers": Cases(
        ("test_device_trainers.py", "../integrations/test_examples.py"), plugins=EMULATED
    ),
}


class Built(NamedTuple):
    fake: Path
    objects: Path  # a folder
    library: Path


def build(folder: Path) -> Built:
    """All of it: half a minute on two cores."""
    headers()
    with ThreadPoolExecutor(2) as pool:
        fake = pool.submit(build_fake, folder)
        jobs = [pool.submit(compile_one, source, ROOT / "csrc", folder) for source in sources()]
        for job in jobs:
            job.result()
        library = link(sorted(folder.glob("*.o")), folder / "_C_cuda.abi3.so")
        return Built(fake.result(), folder, library)


def faulty(built: Built, mutant: Mutant, sources: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """(library, root of the tree to run in) with the fault in it.

    `sources`: those in csrc/cuda that it concerns.
    """
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("csrc", "fasttax", "tests/gpu/fake", "tests/tools", "tests/mutants"):
        shutil.copytree(ROOT / part, tree / part, ignore=ignored)
    files = [f"tests/gpu/{name}" for name in CASES["users"].files]
    for name in (*files, "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    for library in (ROOT / "fasttax").glob("_C.*.so"):
        (tree / "fasttax" / library.name).symlink_to(library)
    mutant.plant(tree)
    if not sources:
        return built.library, tree
    for name in sources:
        compile_one(f"cuda/{name}", tree / "csrc", folder)
    own = sorted(folder.glob("*.o"))
    names = {path.name for path in own}
    others = [path for path in sorted(built.objects.glob("*.o")) if path.name not in names]
    # in this order: of an inline function that several have, the linker takes the first
    return link([*own, *others], folder / "_C_cuda.abi3.so"), tree


def pytest_on(
    built: Built,
    *options: str,
    library: Path | None = None,
    root: Path = ROOT,
    driver: int = 13000,
    cases: str = "csrc",
) -> Done:
    """Pytest's run of some CASES on the fake CUDA."""
    chosen = CASES[cases]
    plugins = [part for plugin in chosen.plugins for part in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(built.fake),
        "FAKE_CUDA_LIBRARY": str(library or built.library),
        "FAKE_CUDA_DRIVER": str(driver),
        "FASTTAX_BACKEND": chosen.backend,
        "PYTHONPATH": str(root),
    }
    return subprocess.run(
        [*command, *options, *(f"tests/gpu/{name}" for name in chosen.files)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
