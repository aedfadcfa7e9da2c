"""Writes docs/machine-code.md: what nvcc's machine code says of every CUDA kernel, and what that
predicts (`make machine-code`). No GPU is needed, and nothing in the file is typed by hand.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.gpu.ptx import budgets, cuda, sass
from tests.gpu.ptx.text import parse
from tests.tools.cubins import cubin
from tests.tools.cuda_tools import ARCHS, ROOT

TABLE = ROOT / "docs/machine-code.md"
KB = 1024
DTYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
MODES = ("value", "add", "write", "prox")  # of EWC
NAME = re.compile(r"fasttax\d+(\w+?_kernel|\w+_finish)(?:I(.*?)E+v|E?N|$)")

Codes = dict[str, list[sass.Code]]  # architecture -> kernels


def threads() -> dict[str, int]:
    """Of each kernel's block, which its PTX says."""
    found = {}
    for source in cuda.modules("90"):
        for name, entry in parse(source).entries.items():
            found[name] = entry.limits["maxntid"][0]
    return found


def codes(archs: Iterable[str] = ARCHS, sources: Iterable[str] = cuda.SOURCES) -> Codes:
    of_kernel = threads()

    def one(job: tuple[str, str]) -> list[sass.Code]:
        return sass.codes(cubin(*job), job[1], of_kernel)

    found: Codes = {}
    with ThreadPoolExecutor(2) as pool:
        for arch in archs:
            jobs = [(source, arch) for source in sources]
            found[arch] = [code for part in pool.map(one, jobs) for code in part]
    return found


def family(name: str) -> str:
    """A kernel's name and dtype in words: those of one row."""
    match = NAME.search(name)
    assert match, name
    stem, arguments = match.groups()
    dtype = next(
        (word for key, word in DTYPES.items() if re.match(rf"{key}[LE]?", arguments or "-")), ""
    )
    mode = re.search(r"EwcModeE(\d)", name)
    return " ".join(filter(None, (stem, dtype, MODES[int(mode[1])] if mode else "")))


def by_family(found: Codes) -> dict[str, dict[str, list[sass.Code]]]:
    out: dict[str, dict[str, list[sass.Code]]] = {}
    for arch, kernels in found.items():
        for code in kernels:
            out.setdefault(family(code.name), {}).setdefault(arch, []).append(code)
    return dict(sorted(out.items()))


def widths(kernels: Iterable[sass.Code], of: str) -> str:
    """The share of accesses that are of 16 bytes, by their bytes."""
    moved: Counter[int] = sum((code.widths(of) for code in kernels), start=Counter())
    total = sum(size * count for size, count in moved.items())
    return f"{max(moved, default=0)} ({100 * 16 * moved[16] // total} %)" if total else ""


