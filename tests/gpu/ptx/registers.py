"""Where a program's values lie: a slot of 32 lanes for a register or constant, two for 64 bits."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.gpu.ptx.text import BYTES, PtxError

# by the machine's enum Special
SPECIALS = {
    name: number
    for number, name in enumerate(
        (
            *(f"%{of}.{axis}" for of in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
            "%laneid",
            "%warpid",
            "%cluster_ctarank",
            "%cluster_nctarank",
            "%clusterid.x",
            "%nclusterid.x",
        )
    )
}
SAME = {"%cluster_ctaid.x": "%cluster_ctarank", "%cluster_nctaid.x": "%cluster_nctarank"}
DECLARED = re.compile(r"([\w$%]+)(?:<(\d+)>)?")
NUMBERED = re.compile(r"^(.*?)(\d+)$")


class Register(NamedTuple):
    slot: int
    bits: int  # 1: a predicate


class Registers:
    """Slots by name, in nested scopes: inline assembly declares registers of its own."""

    def __init__(self) -> None:
        self.count = 0
        self.constants: dict[tuple[int, int], int] = {}  # (bits, value) -> slot
        self.specials = [-1] * len(SPECIALS)
        self._scopes: list[dict[str, int | Register]] = [{}]  # a prefix -> bits, a name -> register

    def new(self, bits: int) -> Register:
        register = Register(self.count, bits)
        self.count += 2 if bits == 64 else 1
        return register

    def open(self) -> None:
        self._scopes.append({})

    def close(self) -> None:
        self._scopes.pop()

    def declare(self, words: str) -> None:
        """`.reg .f32 %f<12>`, `.reg .pred p, q`; a function's argument `.param .b64 param0` too."""
        parts = words.split(None, 2)
        kind = parts[1].lstrip(".")
        if kind == "align":
            raise PtxError(f"a parameter of a call that is no number: {words}")
        bits = 1 if kind == "pred" else 8 * max(BYTES[kind], 2)
        for name, count in DECLARED.findall(parts[2]):
            self._scopes[-1][name] = bits if count else self.new(bits)

    def name(self, name: str, register: Register) -> None:
        """Another name for it, in this scope."""
        self._scopes[-1][name] = register

    def find(self, name: str) -> Register:
        for scope in reversed(self._scopes):
            found = scope.get(name)
            if isinstance(found, Register):
                return found
            numbered = NUMBERED.match(name)
            bits = scope.get(numbered[1]) if numbered else None
            if isinstance(bits, int):
                made = scope[name] = self.new(bits)
                return made
        name = SAME.get(name, name)
        if name in SPECIALS:
            slot = self.specials[SPECIALS[name]]
            if slot < 0:
                slot = self.specials[SPECIALS[name]] = self.new(32).slot
            return Register(slot, 32)
        raise PtxError(f"no register {name}")

    def constant(self, value: int, bits: int) -> Register:
        """The slot of a number, as its bits."""
        bits = 64 if bits == 64 else 32
        value &= (1 << bits) - 1
        slot = self.constants.get((bits, value))
        if slot is None:
            slot = self.constants[bits, value] = self.new(bits).slot
        return Register(slot, bits)
