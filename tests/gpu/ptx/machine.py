"""Kernels in PTX, executed: what a launch read, wrote and did wrong.

memory = Memory()
memory.add(x, "x", readonly=True)
kernel = Module(ptx).kernel("kl_forward")
report = kernel.run(memory, grid=(4, 1, 1), block=(256, 1, 1), arguments=struct)
assert not report.faults
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from tests.gpu.ptx import text
from tests.gpu.ptx.encoder import DYNAMIC
from tests.gpu.ptx.library import library
from tests.gpu.ptx.program import Program
from tests.gpu.ptx.text import PtxError

Size = tuple[int, int, int]
MOST_STEPS = 400_000_000  # instructions of a warp; 10 seconds
CODE = np.dtype(
    [
        ("run", "u8"),
        ("immediate", "i8"),
        ("slot", "i4"),
        ("guard", "i4"),
        ("negated", "i4"),
        ("target", "i4"),
    ]
)
CONSTANT = np.dtype([("slot", "i4"), ("wide", "i4"), ("bits", "u8")])
TRAFFIC = np.dtype([("bytes", "u8"), ("sectors", "u8"), ("missed", "u8")])
SECTOR = 32  # bytes that memory moves at least


class LaunchArgs(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("dynamic_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("params", ctypes.c_char_p),
        ("param_bytes", ctypes.c_uint32),
        ("most_steps", ctypes.c_uint64),
    ]


class Memory:
    """What kernels may touch: tensors by their names."""

    def __init__(self) -> None:
        self._library = library()
        self.handle = self._library.ptx_memory()
        self._held: list[Tensor] = []

    def __del__(self) -> None:
        self._library.ptx_memory_delete(self.handle)

    def add(
        self,
        t: Tensor,
        name: str,
        *,
        readonly: bool = False,
        torn: bool = False,
        written: bool = True,
    ) -> Tensor:
        """The memory from the first to the last entry of a tensor on the CPU, which it is kept for.

        Args:
            t: what a kernel is given.
            name: in reports.
            readonly: a kernel that writes it is at fault.
            torn: vectors may reach into entries that other threads write at the same time, and
                drop them: a read that meets a write is no fault.
            written: False: a kernel that reads it before it has written is at fault.
        """
        if t.numel() == 0:
            return t
        self._held.append(t)
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        size = (last + 1) * t.element_size()
        grain = t.element_size()
        self._library.ptx_add(
            self.handle, t.data_ptr(), size, name.encode(), readonly, torn, written, grain
        )
        return t

    def add_bytes(self, base: int, size: int, name: str, grain: int, written: bool) -> None:
        self._library.ptx_add(self.handle, base, size, name.encode(), False, False, written, grain)

    def written_by_host(self, base: int, size: int) -> None:
        self._library.ptx_write(self.handle, base, size)

    def unwritten(self, t: Tensor) -> int:
        """How many bytes of a contiguous tensor nobody has written."""
        return int(
            self._library.ptx_unwritten(self.handle, t.data_ptr(), t.numel() * t.element_size())
        )


def array(address: int, count: int, dtype: Any) -> Any:
    """A copy of the machine's."""
    kind = np.dtype(dtype)
    if count == 0:
        return np.empty(0, kind)
    data = ctypes.string_at(address, count * kind.itemsize)
    return np.frombuffer(data, kind)


class Report:
    """What a launch did.

    Attributes:
        kernel: its name.
        faults: in words, each once for an instruction, with the instruction.
        read, written: bytes of global memory, in whole sectors of 32, but for what a block's
            share of a cache holds of what it read or wrote shortly before.
        asked, given: bytes that the threads asked for and gave.
        instructions: executed by all warps.
        opcodes: the same by opcode.
    """

    def __init__(self, kernel: Kernel, launch: int) -> None:
        called = library()
        self.kernel = kernel.name
        self.faults = [fault_in_words(kernel, launch, k) for k in range(called.ptx_faults(launch))]
        count = len(kernel.program.code)
        executed = array(called.ptx_executed(launch), count, "u8")
        loads = array(called.ptx_loads(launch), count, TRAFFIC)
        stores = array(called.ptx_stores(launch), count, TRAFFIC)
        called.ptx_launch_delete(launch)
        self.read, self.written = (int(t["missed"].sum()) * SECTOR for t in (loads, stores))
        self.asked, self.given = (int(t["bytes"].sum()) for t in (loads, stores))
        self.opcodes: Counter[str] = Counter()
        for index in np.flatnonzero(executed * kernel.counted):
            self.opcodes[kernel.opcode(int(index))] += int(executed[index])
        self.instructions = sum(self.opcodes.values())

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.instructions} instructions, {self.read} bytes read, "
            f"{self.written} written" + "".join(f"\n  {fault}" for fault in self.faults)
        )


