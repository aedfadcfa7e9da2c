"""The CUDA library of csrc/cuda, whole, without a GPU: its torch side on CPU tensors, its launchers
on a runtime that hands launches over, its kernels' PTX on the machine.

The ops are torch.ops.fasttax_ptx's, of the names and schemas of fasttax's.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import fasttax  # noqa: F401  (registers the ops whose schemas are taken)
from tests.gpu.ptx.library import HERE, kept, run
from tests.gpu.ptx.machine import Module
from tests.gpu.ptx.simulation import Simulation
from tests.tools.cuda_tools import ROOT, nvcc

SOURCES = ("kl_gradient", "kl_both", "kl", "ewc", "adamw", "weigh", "fisher")  # the longest first
TORCH_FLOOR = "0x020b000000000000"
NAME = "libfasttax_ptx.so"
HIDDEN = "-Xcompiler=-fPIC,-fvisibility=hidden"
OPS = (
    "token_kl",
    "token_kl_grad",
    "token_kl_backward",
    "token_kl_backward_",
    "token_stats",
    "token_stats_backward",
    "ewc_penalty",
    "ewc_penalty_backward",
    "ewc_add_grad_",
    "ewc_prox_",
    "ewc_adamw_",
    "accumulate_sqgrad_",
    "token_weights",
    "weigh_tokens",
    "weigh_tokens_backward",
    "scale_held_",
)


class Gpu(NamedTuple):
    """What a launcher asks of one, in the order of runtime.cpp's Device."""

    multiprocessors: int
    block_limit: int  # bytes of shared memory
    sm_limit: int
    major: int
    minor: int = 0
    driver: int = 13000


GPUS = {
    "80": Gpu(108, 166912, 167936, 8),
    "90": Gpu(132, 232448, 233472, 9),
}
SMALL = GPUS["90"]._replace(multiprocessors=1)  # one that no launch leaves half empty


def build(folder: Path, arch: str, csrc: Path) -> None:
    includes = [f"-I{path}" for path in include_paths()]
    side = ["-include", HERE / "cuda/torch_side.h", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
    code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    kernels = [nvcc(), "-O3", "-std=c++17", code, "-Xfatbin=-compress=false", "--cudart=none"]
    side_flags = ["g++", *common, "-O1", "-DUSE_CUDA", *includes, *side]
    jobs: list[tuple[list[object], Path]] = [
        *(([*kernels, HIDDEN], csrc / f"cuda/{name}.cu") for name in SOURCES),
        *((side_flags, source) for source in sorted(csrc.glob("cuda/*_torch.cpp"))),
        (["g++", *common, "-O1"], HERE / "cuda/runtime.cpp"),
    ]

    def compiled(job: tuple[list[object], Path]) -> Path:
        command, source = job
        out = folder / f"{source.name}.o"
        run([*command, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    libraries = [f"-L{path}" for path in library_paths()]
    run(["g++", "-shared", *objects, *libraries, "-ltorch_cpu", "-o", folder / NAME])
    for done in objects:
        done.unlink()


def built(arch: str) -> Path:
    """The folder of the library."""
    csrc = ROOT / "csrc"
    sources = [p for p in csrc.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    sources = [p for p in sources if p.parent.name != "cpu"]
    return kept(
        f"cuda{arch}",
        [*sources, *(HERE / "cuda").iterdir()],
        lambda folder: build(folder, arch, csrc),
        f"{arch} {torch.__version__} {os.environ.get('CUDA_HOME')}",
    )


def modules(arch: str) -> list[str]:
    """The PTX that is in it."""
    data = (built(arch) / NAME).read_bytes()
    texts = (found[0].rstrip(b"\0").decode() for found in re.finditer(rb"\n\.version[^\0]*", data))
    return [text for text in texts if ".entry" in text]


@cache
def library(arch: str) -> ctypes.CDLL:
    """Loaded once in a process: its ops take the place of any other architecture's."""
    folder = built(arch)
    schemas = torch.library.Library("fasttax_ptx", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.fasttax, op).default._schema)
        schemas.define(schema.removeprefix("fasttax::"))
    loaded = ctypes.CDLL(str(folder / NAME))
    loaded._schemas = schemas  # type: ignore[attr-defined]  # alive as long as the library
    return loaded


ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
ON_MADE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_modules: dict[str, Module] = {}


def arguments_of(module: Module, name: str, given: Any) -> bytes:
    entry = module.parsed.entries[name]
    out = bytearray(entry.parameter_bytes)
    for k, parameter in enumerate(entry.parameters):
        out[parameter.at : parameter.at + parameter.bytes] = ctypes.string_at(
            given[k], parameter.bytes
        )
    return bytes(out)


class CudaSimulation(Simulation):
    """torch.ops.fasttax_ptx, whose own tensors are known.

    Attributes:
        ops: they.
        edit: what is made of each module's PTX before it runs: a fault, to see it found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Any = torch.ops.fasttax_ptx
        self.edit: Callable[[str], str] = str

    def launch(self, name: bytes, source: bytes, geometry: Any, shared: int, given: Any) -> int:
        try:
            text = self.edit(source.decode())
            module = _modules.get(text)
            if module is None:
                module = _modules[text] = Module(text)
            x, y, z, a, b, c, cluster = geometry[:7]
            kernel = name.decode()
            self.reports.append(
                module.kernel(kernel).run(
                    self.memory,
                    (x, y, z),
                    (a, b, c),
                    arguments_of(module, kernel, given),
                    dynamic=shared,
                    cluster=cluster,
                    seed=self.seed,
                )
            )
        except BaseException as error:  # a C frame is above: it is raised at the end
            self.failed.append(error)
            return 999
        return 0

    def made(self, data: int, size: int, grain: int, written: int) -> None:
        self.memory.add_bytes(data, size, f"a result of {size} bytes", grain, bool(written))


@contextmanager
def simulated(arch: str = "90", gpu: Gpu | None = None) -> Iterator[CudaSimulation]:
    """A simulation of one GPU; faults and errors of its launches are raised at the end."""
    loaded = library(arch)
    simulation = CudaSimulation()
    on_launch, on_made = ON_LAUNCH(simulation.launch), ON_MADE(simulation.made)
    device = (ctypes.c_int * len(Gpu._fields))(*(gpu or GPUS[arch]))
    loaded.ptx_set_device(device)
    loaded.ptx_set_launch(on_launch)
    loaded.ptx_set_made(on_made)
    try:
        yield simulation
    except RuntimeError as error:
        raise simulation.failed[0] if simulation.failed else error from None
    finally:
        loaded.ptx_set_launch(ctypes.cast(None, ON_LAUNCH))
        loaded.ptx_set_made(ctypes.cast(None, ON_MADE))
    simulation.check()
