"""What a kernel's machine code says of it: registers, memory, widths, and how many bytes are under
way at once.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.tools.cuda_tools import ARITHMETIC, LOAD, basic_blocks, longest_run, machine_code

LOADS, STORES = r"LDG\.E", r"STG\.E"
WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")
BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "": 4}
USAGE = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_\d+a?'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Limits(NamedTuple):
    """Of a multiprocessor."""

    threads: int
    blocks: int
    shared: int  # bytes


SM = {
    "80": Limits(2048, 32, 164 << 10),
    "90": Limits(2048, 32, 228 << 10),
    "100": Limits(2048, 32, 228 << 10),
    "120": Limits(1536, 24, 100 << 10),
}
REGISTERS = 65536
RESERVED = 1024  # bytes of shared memory that each block takes for the system


class Code(NamedTuple):
    """A kernel's machine code.

    Attributes:
        name: mangled.
        registers, stack, spills, shared: of a thread; bytes; of static shared memory.
        threads: of a block.
        opcodes: in their order, of each basic block.
    """

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    opcodes: list[list[str]]

    def blocks(self, arch: str) -> int:
        """How many an SM holds at once."""
        limits = SM[arch]
        by_warp = -(-self.registers * 32 // 256) * 256
        warps = -(-self.threads // 32)
        by_registers = REGISTERS // 4 // by_warp * 4 // warps
        by_shared = limits.shared // (self.shared + RESERVED)
        return min(by_registers, limits.threads // self.threads, limits.blocks, by_shared)

    def occupancy(self, arch: str) -> float:
        return self.blocks(arch) * self.threads / SM[arch].threads

    def widths(self, of: str) -> Counter[int]:
        """Bytes of an access -> how many there are."""
        found: Counter[int] = Counter()
        for opcode in (one for block in self.opcodes for one in block if re.match(of, one)):
            match = WIDTH.search(opcode)
            found[BYTES[match[1] if match else ""]] += 1
        return found

    def at_once(self) -> int:
        """Bytes that a thread has under way before it uses the first of them, of 16 each."""
        return 16 * max(longest_run(block, LOAD, ARITHMETIC) for block in self.opcodes)

    def in_flight(self, arch: str) -> int:
        """The same of an SM that is full."""
        return self.at_once() * self.threads * self.blocks(arch)


def codes(report: str, cubin: Path, threads: dict[str, int]) -> list[Code]:
    """Of every kernel of a cubin; `report`: what ptxas -v said of it."""
    bodies = machine_code(cubin)
    found = []
    for name, stack, stores, loads, registers, rest in USAGE.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Code(
                name,
                int(registers),
                int(stack),
                int(stores) + int(loads),
                int(shared[1]) if shared else 0,
                threads[name],
                basic_blocks(bodies[name]),
            )
        )
    return found