def fault_in_words(kernel: Kernel, launch: int, index: int) -> str:
    at, block, thread = (ctypes.c_int32() for _ in range(3))
    count, detail = ctypes.c_uint64(), ctypes.c_char_p()
    kind = library().ptx_fault(
        launch,
        index,
        *(ctypes.byref(v) for v in (at, block, thread, count, detail)),
    )
    coded = kernel.program.code[at.value]
    line = kernel.program.module.line(coded.at)
    words = " ".join(coded.words.split())
    return (
        f"{kind.decode()}: {(detail.value or b'').decode()}; block {block.value}, thread "
        f"{thread.value}, line {line}: {words}; {count.value} times"
    )


class Kernel:
    """An entry, ready to run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.name = program.entry.name
        self._library = library()
        code, slots, constants, variables, specials = self._encoded()
        self._handle = self._library.ptx_program(
            code.ctypes.data,
            len(code),
            slots.ctypes.data,
            len(slots),
            constants.ctypes.data,
            len(constants),
            variables.ctypes.data,
            len(program.variables),
            specials.ctypes.data,
            program.registers.count,
            program.dynamic_at,
        )
        places = np.array([c.at for c in program.code])
        # several of one statement are one instruction of a GPU
        self.counted = np.concatenate(([True], places[1:] != places[:-1]))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.ptx_program_delete(self._handle)

    def _encoded(self) -> tuple[Any, ...]:
        program = self.program
        handlers: dict[str, int] = {}
        rows: list[tuple[Any, ...]] = []
        slots: list[int] = []
        for coded in program.code:
            run = handlers.get(coded.handler)
            if run is None:
                run = handlers[coded.handler] = self._library.ptx_handler(coded.handler.encode())
                if run is None:
                    line = program.module.line(coded.at)
                    raise PtxError(f"{coded.handler} is not simulated: line {line}: {coded.words}")
            immediate = coded.immediate
            if coded.handler.startswith("shared.address") and immediate >= DYNAMIC:
                immediate += program.dynamic_at - DYNAMIC
            target = 0 if coded.target is None else program.labels[coded.target]
            rows.append((run, immediate, len(slots), coded.guard, coded.negated, target))
            slots += coded.slots
        constants = [
            (slot, bits == 64, value) for (bits, value), slot in program.registers.constants.items()
        ]
        variables = [v for place in program.variables.values() for v in place]
        return (
            np.array(rows, CODE),
            np.array(slots, "i4"),
            np.array(constants, CONSTANT),
            np.array(variables, "i4"),
            np.array(program.registers.specials, "i4"),
        )

    def opcode(self, index: int) -> str:
        words = self.program.code[index].words.split(None, 2)
        if not words:
            return "exit"
        return words[1] if words[0].startswith("@") else words[0]

    def run(
        self,
        memory: Memory,
        grid: Size,
        block: Size,
        arguments: bytes,
        *,
        dynamic: int = 0,
        cluster: int = 1,
        seed: int = 1,
        most_steps: int = MOST_STEPS,
    ) -> Report:
        """A launch; `arguments` as the driver lays them out, `dynamic` bytes of shared memory."""
        expected = self.program.entry.parameter_bytes
        if len(arguments) != expected:
            raise PtxError(f"{self.name}: {len(arguments)} bytes of arguments, not {expected}")
        most = self.program.entry.limits.get("reqntid", self.program.entry.limits.get("maxntid"))
        threads = block[0] * block[1] * block[2]
        if threads > 1024 or (most and threads > int(np.prod(most))):
            raise PtxError(f"{self.name}: {threads} threads, of at most {most}")
        triple = ctypes.c_uint32 * 3
        launch = LaunchArgs(
            triple(*grid),
            triple(*block),
            cluster,
            dynamic,
            seed,
            arguments,
            len(arguments),
            most_steps,
        )
        handle = self._library.ptx_run(
            self._handle, memory.handle, ctypes.byref(launch), self.program.grain
        )
        return Report(self, handle)


class Module:
    """A module's kernels, encoded when they are asked for."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._kernels: dict[str, Kernel] = {}

    @cached_property
    def parsed(self) -> text.Module:
        return text.parse(self.source)

    def kernel(self, name: str) -> Kernel:
        """By its mangled name, or by what no other has in its."""
        entries = self.parsed.entries
        if name not in entries:
            (name,) = (n for n in entries if name in n)
        if name not in self._kernels:
            self._kernels[name] = Kernel(Program(self.parsed, entries[name]))
        return self._kernels[name]


def packed(values: Sequence[tuple[int, bytes]]) -> bytes:
    """Arguments at their places."""
    out = bytearray(max((at + len(data) for at, data in values), default=0))
    for at, data in values:
        out[at : at + len(data)] = data
    return bytes(out)