def row(name: str, of_arch: Mapping[str, list[sass.Code]]) -> list[str]:
    every = [code for kernels in of_arch.values() for code in kernels]

    def each(value: Callable[[str, list[sass.Code]], object]) -> str:
        return " / ".join(str(value(arch, kernels)) for arch, kernels in of_arch.items())

    return [
        name,
        str(len(every) // len(of_arch)),
        each(lambda arch, kernels: max(code.registers for code in kernels)),
        str(max(code.spills for code in every)),
        str(max(code.stack for code in every)),
        str(max(code.shared for code in every)),
        each(lambda arch, kernels: f"{min(code.occupancy(arch) for code in kernels):.0%}"),
        widths(every, sass.LOADS),
        widths(every, sass.STORES),
        each(lambda arch, kernels: min(code.in_flight(arch) for code in kernels) // KB),
    ]


COLUMNS = (
    "kernel",
    "variants",
    "registers",
    "spilled",
    "stack",
    "shared",
    "occupancy",
    "widest load (share of 16)",
    "widest store",
    "KB under way",
)


def faults(cells: Mapping[str, str]) -> list[str]:
    """What is over budget in a row of the table, by its columns."""
    name = cells["kernel"]
    stem = name.split()[0]
    found = [f"{name}: {what}" for what in ("spilled", "stack") if cells[what] != "0"]
    registers = max(int(n) for n in cells["registers"].split(" / "))
    most = budgets.REGISTERS.get(name, budgets.REGISTERS.get(stem, 0))
    if registers > most:
        found.append(f"{name}: {registers} registers, of {most}")
    least = min(int(n) for n in cells["KB under way"].split(" / "))
    if least < budgets.KB_UNDER_WAY.get(stem, 0):
        found.append(f"{name}: {least} KB under way, of {budgets.KB_UNDER_WAY[stem]}")
    return found


# --- what it predicts


class Card(NamedTuple):
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second
    lanes: int  # that a multiprocessor issues for in a cycle
    latency: float  # of memory that is busy, in microseconds: an assumption


CARDS = {
    "A100": Card("80", 108, 1.41, 2.04, 128, 0.6),
    "H100": Card("90", 132, 1.75, 3.35, 128, 0.7),
    "H200": Card("90", 132, 1.75, 4.8, 128, 0.7),
    "B200": Card("100", 148, 1.85, 8.0, 128, 0.8),
    "MI300X": Card("gfx942", 304, 2.1, 5.3, 64, 0.8),
}
REACHED = 0.92  # of a card's bandwidth, by the best of kernels
# what is predicted: the case and op of budgets.py, bytes an entry, the kernels' family
PREDICTED = {
    "forward, bfloat16": ("policy_ref bfloat16", "forward", 4, "kl_forward_kernel bfloat16"),
    "forward, float32": ("policy_ref float32", "forward", 8, "kl_forward_kernel float32"),
    "gradient, bfloat16": ("policy_ref bfloat16", "gradient", 6, "kl_gradient_kernel bfloat16"),
    "gradient, float32": ("policy_ref float32", "gradient", 12, "kl_gradient_kernel float32"),
    "both, bfloat16": ("policy_ref bfloat16", "both", 6, "kl_resident_kernel bfloat16"),
    "EWC add_grad_, float32": ("lists float32", "add_grad_", 20, "ewc_kernel add"),
    "AdamW with EWC, float32": ("lists float32", "adamw_", 36, "adamw_kernel"),
    "Fisher's squares, float32": ("lists float32", "squares_", 12, "square_kernel"),
}


KL_OP = re.compile("KlOpE0E(?!Lb1)")  # policy_ref's, with the policy's gradient alone


def predicted(card: Card, what: str, families: Mapping[str, Mapping[str, list[sass.Code]]]) -> str:
    """TB/s, and what bounds it: memory, bytes under way, or instructions."""
    case, op, size, name = PREDICTED[what]
    nvidia = card.arch.isdigit()
    backend = "CUDA" if nvidia else "Triton"
    steps = budgets.INSTRUCTIONS[f"{backend} {case}"][op] / 1.1
    issued = card.multiprocessors * card.lanes * card.gigahertz / 1e3 / steps * size
    bounds = {"memory": REACHED * card.terabytes, "instructions": issued}
    if nvidia:
        of_arch = families[name]
        arch = card.arch if card.arch in of_arch else max(of_arch, key=int)
        those = [c for c in of_arch[arch] if KL_OP.search(c.name) or "KlOp" not in c.name]
        least = min(code.in_flight(arch) for code in those)
        bounds["latency"] = least * card.multiprocessors / card.latency / 1e6
    bound = min(bounds, key=lambda key: bounds[key])
    return f"{bounds[bound]:.2f} ({bound})"


# --- the file

HEAD = """# What the machine code says

Written by `make machine-code`; no GPU was asked. Of each kernel's variants the worst, for
{archs} where there are several numbers: registers of a thread,
accesses of spilled registers, bytes of stack and of static shared memory, the share of a
multiprocessor's threads that are there by registers, threads and static shared memory, the widest
access and how much of all bytes in the code goes by 16 at once, and the KB that a multiprocessor
has under way before it uses the first: on the way through the code that has most, of aligned rows.
tests/gpu/ptx/budgets.py has the budgets, tests/gpu/test_machine_code.py holds them.
"""
PREDICTION = f"""
## Bandwidth, as a prediction

**Predicted, not measured**: TB/s of the floor's bytes, the least of three bounds. Memory:
{REACHED:.0%} of the card's. Latency: the bytes under way above, over a latency that is assumed
({", ".join(f"{name} {card.latency:g} us" for name, card in CARDS.items())}). Instructions: as many
as the PTX executes on the simulator, of which ptxas leaves fewer, at one a cycle and lane. MI300X
runs Triton's kernels, whose bytes under way are not counted; a card whose architecture is not above
runs the newest one's. `make bench-gpu` measures.
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [columns, ["---"] * len(list(columns)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(archs: Sequence[str] = ARCHS) -> None:
    """`python -m tests.gpu.machine_code 80 90`: of these architectures alone."""
    families = by_family(codes(archs))
    rows = [row(name, of_arch) for name, of_arch in families.items()]
    head = HEAD.format(archs=" / ".join(f"sm_{arch}" for arch in archs))
    predictions = [
        [what, *(predicted(card, what, families) for card in CARDS.values())] for what in PREDICTED
    ]
    TABLE.write_text(
        "\n".join((head, table(COLUMNS, rows), PREDICTION, table(("op", *CARDS), predictions)))
    )
    print(f"machine-code: {TABLE.relative_to(ROOT)}: {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:] or ARCHS)
