"""Triton's kernels on the machine: a driver for a GPU that is not there, whose launches take CPU
tensors. Kernels are compiled as on that GPU; their PTX is run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget

from fasttax.triton import MODULES, implementation
from tests.gpu.ptx.machine import Memory, Module, packed
from tests.gpu.ptx.simulation import Simulation
from tests.gpu.ptx.text import PtxError

PROPERTIES = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "max_num_regs": 65536,
    "warpSize": 32,
}
FORMATS = {
    "i1": "b",
    "u1": "B",
    **{
        f"{sign}{bits}": of
        for bits, of in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
        for sign in "i"
    },
    **{f"u{bits}": of for bits, of in ((8, "B"), (16, "H"), (32, "I"), (64, "Q"))},
    "fp32": "f",
    "fp64": "d",
}
_modules: dict[str, Module] = {}


def flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of each argument that the kernel is given; tuples are given one by one."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def bytes_of(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        address = value.data_ptr() if isinstance(value, Tensor) else int(value or 0)
        return struct.pack("<Q", address)
    if kind not in FORMATS:
        raise PtxError(f"an argument of type {kind}")
    return struct.pack("<" + FORMATS[kind], value)


class Launcher:
    """What Triton makes for each compiled kernel, and calls."""

    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self._driver, self._metadata = driver, metadata
        self._kinds = list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        _, _, _, _, *arguments = rest  # the metadata and the hooks
        source, name, shared = function
        module = _modules.setdefault(source, Module(source))
        kernel = module.kernel(name)
        values = [bytes_of(*one) for one in flat(self._kinds, arguments)]
        places = [parameter.at for parameter in kernel.program.entry.parameters]
        # two of scratch memory, which these kernels do not take
        values += [bytes(8)] * (len(places) - len(values))
        simulation = self._driver.simulation
        report = kernel.run(
            simulation.memory,
            (x, y, z),
            (32 * self._metadata.num_warps, 1, 1),
            packed(list(zip(places, values, strict=True))),
            dynamic=shared,
            seed=simulation.seed,
        )
        simulation.reports.append(report)


class Utils:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        source = Path(self._driver.loading[f"{name}.ptx"]).read_text()
        return source, (source, name, shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> Mapping[str, int]:
        return PROPERTIES

    def unload_module(self, module: Any) -> None:
        pass


class Driver:
    """As triton.runtime.driver.active is asked; one for each architecture, for Triton keeps what it
    has compiled by the device's number.
    """

    binary_ext = "cubin"

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.simulation = Simulation()  # the running one
        self.loading: Mapping[str, str] = {}  # files of the kernel that is being loaded
        self.utils = Utils(self)

    def on_load(self, module: Any, function: Any, name: str, files: Any, key: str) -> None:
        self.loading = files

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(current_device=lambda: 0)


class Watch(TorchDispatchMode):
    """Tells the memory of every tensor that torch's ops make, and of what they write."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory
        self._held: list[Tensor] = []  # so that no other tensor gets their place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        empty = "empty" in func.name()
        for t in made:
            if isinstance(t, Tensor):
                self._tell(t, not empty)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in given if isinstance(given, list | tuple) else (given,):
                    self._tell(t, True)
        return result

    def _tell(self, t: Tensor, written: bool) -> None:
        storage = t.untyped_storage()
        if storage.nbytes() == 0 or t.device.type != "cpu":
            return
        known = any(h.untyped_storage().data_ptr() == storage.data_ptr() for h in self._held)
        if known:
            if written:
                self._memory.written_by_host(storage.data_ptr(), storage.nbytes())
            return
        self._held.append(t)
        words = f"a tensor of torch's {tuple(t.shape)}"
        grain = t.element_size()
        self._memory.add_bytes(storage.data_ptr(), storage.nbytes(), words, grain, written)


OPS = SimpleNamespace(**{op: implementation(op) for op in MODULES})
DRIVERS = {arch: Driver(arch) for arch in (80, 90)}


@contextmanager
def simulated(arch: int = 90) -> Iterator[Simulation]:
    """Triton's launches run on the machine; their faults are raised at the end.

    Tensors that exist before must be given to the simulation; the ops' own are known.
    """
    driver = DRIVERS[arch]
    simulation = driver.simulation = Simulation()
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(knobs.runtime, "kernel_load_start_hook", driver.on_load),
        Watch(simulation.memory),
    ):
        yield simulation
    simulation.check()
