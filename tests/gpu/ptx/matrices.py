"""How the instructions of tensor cores are encoded: see tensor.cpp."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.gpu.ptx.encoder import Encoder, operands
from tests.gpu.ptx.text import PtxError

ENTRIES = {"bf16": 0, "f16": 1, "tf32": 2}
SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
Rule = Callable[[Encoder, list[str], list[str]], None]


def registers_of(encoder: Encoder, word: str) -> tuple[int, ...]:
    return tuple(encoder.into(name, 32).slot for name in operands(word.strip("{}")))


def ldmatrix(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    """And stmatrix, whose address comes first."""
    stores = parts[0] == "stmatrix"
    if "m8n8" not in parts or parts[-1] != "b16":
        raise PtxError("a matrix that is not 8x8 of 16 bits")
    values, address = arguments[::-1] if stores else arguments
    base, offset = encoder.address(address)
    slots = registers_of(encoder, values)
    trans = ".trans" if "trans" in parts else ""
    handler = f"{parts[0]}{trans}.x{len(slots)}"
    encoder.watch(4)
    encoder.emit(handler, (base, *slots) if stores else (*slots, base), offset)


def shape_of(parts: list[str], rows: int) -> int:
    match = next(filter(None, map(SHAPE.fullmatch, parts)), None)
    if match is None or int(match[1]) != rows:
        raise PtxError("a product's shape")
    to, a, b = kinds(parts)
    if to != "f32" or a != b or a not in ENTRIES:
        raise PtxError("a product's types")
    return int(match[2]) | int(match[3]) << 12 | ENTRIES[a] << 20


def kinds(parts: list[str]) -> tuple[str, str, str]:
    found = [part for part in parts if part in (*ENTRIES, "f32")]
    if len(found) < 3 or "sp" in parts:
        raise PtxError("a product's types")
    return found[0], found[1], found[2]


def mma(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    if "row" not in parts or "col" not in parts:
        raise PtxError("a product's layout")
    slots = [slot for word in arguments for slot in registers_of(encoder, word)]
    encoder.emit("mma", tuple(slots), shape_of(parts, 16))


def wgmma(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    if parts[1] != "mma_async":  # fences and groups: a product is done when it is met
        encoder.emit("nothing", ())
        return
    to, a, b, scale, *signs = arguments
    if [int(sign) for sign in signs[:2]] != [1, 1]:
        raise PtxError("a product's sign")
    across = [int(flag) for flag in signs[2:]]
    in_registers = a.startswith("{")
    immediate = shape_of(parts, 64) | in_registers << 24
    immediate |= (bool(across) and not in_registers and across[0]) << 25
    immediate |= (bool(across) and across[-1]) << 26
    left = registers_of(encoder, a) if in_registers else (encoder.value(a, 64),)
    if scale.lstrip("-").isdigit():
        raise PtxError("a scale that is no predicate")
    slots = (*registers_of(encoder, to), *left, encoder.value(b, 64), encoder.value(scale, 1))
    encoder.emit("wgmma", slots, immediate)


MATRICES: dict[str, Rule] = {
    "ldmatrix": ldmatrix,
    "stmatrix": ldmatrix,
    "mma": mma,
    "wgmma": wgmma,
}
