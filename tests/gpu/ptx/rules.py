"""How each kind of instruction is encoded: the name of its handler, and its operands.

What changes no result (cache hints, `.rn` where nothing else is meant) is dropped; what is not
known is refused, so that nothing is simulated as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.gpu.ptx.encoder import ADDRESS, Encoder, operands, width
from tests.gpu.ptx.text import BYTES, PtxError

# of loads and stores: none changes what one thread reads
HINTS = re.compile(
    r"^(c[asgv]|lu|wb|wt|volatile|weak|relaxed|nc|L[12]::.*|cta|cluster|gpu|sys|mmio)$"
)
SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "shared::cluster": "cluster",
    "param": "param",
}
Rule = Callable[[Encoder, list[str], list[str]], None]


# --- arithmetic: d, a, b, c of one type, but for the exceptions of each

PLAIN_BITS = {"and", "or", "xor", "not", "shl", "mov", "selp"}
COUNTS = {"popc", "clz", "prmt", "lop3", "shf"}  # of bits
ROUNDED = {"add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt"}


def arithmetic(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    op, kind = parts[0], parts[-1]
    modifiers = parts[1:-1]
    if kind == "pred":
        slots = [encoder.value(word, 1) for word in arguments]
        encoder.emit(f"{op}.pred", tuple(slots if len(slots) == 3 else (*slots, slots[-1])))
        return
    bits = width(kind)
    if op in ROUNDED:
        modifiers = [m for m in modifiers if m != "rn"]
    if op == "mad" and kind in ("f32", "f64"):
        op = "fma"
    immediate = 0
    if op == "lop3":
        immediate = int(arguments.pop(), 0)
    if op in PLAIN_BITS or op in COUNTS:
        kind = f"b{bits}"
    elif kind.startswith("b") and kind[1:].isdigit():
        kind = f"u{bits}"
    sizes = [bits] * len(arguments)
    if op in ("shl", "shr"):
        sizes[2] = 32
    elif op in ("bfe", "bfi"):
        sizes[-2:] = [32, 32]
        kind = f"b{bits}" if op == "bfi" else kind
    elif "wide" in modifiers and len(arguments) == 4:
        sizes[3] = 2 * bits
    destination = encoder.into(arguments[0], 2 * bits if "wide" in modifiers else bits)
    slots = [
        destination.slot,
        *(encoder.value(w, n) for w, n in zip(arguments[1:], sizes[1:], strict=True)),
    ]
    encoder.emit(".".join((op, *modifiers, kind)), tuple(slots), immediate)


def setp(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    *_, kind = parts
    test, *combine = parts[1:-1]
    bits = width(kind)
    if kind[0] == "b":
        kind = f"u{bits}"
    tests = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    test = tests.get(test, test)
    first, _, second = arguments[0].partition("|")
    a, b = (encoder.value(word, bits) for word in arguments[1:3])
    result = encoder.registers.new(1) if combine else encoder.into(first, 1)
    encoder.emit(f"setp.{test}.{kind}", (result.slot, a, b))
    for way in combine:
        if way not in ("and", "or", "xor"):
            raise PtxError("a comparison's modifier")
        joined = encoder.into(first, 1)
        encoder.emit(f"{way}.pred", (joined.slot, result.slot, encoder.value(arguments[3], 1)))
    if second:
        if combine:
            raise PtxError("two results of a combined comparison")
        encoder.emit("not.pred", (encoder.into(second, 1).slot, result.slot, result.slot))


def selp(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    bits = width(parts[-1])
    destination = encoder.into(arguments[0], bits)
    a, b = (encoder.value(word, bits) for word in arguments[1:3])
    encoder.emit(f"selp.b{bits}", (destination.slot, a, b, encoder.value(arguments[3], 1)))


def mov(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    kind = parts[-1]
    if kind == "pred":
        arithmetic(encoder, parts, arguments)
        return
    bits = width(kind)
    to, source = arguments
    if to.startswith("{"):
        split(encoder, operands(to[1:-1]), encoder.value(source, bits), bits)
    elif source.startswith("{"):
        slot = join(encoder, operands(source[1:-1]), bits)
        encoder.emit(f"mov.b{bits}", (encoder.into(to, bits).slot, slot))
    else:
        destination = encoder.into(to, bits)
        encoder.emit(f"mov.b{bits}", (destination.slot, encoder.value(source, bits)))


def split(encoder: Encoder, to: list[str], source: int, bits: int) -> None:
    if len(to) == 2:
        halves = tuple(encoder.into(word, bits // 2).slot for word in to)
        encoder.emit(f"split.b{bits}", (*halves, source))
        return
    for k in range(2):
        half = (encoder.registers.new(32), encoder.registers.new(32))
        encoder.emit("split.b64", (half[0].slot, half[1].slot, source))
        split(encoder, to[2 * k : 2 * k + 2], half[k].slot, 32)


def join(encoder: Encoder, words: list[str], bits: int) -> int:
    if len(words) == 4:
        slots = [join(encoder, words[2 * k : 2 * k + 2], 32) for k in range(2)]
    else:
        slots = [encoder.value(word, bits // 2) for word in words]
    joined = encoder.registers.new(bits)
    encoder.emit(f"join.b{bits}", (joined.slot, *slots))
    return joined.slot


def cvt(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    """Registers may be wider than the types that are named: the rest is dropped, or filled."""
    to, source = parts[-2:]
    slots = []
    for word in arguments[1:]:
        if width(source) < 64 and word.startswith("%") and encoder.registers.find(word).bits == 64:
            low = encoder.registers.new(32)
            encoder.emit("cvt.u32.u64", (low.slot, encoder.value(word, 64)))
            slots.append(low.slot)
        else:
            slots.append(encoder.value(word, width(source)))
    extend, (destination, *_) = filled(encoder, arguments[:1], to)
    encoder.emit(".".join(parts), (destination, *slots))
    extend()


def filled(
    encoder: Encoder, words: list[str], kind: str
) -> tuple[Callable[[], None], tuple[int, ...]]:
    """Destinations of a type, and what then extends it where the registers have 64 bits."""
    bits = max(width(kind), 16)
    wide = bits < 64 and words[0] != "_" and encoder.registers.find(words[0]).bits == 64
    if not wide:
        return lambda: None, tuple(encoder.into(word, bits).slot for word in words)
    low = tuple(encoder.registers.new(32).slot for _ in words)
    sign = f"s64.{kind}" if kind[0] == "s" else "u64.u32"

    def extend() -> None:
        for word, slot in zip(words, low, strict=True):
            encoder.emit(f"cvt.{sign}", (encoder.into(word, 64).slot, slot))

    return extend, low


def cvta(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    to = "to" in parts
    space = parts[2] if to else parts[1]
    handler = "mov.b64"
    if SPACES.get(space) == "shared":
        handler = "cvta.to.shared" if to else "cvta.shared"
    elif space not in ("global", "u64"):
        raise PtxError("an address space")
    destination = encoder.into(arguments[0], 64)
    encoder.emit(handler, (destination.slot, encoder.value(arguments[1], 64)))


# --- memory


def access(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    """ld and st: `ld.global.u4x2` reads two entries of four bytes."""
    op, kind = parts[0], parts[-1]
    space, count, behind = "generic", 1, False
    for part in parts[1:-1]:
        if part in SPACES:
            space = SPACES[part]
        elif re.fullmatch(r"v[248]", part):
            count = int(part[1])
        elif part in ("acquire", "release"):
            behind = True
        elif not HINTS.match(part):
            raise PtxError(f"a modifier {part}")
    bits = max(width(kind), 16)
    entry = f"{'s' if op == 'ld' and kind in ('s8', 's16') else 'u'}{BYTES[kind]}"
    target = arguments[0] if op == "st" else arguments[1]
    values = arguments[1] if op == "st" else arguments[0]
    words = operands(values[1:-1]) if values.startswith("{") else [values]
    if space == "param" and (name := ADDRESS.match(target)) and call_register(encoder, name[1]):
        register = encoder.registers.find(name[1]).slot
        one = encoder.value(words[0], bits) if op == "st" else encoder.into(words[0], bits).slot
        encoder.emit(f"mov.b{bits}", (register, one) if op == "st" else (one, register))
        return
    if behind and op == "st":
        encoder.emit("fence", ())
    base, offset = encoder.address(target)
    if space in ("shared", "cluster", "generic"):
        encoder.watch(BYTES[kind] * count)
    handler = f"{op}.{space}.{entry}x{count}"
    if op == "st":
        encoder.emit(handler, (base, *(encoder.value(word, bits) for word in words)), offset)
        return
    extend, loaded = filled(encoder, words, kind)
    encoder.emit(handler, (*loaded, base), offset)
    extend()


def call_register(encoder: Encoder, name: str) -> bool:
    try:
        encoder.registers.find(name)
    except PtxError:
        return False
    return not name.startswith("%")


ORDERS = {"relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"}


def atom(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    op, kind = parts[0], parts[-1]
    space, what = "generic", ""
    for part in parts[1:-1]:
        if part in SPACES:
            space = SPACES[part]
        elif part not in ORDERS and not HINTS.match(part):
            what = part
    if {"release", "acq_rel"} & set(parts):
        encoder.emit("fence", ())
    bits = width(kind)
    slots: tuple[int, ...] = ()
    if op == "atom":
        slots = (encoder.into(arguments.pop(0), bits).slot,)
    base, offset = encoder.address(arguments[0])
    values = (encoder.value(word, bits) for word in arguments[1:])
    encoder.watch(BYTES[kind])
    encoder.emit(f"{op}.{space}.{what}.{kind}", (*slots, base, *values), offset)


def fence(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    local = {"cta", "proxy", "mbarrier_init"} & set(parts)
    encoder.emit("nothing" if local else "fence", ())


def cp(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    if parts[1] != "async" or "bulk" in parts:
        raise PtxError("a copy")
    if "commit_group" in parts:
        encoder.emit("cp.async.commit", ())
    elif "wait_group" in parts:
        encoder.emit("cp.async.wait", (), int(arguments[0], 0))
    elif "wait_all" in parts:
        encoder.emit("cp.async.wait", (), -1)
    else:
        to, to_offset = encoder.address(arguments[0])
        source, offset = encoder.address(arguments[1])
        size = arguments[2]
        read = encoder.value(arguments[3] if len(arguments) > 3 else size, 32)
        encoder.watch(int(size, 0))
        immediate = (to_offset & 0xFFFFFFFF) | offset << 32
        encoder.emit(f"cp.async.{int(size, 0)}", (to, source, read), immediate)


# --- the warp and the block


def bar(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    if "warp" in parts:
        encoder.emit("bar.warp.sync", (encoder.value(arguments[0], 32),))
        return
    if parts[1] == "cluster":
        encoder.emit(".".join(parts[:3]), ())
        if "relaxed" in parts:
            raise PtxError("an arrival that orders nothing")
        return
    if "sync" not in parts:
        raise PtxError("a barrier that does not wait")
    threads = encoder.entry.limits.get("reqntid") or encoder.entry.limits.get("maxntid")
    if len(arguments) > 1 and (threads is None or int(arguments[1], 0) != threads[0]):
        raise PtxError("a barrier of some of the warps")
    encoder.emit("bar.sync", (), int(arguments[0], 0))


def shfl(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    first, _, second = arguments[0].partition("|")
    inside = encoder.into(second, 1).slot if second else -1
    slots = (encoder.value(word, 32) for word in arguments[1:])
    encoder.emit(f"shfl.{parts[2]}", (encoder.into(first, 32).slot, inside, *slots))


def vote(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    way, kind = parts[2:]
    to = encoder.into(arguments[0], 32 if kind == "b32" else 1).slot
    encoder.emit(
        f"vote.{way}.{kind}", (to, encoder.value(arguments[1], 1), encoder.value(arguments[2], 32))
    )


def redux(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    slots = (encoder.value(word, 32) for word in arguments[1:])
    encoder.emit(f"redux.{parts[2]}.{parts[3]}", (encoder.into(arguments[0], 32).slot, *slots))


def elect(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    first, _, second = arguments[0].partition("|")
    to = -1 if first == "_" else encoder.into(first, 32).slot
    encoder.emit("elect", (to, encoder.into(second, 1).slot, encoder.value(arguments[1], 32)))


def mapa(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    bits = width(parts[-1])
    to = encoder.into(arguments[0], bits).slot
    slots = (encoder.value(arguments[1], bits), encoder.value(arguments[2], 32))
    encoder.emit(f"mapa.u{bits}", (to, *slots))


def alone(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    encoder.emit(parts[0], ())


def nothing(encoder: Encoder, parts: list[str], arguments: list[str]) -> None:
    encoder.emit("nothing", ())


RULES: dict[str, Rule] = {
    "setp": setp,
    "selp": selp,
    "mov": mov,
    "cvt": cvt,
    "cvta": cvta,
    "ld": access,
    "st": access,
    "atom": atom,
    "red": atom,
    "membar": fence,
    "fence": fence,
    "cp": cp,
    "bar": bar,
    "barrier": bar,
    "shfl": shfl,
    "vote": vote,
    "redux": redux,
    "elect": elect,
    "mapa": mapa,
    "ret": alone,
    "exit": alone,
    "trap": alone,
    "prefetch": nothing,
    "griddepcontrol": nothing,
}
