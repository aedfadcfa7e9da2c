"""What the rules of rules.py encode instructions with: slots of operands, addresses, a program that
grows.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from tests.gpu.ptx.registers import Register, Registers
from tests.gpu.ptx.text import BYTES, Entry, Module, PtxError

ADDRESS = re.compile(r"^\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
NUMBER = re.compile(r"^-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
FLOAT = re.compile(r"^-?0[fFdD][0-9a-fA-F]+$")
GAP = 16  # bytes between shared variables, so that one's end is not the next one's beginning
DYNAMIC = 1 << 40  # in place of where the launch's shared memory begins, until that is known


def width(kind: str) -> int:
    return 8 * BYTES[kind]


class Coded(NamedTuple):
    handler: str
    slots: tuple[int, ...]
    immediate: int
    guard: int
    negated: bool
    target: str | None
    at: int  # in the module's text
    words: str


def operands(words: str) -> list[str]:
    """Split at commas outside of braces, brackets and parentheses."""
    found, depth, begin = [], 0, 0
    for k, letter in enumerate(words):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            found.append(words[begin:k].strip())
            begin = k + 1
    last = words[begin:].strip()
    return [*found, last] if last else found


def number(words: str) -> int:
    """The bits of a literal."""
    if NUMBER.match(words):
        return int(words.rstrip("U"), 0)
    if FLOAT.match(words):
        return int(words.lstrip("-")[2:], 16)
    try:
        return int(struct.unpack("<I", struct.pack("<f", float(words)))[0])
    except ValueError:
        raise PtxError(f"an operand {words!r}") from None


class Encoder:
    """A program as it grows.

    Attributes:
        code: its instructions.
        labels: where each name stands in `code`.
        registers: the slots.
        variables: a shared variable's place and size.
        grain: how many bytes of shared memory are watched together: the narrowest access's.
    """

    def __init__(self, module: Module, entry: Entry) -> None:
        self.module, self.entry = module, entry
        self.code: list[Coded] = []
        self.labels: dict[str, int] = {}
        self.registers = Registers()
        self.variables: dict[str, tuple[int, int]] = {}
        self.shared_end = 0
        self.grain = 4
        self.at, self.words = 0, ""  # of the statement that is being encoded
        self.guard = (-1, False)
        self._parameters = {p.name: p.at for p in entry.parameters}

    def place_variable(self, name: str, align: int, size: int) -> None:
        align = max(align, GAP)
        at = -(-self.shared_end // align) * align
        self.variables[name] = (at, size)
        self.shared_end = at + size + GAP

    def emit(
        self, handler: str, slots: tuple[int, ...], immediate: int = 0, target: str | None = None
    ) -> None:
        self.code.append(Coded(handler, slots, immediate, *self.guard, target, self.at, self.words))

    def into(self, word: str, bits: int) -> Register:
        """A destination; `_` is one that nobody reads."""
        return self.registers.new(bits) if word == "_" else self.register(word, bits)

    def register(self, word: str, bits: int) -> Register:
        """That of a name, which must be as wide as the instruction takes it."""
        register = self.registers.find(word)
        if (register.bits == 64) != (bits == 64) or (register.bits == 1) != (bits == 1):
            raise PtxError(f"{word} has {register.bits} bits, not {bits}")
        return register

    def value(self, word: str, bits: int) -> int:
        """The slot of an operand: a register, a literal, the address of a variable."""
        if word.startswith("!"):
            register = self.registers.new(1)
            source = self.registers.find(word[1:]).slot
            self.emit("not.pred", (register.slot, source, source))
            return register.slot
        if word[0] in "-0123456789" and not word.startswith("%"):
            return self.registers.constant(number(word), bits).slot
        if word in self._parameters:
            return self.registers.constant(self._parameters[word], bits).slot
        if (offset := self.shared(word)) is not None:
            register = self.registers.new(bits)
            guard, self.guard = self.guard, (-1, False)
            self.emit(f"shared.address.b{bits}", (register.slot,), offset)
            self.guard = guard
            return register.slot
        return self.register(word, bits).slot

    def shared(self, name: str) -> int | None:
        """A shared variable's place."""
        if name in self.variables:
            return self.variables[name][0]
        found = self.module.shared.get(name)
        if found is None:
            return None
        if found.bytes == 0:
            return DYNAMIC
        self.place_variable(name, found.align, found.bytes)
        return self.variables[name][0]

    def address(self, word: str) -> tuple[int, int]:
        """The slot of an address's base, and the offset."""
        match = ADDRESS.match(word)
        if match is None:
            raise PtxError(f"an address {word!r}")
        base, offset = match.groups()
        if base.startswith("%") and self.registers.find(base).bits == 32:
            wide = self.registers.new(64)
            self.emit("cvt.u64.u32", (wide.slot, self.registers.find(base).slot))
            return wide.slot, int(offset or "0", 0)
        return self.value(base, 64), int(offset or "0", 0)

    def watch(self, size: int) -> None:
        """That shared memory is read or written so many bytes at a time."""
        self.grain = min(self.grain, size)
