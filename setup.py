"""Builds the native libraries; everything declarative is in pyproject.toml.

`fasttax._C` (C++, CPU) is built wherever there are a C++ compiler and torch's headers,
`fasttax._C_cuda` (CUDA C++) where tools/cuda_build.py finds a use for it. With neither, the package
installs and runs on its PyTorch reference, and so it does where compiling fails. FASTTAX_CPP=1
makes `fasttax._C` or fails with the reason, FASTTAX_CPP=0 leaves both out. What is built, and how,
is in tools/native_build.py.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).resolve().parent


def native() -> dict[str, Any]:
    sys.path.insert(0, str(HERE / "tools"))  # pip runs this file without its folder on the path
    from cuda_build import choice, note

    chosen = choice("FASTTAX_CPP", "C++ kernels")
    cuda = choice("FASTTAX_CUDA", "CUDA kernels")

    def without(reason: str, way_out: str) -> dict[str, Any]:
        for variable, value in (("FASTTAX_CPP", chosen), ("FASTTAX_CUDA", cuda)):
            if value == "1":
                raise SystemExit(f"fasttax setup: {variable}=1, but {reason}; {way_out}")
        note(f"{reason}: installing without native kernels; {way_out}")
        return {}

    if chosen == "0" and cuda == "1":
        raise SystemExit(
            "fasttax setup: FASTTAX_CUDA=1, but FASTTAX_CPP=0 leaves all native kernels out; set "
            "one of the two alone"
        )
    if chosen == "0":
        note("no native kernels, as FASTTAX_CPP=0 says: fasttax runs on its PyTorch reference")
        return {}
    compilers = os.environ.get("CXX", "c++ g++ clang++").split()
    if not any(shutil.which(name) for name in compilers):
        return without("no C++ compiler found", "install g++ and reinstall")
    if Path("/usr/local/cuda/bin/nvcc").exists():
        # At its import torch looks beside the nvcc on PATH, which may be a wrapper elsewhere.
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    # torch looks for ninja on PATH; it may be in an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return without(
            "torch is not in the build environment",
            "`pip install torch ninja` first, then `pip install --no-build-isolation .`",
        )
    from native_build import Build, cpu_kernels

    return {"ext_modules": [cpu_kernels()], "cmdclass": {"build_ext": Build}}


# A free-threaded Python has no limited API: its wheel is for that Python alone.
options = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
setup(**native(), options={"bdist_wheel": options})
