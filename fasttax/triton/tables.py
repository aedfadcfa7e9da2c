"""Lists of tensors as tables on the device, so that one launch takes a whole list.

A row is a tensor: the addresses of its operands, its number of elements and its first program. A
program finds its row by bisection and takes CHUNK elements of it. One launch has one dtype for each
operand; a model has one or two such mixes.

A table of 300 parameters is 24 KB. It crosses once, from pinned memory, and is kept while the same
list comes again; a CUDA graph gets one of its own, made by launches that carry the numbers, since
the memory of a kept one may be another's when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements a program: 8 B parameters are 488 thousand programs
# at a time: with 4 warps 8 a thread, two 16-byte loads of each float32 operand; with twice as many
# AdamW's six operands would take 168 registers
BLOCK = 1024
MOST_TABLES = 64
PARTS = 4096  # partial sums at a time
STEP = tl.constexpr(CHUNK)  # as kernels see it

_kept: dict[Hashable, Tensor] = {}


@triton.jit
def row_of(table_ptr, rows, program, WIDTH: tl.constexpr):
    """Where the row begins whose programs contain this one, and the first element of the program.

    An empty tensor's row begins where the next one does.
    """
    low = rows * 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle * WIDTH + WIDTH - 1) <= program:
            low = middle
        else:
            high = middle
    row = table_ptr + low * WIDTH
    begin = (program - tl.load(row + WIDTH - 1)) * STEP
    return row, begin


@triton.jit
def elements(row, begin, WIDTH: tl.constexpr):
    """How many elements the program has."""
    return tl.minimum(tl.load(row + WIDTH - 2) - begin, STEP).to(tl.int32)


@triton.jit
def operand(row, column: tl.constexpr, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the program's first element of an operand; `begin` is a multiple of CHUNK."""
    address = tl.load(row + column) + begin * (DTYPE.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer


@triton.jit
def load(ptr, at, live):
    """Values as float32, 0 where not live; None: all are, and are read 16 bytes at a time."""
    if live is None:
        value = tl.load(ptr + at)
    else:
        value = tl.load(ptr + at, mask=live, other=0.0)
    return value.to(tl.float32)


@triton.jit
def store(ptr, at, value, live):
    """In the pointer's dtype; `live` as in `load`."""
    if live is None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def sum_of_parts(parts_ptr, out_ptr, count, first, second, PARTS: tl.constexpr):
    """*out = first * second * the sum of float64 parts, in one order."""
    total = tl.zeros([PARTS], tl.float64)
    for start in range(0, count, PARTS):
        at = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr, (tl.sum(total, 0) * first * second).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts_ptr, out_ptr, count, first, second, PARTS: tl.constexpr):
    """By one program: 488 thousand parts are 120 rounds."""
    sum_of_parts(parts_ptr, out_ptr, count, first, second, PARTS)


# --- on the host ---------------------------------------------------------------------------------


@dataclass
class Group:
    """Tensors that one launch takes.

    Attributes:
        kind: what the launch is compiled for, dtypes and modes.
        aligned: every address is a multiple of 16 bytes.
        rows: the table.
        programs: the grid.
    """

    kind: Any
    aligned: bool
    rows: list[tuple[int, ...]] = field(default_factory=list)
    programs: int = 0

    @property
    def width(self) -> int:
        """The columns of a row."""
        return len(self.rows[0])

    def table(self, like: Tensor) -> Tensor:
        """The rows on the device of `like`."""
        return _table([value for row in self.rows for value in row], like)


def dtype_of(t: Tensor) -> Any:
    """Triton's name of a dtype, as a constant of a kernel."""
    return getattr(tl, str(t.dtype).removeprefix("torch."))


def grouped(
    count: int,
    kind: Callable[[int], Any],
    operands: Callable[[int], Sequence[Tensor | None]],
    unaligned: tuple[int, ...] = (),
) -> list[Group]:
    """`count` tensors as the launches take them, each by what `kind` and `operands` say of it.

    Operand 0 has the elements; None is an operand that is not read; those at `unaligned` places are
    read one by one.
    """
    groups: dict[Hashable, Group] = {}
    for i in range(count):
        found = operands(i)
        addresses = [0 if t is None else t.data_ptr() for t in found]
        wide = (a for k, a in enumerate(addresses) if k not in unaligned)
        aligned = all(address % 16 == 0 for address in wide)
        of = kind(i)
        group = groups.setdefault((of, aligned), Group(of, aligned))
        assert found[0] is not None
        numel = found[0].numel()
        group.rows.append((*addresses, numel, group.programs))
        group.programs += triton.cdiv(numel, CHUNK)
    return list(groups.values())


def _table(values: list[int], like: Tensor) -> Tensor:
    if like.device.type == "cpu":  # the interpreter's
        return torch.tensor(values, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        return written(values, like)
    key = (like.device, torch.cuda.current_stream(like.device).cuda_stream, *values)
    table = _kept.get(key)
    if table is None:
        if len(_kept) >= MOST_TABLES:
            _kept.clear()
        host = torch.tensor(values, dtype=torch.int64, device="cpu").pin_memory()
        table = _kept[key] = host.to(like.device, non_blocking=True)
    return table


def written(values: list[int], like: Tensor) -> Tensor:
    """A table that kernels write whose arguments are the numbers, a hundred a launch."""
    table = torch.zeros(len(values), dtype=torch.int64, device=like.device)
    torch._foreach_add_(table.unbind(), values)
    return table
