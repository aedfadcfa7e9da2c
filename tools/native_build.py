"""The two native libraries as extensions, and the command that builds them. Needs torch.

Both use torch's stable C++ ABI and Python's limited API: what is built here loads under every later
torch and Python. A free-threaded Python has no limited API; there they are that Python's alone.
"""

import os
import sysconfig
from pathlib import Path
from typing import ClassVar

import torch
from cuda_build import cuda_wanted, note
from setuptools import Extension
from setuptools.errors import CCompilerError
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

TORCH_FLOOR = "0x020b000000000000"  # 2.11.0: the oldest torch that the built libraries load under
QUIET = [
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-uninitialized",  # gcc 12 warns of its own AVX-512 headers (PR105593)
    "-Wno-maybe-uninitialized",
    "-Wno-bitwise-instead-of-logical",  # of clang: of vectors there is no other
    "-Wno-unknown-warning-option",  # each compiler knows a few of these
]
FLAGS = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", *QUIET]
# Python's own flags ask for -g: without it all compiles a fifth sooner, to a tenth of the size.
FAST = ["-O3", "-g0"]
QUICK = ["-O1", "-g0"]  # compiles 2.3 times sooner than -O3
DEBUG = ["-O1", "-g"]
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
FORCED_BY = {"fasttax._C": "FASTTAX_CPP", "fasttax._C_cuda": "FASTTAX_CUDA"}
LEVELS = {"AVX512": "512", "AVX2": "256"}  # torch's names of what this CPU runs; the rest is 128
ISA_HELP = "compile the CPU kernels for one instruction set only: native, 512, 256 or 128"


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def cpu_kernels(isa: str | None = None, debug: bool | None = False) -> Extension:
    optimise = QUICK if isa else FAST
    one = [("FASTTAX_ONE_ISA", isa)] if isa else []
    return CppExtension(
        "fasttax._C",
        ["csrc/module.cpp", *files("cpu/*.cpp")],
        depends=files("*/*.h"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR), *one],
        extra_compile_args=[*FLAGS, *(DEBUG if debug else optimise)],
        py_limited_api=LIMITED_API,
    )


def cuda_kernels() -> Extension:
    kernels = CUDAExtension(
        "fasttax._C_cuda",
        ["csrc/module.cpp", *files("cuda/*.cpp", "cuda/*.cu")],
        depends=files("*/*.h", "*/*.cuh"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR)],
        extra_compile_args={
            "cxx": [*FLAGS, *FAST, "-DFASTTAX_MODULE_CUDA", "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        py_limited_api=LIMITED_API,
    )
    # The runtime inside, its symbols hidden: the wheel needs the driver and torch, not the toolkit.
    shared = [library for library in kernels.libraries if library != "cudart"]
    kernels.libraries = [*shared, "cudart_static", "dl", "rt", "pthread"]
    return kernels


class Build(BuildExtension):
    """`build_ext` with --isa; --debug compiles for a debugger.

    What is built in place keeps its objects, in one folder for each set of options, so that ninja
    compiles those whose source, headers or flags have changed, and no others.
    """

    user_options: ClassVar = [*BuildExtension.user_options, ("isa=", None, ISA_HELP)]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.isa: str | None = None
        self.asked_for = False  # in place, for whoever runs build_ext

    def finalize_options(self) -> None:
        if self.isa == "native":
            self.isa = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "128")
        if self.isa not in (None, "512", "256", "128"):
            raise SystemExit(
                f"fasttax setup: --isa must be native, 512, 256 or 128, got {self.isa}"
            )
        extensions = [cpu_kernels(self.isa, self.debug)]
        if cuda_wanted():
            extensions.append(cuda_kernels())
        self.distribution.ext_modules = extensions
        super().finalize_options()

    def run(self) -> None:
        # to be seen here: setuptools' run() says False while it compiles
        self.asked_for = bool(self.inplace) and not self.editable_mode
        if self.inplace:
            folder = f"isa{self.isa}" if self.isa else "all"
            self.build_temp = f"build/{folder}{'-debug' if self.debug else ''}"
            if not self.editable_mode:  # pip hands over a folder that it looks into afterwards
                self.build_lib = f"{self.build_temp}/lib"
        package = Path("fasttax") if self.inplace else Path(self.build_lib, "fasttax")
        for library in package.glob("_C*.so"):  # of other sources, or not built any more
            library.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Each library has its own folder: module.cpp is in both, with other flags.

        One that does not compile leaves an installation without it, unless it was asked for.
        """
        folder, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
        try:
            super().build_extension(ext)
        except (CCompilerError, RuntimeError) as error:  # torch's ninja raises RuntimeError
            variable = FORCED_BY[ext.name]
            if self.asked_for or os.environ.get(variable) == "1":
                raise
            note(
                f"{ext.name} did not compile (the compiler's messages are above): installing "
                f"without it. {variable}=1 makes this an error, {variable}=0 does not try. {error}"
            )
            ext.optional = True  # nobody waits for its file
        finally:
            self.build_temp = folder
