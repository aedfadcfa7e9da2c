"""Builds the native libraries; everything declarative is in pyproject.toml.

`fasttax._C` (C++, CPU) is built wherever there are a C++ compiler and torch's headers,
`fasttax._C_cuda` (CUDA C++) where tools/cuda_build.py finds a use for it. With neither, the package
installs and runs on its PyTorch reference. What is built, and how, is in tools/native_build.py.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).resolve().parent


def native() -> dict[str, Any]:
    sys.path.insert(0, str(HERE / "tools"))  # pip runs this file without its folder on the path
    from cuda_build import note

    compilers = os.environ.get("CXX", "c++ g++ clang++").split()
    if not any(shutil.which(name) for name in compilers):
        note(
            "no C++ compiler found: installing without native kernels; run on the reference, or "
            "install g++ and reinstall"
        )
        return {}
    if Path("/usr/local/cuda/bin/nvcc").exists():
        # At its import torch looks beside the nvcc on PATH, which may be a wrapper elsewhere.
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    # torch looks for ninja on PATH; it may be in an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        note(
            "torch is not in the build environment: installing without native kernels; "
            "`pip install torch ninja` first, then `pip install --no-build-isolation .`"
        )
        return {}
    from native_build import Build, cpu_kernels

    return {"ext_modules": [cpu_kernels()], "cmdclass": {"build_ext": Build}}


setup(**native(), options={"bdist_wheel": {"py_limited_api": "cp310"}})
