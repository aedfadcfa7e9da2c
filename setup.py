"""Builds the native libraries; everything declarative is in pyproject.toml.

`fasttax._C` (C++ CPU kernels) is built wherever there is a C++ compiler and torch's headers, `fasttax._C_cuda` where nvcc is
there too (FASTTAX_CUDA=0|1 decides otherwise). With neither, the package installs and runs on its PyTorch reference.
Both use torch's stable C++ ABI and Python's limited API: what is built here loads under every later torch and Python.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

TORCH_FLOOR = "0x020b000000000000"  # 2.11.0: the oldest torch that the built libraries load under
DEFINES = [("TORCH_TARGET_VERSION", TORCH_FLOOR)]
QUIET = ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns of its own AVX-512 headers (PR105593)
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", *QUIET]
CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"


def note(message: str) -> None:
    print(f"fasttax setup: {message}", file=sys.stderr)


def cuda_wanted() -> bool:
    choice = os.environ.get("FASTTAX_CUDA")
    if choice not in (None, "0", "1"):
        raise SystemExit(f"fasttax setup: FASTTAX_CUDA must be 0 (no CUDA kernels) or 1 (CUDA kernels or fail), got {choice!r}")
    if choice == "0":
        return False
    from torch.utils.cpp_extension import CUDA_HOME
    from torch.version import cuda

    missing = [text for text, there in (("nvcc (set CUDA_HOME)", CUDA_HOME), ("a torch built with CUDA", cuda)) if not there]
    if missing and choice == "1":
        raise SystemExit(f"fasttax setup: FASTTAX_CUDA=1 needs {' and '.join(missing)}; install it or unset FASTTAX_CUDA")
    if missing:
        note(f"no CUDA C++ kernels: {' and '.join(missing)} missing (GPUs use the reference)")
    return not missing


def native() -> dict:
    compiler = os.environ.get("CXX", "c++ g++ clang++")
    if not any(shutil.which(name.split()[0]) for name in compiler.split(" ") if name):
        note("no C++ compiler found: installing without native kernels; run on the reference, or install g++ and reinstall")
        return {}
    if Path("/usr/local/cuda/bin/nvcc").exists():  # at its import torch looks beside the nvcc on PATH, which may be a wrapper
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError:
        note("torch is not installed in the build environment: installing without native kernels; "
             "`pip install torch` first, then `pip install --no-build-isolation .`")  # fmt: skip
        return {}
    cpu = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    extensions = [
        CppExtension("fasttax._C", ["csrc/module.cpp", *cpu], define_macros=DEFINES, extra_compile_args=FLAGS, py_limited_api=True)  # fmt: skip
    ]
    if cuda_wanted():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        cuda = sorted(str(path) for suffix in ("*.cpp", "*.cu") for path in Path("csrc/cuda").glob(suffix))
        flags = {"cxx": [*FLAGS, "-DFASTTAX_MODULE_CUDA", "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]}
        kernels = CUDAExtension(
            "fasttax._C_cuda",
            ["csrc/module.cpp", *cuda],
            define_macros=DEFINES,
            extra_compile_args=flags,
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            py_limited_api=True,
        )
        # The runtime inside, its symbols hidden: the wheel needs the driver and torch, not the toolkit it was built with.
        kernels.libraries = [library for library in kernels.libraries if library != "cudart"] + ["cudart_static", "dl", "rt", "pthread"]
        extensions.append(kernels)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(**native(), options={"bdist_wheel": {"py_limited_api": "cp310"}})
