"""What a kernel's machine code says of it: registers, memory, widths, and how many bytes are under
way at once.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.tools.cubins import usage
from tests.tools.cuda_tools import ARITHMETIC, LOAD, basic_blocks, longest_run, machine_code

LOADS, STORES = r"LDG\.E", r"STG\.E"
WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")
BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "": 4}


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
SHIFTED = "KlArgs"  # in the name of a kernel of rows of logits
RESERVED = 1024  # bytes of shared memory that each block takes for the system


class Code(NamedTuple):
    """A kernel's machine code.

    Attributes:
        name: mangled.
        registers, stack: of a thread; bytes.
        spills: accesses of local memory in the code.
        shared: bytes of static shared memory.
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
        """Bytes that a thread has under way before it uses the first of them, of 16 each: on the
        way through the code that has most. Rows of logits have a way for those off alignment, on
        which two vectors are loaded for each, so that half of that counts.
        """
        opcodes = [opcode for block in self.opcodes for opcode in block]
        most = 16 * longest_run(opcodes, LOAD, ARITHMETIC)
        return most // 2 if SHIFTED in self.name else most

    def in_flight(self, arch: str) -> int:
        """The same of an SM that is full."""
        return self.at_once() * self.threads * self.blocks(arch)


def codes(cubin: Path, arch: str, threads: dict[str, int]) -> list[Code]:
    """Of every kernel of a cubin."""
    bodies = machine_code(cubin)
    found = []
    for name, (registers, stack, shared, local) in usage(cubin).items():
        blocks = basic_blocks(bodies[name])
        spills = sum(bool(re.match("LDL|STL", opcode)) for block in blocks for opcode in block)
        if int(arch) >= 90 and shared >= RESERVED:  # there it is in the number
            shared -= RESERVED
        code = Code(name, registers, stack + local, spills, shared, threads[name], blocks)
        found.append(code)
    return found
