"""safetensors files: written one tensor at a time, read through one descriptor or where they lie.

A file of fasttax's has a CRC-32 of every tensor's bytes in its header, and one of the header
itself, so that a flipped bit is seen. Files without them are read unchecked.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor

from fasttax._base import placed

FORMAT_KEY = "fasttax"
CHECKSUM, CHECKSUMS = "checksum", "checksums"  # header entries: of the header, of each tensor
KNOWN = {FORMAT_KEY, "metadata", CHECKSUM, CHECKSUMS, "format"}
LONGEST = 100_000_000  # bytes of a header, safetensors' own limit
DIMENSIONS, ENTRIES = 64, 2**63 - 1  # the most that a tensor of torch has
HEADER = 4096  # bytes that a Filled file keeps free for its header
READ = 1 << 24  # bytes that are read at a time for a checksum

Spec = tuple[torch.dtype, tuple[int, ...]]
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class BadFileError(ValueError):
    """A file that is no whole safetensors file; the text names it."""


class SupportsClose(Protocol):
    """An open file, or a stack of them."""

    def close(self) -> None:
        """Gives the descriptors back."""


O = TypeVar("O", bound="Open")


class Open:
    """What holds files open until `close`, or the end of its `with`."""

    def __init__(self, held: SupportsClose) -> None:
        self._held = held

    def close(self) -> None:
        """Gives the descriptors back."""
        self._held.close()

    def __enter__(self: O) -> O:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- writing --------------------------------------------------------------------------------------


def write_streamed(
    path: str | os.PathLike[str],
    kind: str,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    more: Mapping[str, str] | None = None,
) -> None:
    """A file with one tensor in memory at a time; `specs` says beforehand what each will be.

    `more`: header entries of other readers.

    Raises:
        AssertionError: a tensor is not what `specs` said.
    """
    with placed.file(kind, Path(path)) as temporary, open(temporary, "r+b") as file:
        write_into(file, kind, specs, metadata, tensors, more)


def write_into(
    file: BinaryIO,
    kind: str,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    more: Mapping[str, str] | None = None,
) -> None:
    """The same into an open empty file."""
    sums = dict.fromkeys(specs, 0)
    facts = {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata)), **(more or {})}
    entries, size = _laid_out(specs)
    text = _header(facts, sums, entries)
    for name, t in tensors:
        if (t.dtype, tuple(t.shape)) != specs[name]:
            raise AssertionError(f"{name}: {t.dtype} {tuple(t.shape)}, announced as {specs[name]}")
        data = _bytes_of(t.detach().cpu().contiguous().reshape(-1))
        sums[name] = zlib.crc32(data)
        file.seek(8 + len(text) + entries[name]["data_offsets"][0])
        file.write(data)
    file.truncate(8 + len(text) + size)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + _header(facts, sums, entries))
    file.flush()


def _laid_out(specs: Mapping[str, Spec]) -> tuple[dict[str, Any], int]:
    """The header's entries and the bytes that they cover.

    Wide dtypes first: every tensor is aligned with no holes, which readers refuse.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name in sorted(specs, key=lambda n: -specs[n][0].itemsize):
        dtype, shape = specs[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return entries, end


def _header(
    facts: Mapping[str, str], sums: Mapping[str, int], entries: Mapping[str, Any], least: int = 0
) -> bytes:
    """The header, of one length whatever the sums are, filled up with spaces to `least` bytes."""
    listed = json.dumps({name: _hex(value) for name, value in sums.items()})
    about = {CHECKSUM: _hex(0), **facts, CHECKSUMS: listed}
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * max(-len(text) % 8, least - len(text))
    return text.replace(_hex(0).encode(), _hex(zlib.crc32(text)).encode(), 1)


def _hex(value: int) -> str:
    return f"{value:08x}"


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in one dimension."""
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def crc(t: Tensor, start: int = 0) -> int:
    """The CRC-32 of a contiguous CPU tensor's bytes, going on from that of others."""
    return zlib.crc32(_bytes_of(t.reshape(-1)), start)


class Filled(Open):
    """A file whose tensors are written some rows at a time, in any order, in a process or several.

    Until `finish` it has no header, and nothing reads it as a safetensors file. `specs` says what
    the tensors will be; what the file already holds of them stays.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Mapping[str, Spec]) -> None:
        self._specs = dict(specs)
        self._entries, size = _laid_out(self._specs)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        super().__init__(self._file)
        self._file.truncate(8 + HEADER + size)

    def _place(self, name: str, row: int) -> int:
        """Where a row begins in the file."""
        dtype, shape = self._specs[name]
        begin: int = self._entries[name]["data_offsets"][0]
        return 8 + HEADER + begin + row * math.prod(shape[1:]) * dtype.itemsize

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Puts `values` (rows, ...) where the tensor's rows from `row` on lie.

        Raises:
            AssertionError: they are not of the tensor's dtype and shape, or beyond its end.
        """
        dtype, shape = self._specs[name]
        fits = values.dtype == dtype and tuple(values.shape[1:]) == shape[1:]
        if not fits or not 0 <= row <= shape[0] - values.shape[0]:
            raise AssertionError(
                f"{name}: {values.dtype} {tuple(values.shape)} at row {row}, announced as "
                f"{self._specs[name]}"
            )
        self._file.seek(self._place(name, row))
        data = _bytes_of(values.contiguous().reshape(-1))
        done = 0
        while done < len(data):
            done += self._file.write(data[done:]) or 0

    def checksum(self, name: str, row: int, rows: int, start: int = 0) -> int:
        """The CRC-32 of some rows as they lie in the file, going on from that of others."""
        left = self._place(name, row + rows) - self._place(name, row)
        self._file.seek(self._place(name, row))
        while left:
            data = self._file.read(min(left, READ))
            if not data:
                raise AssertionError(f"{name}: the file ends before row {row + rows}")
            start = zlib.crc32(data, start)
            left -= len(data)
        return start

    def finish(self, kind: str, metadata: Mapping[str, Any]) -> None:
        """Writes the header, with which the file is one of `kind`."""
        sums = {name: self.checksum(name, 0, spec[1][0]) for name, spec in self._specs.items()}
        facts = {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata))}
        text = _header(facts, sums, self._entries, HEADER)
        if len(text) > HEADER:
            raise AssertionError(f"a header of {len(text)} bytes, where {HEADER} are kept free")
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)


# --- reading --------------------------------------------------------------------------------------


class TensorFile(Open, Mapping[str, Tensor]):
    """An open safetensors file, read tensor by tensor through one descriptor.

    A file that takes its place meanwhile changes nothing. `about` is the header's metadata.

    Args:
        path: of the file.
        file: it, open at its beginning, where it has no name.

    Raises:
        BadFileError: it is no whole safetensors file, or a tensor does not match its checksum.
    """

    def __init__(self, path: str | os.PathLike[str], file: Any = None) -> None:
        self.path = Path(path)
        self._file = file or open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        super().__init__(self._file)
        try:
            self.about, self._entries, self._start = _parsed(self.path, self._file)
            self._sums = self._listed()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def spec(self, name: str) -> Spec:
        """Dtype and shape, from the header."""
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{self.path}: expected tensors of {', '.join(DTYPES)}, got {name} of "
                f"{entry['dtype']}; convert it first"
            )
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.spec(name)
        flat = self._read(name, *self.place(name))
        self._check(name, crc(flat))
        return flat.view(dtype).view(shape)

    def parts(self, name: str, rows: int) -> Iterator[Tensor]:
        """A tensor's rows, so many at a time; at the end its checksum is seen to match.

        Raises:
            BadFileError: it does not.

        Yields:
            The rows in order, each part in memory of its own.
        """
        dtype, shape = self.spec(name)
        begin, end = self.place(name)
        step = max(1, rows * math.prod(shape[1:]) * dtype.itemsize)
        found = 0
        for at in range(begin, end, step):
            flat = self._read(name, at, min(at + step, end))
            found = crc(flat, found)
            yield flat.view(dtype).view(-1, *shape[1:])
        self._check(name, found)

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        """The bytes of the file between two places."""
        flat = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        data = _bytes_of(flat)
        self._file.seek(begin)
        done = 0
        while done < len(data):
            more = self._file.readinto(data[done:])
            if not more:
                raise _bad(self.path, f"{name} ends early")
            done += more
        return flat

    def _check(self, name: str, found: int) -> None:
        """That a tensor's CRC-32 is the one that the header has of it."""
        if self._sums is not None and _hex(found) != self._sums[name]:
            raise BadFileError(
                f"{self.path}: {name}: the checksum does not match the values, so the file is "
                "damaged"
            )

    def mapping(self) -> mmap.mmap:
        """The file's memory."""
        # nothing writes to it; torch warns of read-only memory
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor begins and ends in the file."""
        begin, end = self._entries[name]["data_offsets"]
        return self._start + begin, self._start + end

    def _listed(self) -> dict[str, str] | None:
        """Each tensor's checksum; None in a file without."""
        if CHECKSUMS not in self.about:
            return None
        try:
            sums = json.loads(self.about[CHECKSUMS])
        except (ValueError, RecursionError) as error:
            raise _bad(self.path, f"its checksums: {error}") from None
        if not isinstance(sums, dict) or set(sums) != set(self._entries):
            raise _bad(self.path, "its checksums are of other tensors")
        return sums


def _bad(path: Path, reason: str) -> BadFileError:
    return BadFileError(f"{path} is truncated or no safetensors file ({reason})")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _parsed(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, Any], int]:
    """(metadata, entries, where the data begin) of a header that fits the file's length."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(LONGEST, size - 8):
        raise _bad(path, "it has no whole header")
    text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header: {error}") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no object")
    about = header.pop("__metadata__", {})
    strings = isinstance(about, dict) and all(isinstance(v, str) for v in about.values())
    if not strings:
        raise _bad(path, "its metadata are no strings")
    _check_header(path, text, about)
    end = 0
    for begin, stop in sorted(_extent(path, name, entry) for name, entry in header.items()):
        if begin != end:
            raise _bad(path, "tensors overlap, or leave holes")
        end = stop
    if size != 8 + length + end:
        raise _bad(path, f"{size} bytes of {8 + length + end}")
    return about, header, 8 + length


def _check_header(path: Path, text: bytes, about: Mapping[str, str]) -> None:
    """That a file of fasttax's has the header that was written.

    Raises:
        BadFileError: it has not.
    """
    # by its checksums too: a flipped bit of the format's name would leave the rest unchecked
    if FORMAT_KEY not in about and not {CHECKSUM, CHECKSUMS} <= set(about):
        return
    if not KNOWN.issuperset(about) or (CHECKSUM in about) != (CHECKSUMS in about):
        raise _bad(path, f"its header has {', '.join(sorted(about))}")
    if CHECKSUM in about:
        value = about[CHECKSUM]
        was = text.replace(value.encode(), _hex(0).encode(), 1)
        if not re.fullmatch("[0-9a-f]{8}", value) or _hex(zlib.crc32(was)) != value:
            raise _bad(path, "its header does not match its checksum")


def _extent(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where an entry's bytes begin and end, once it is one."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise _bad(path, f"{name} has no dtype, shape and place") from None
    if not isinstance(code, str) or not isinstance(shape, list) or not whole or end < begin:
        raise _bad(path, f"{name} has no dtype, shape and place")
    if len(shape) > DIMENSIONS or max(shape, default=0) > ENTRIES or _spans(shape) > ENTRIES:
        raise _bad(path, f"{name} has a shape that no tensor has")
    if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise _bad(path, f"{name} of {code} {shape} has {end - begin} bytes")
    return begin, end


def _spans(shape: list[int]) -> int:
    """What torch multiplies to strides, where a dimension of 0 counts as 1."""
    return math.prod(n or 1 for n in shape)


class Mapped:
    """A safetensors file's tensors where they lie.

    Pages are read when they are touched, and the system may drop them at any time.
    """

    def __init__(self, file: TensorFile) -> None:
        self._memory = file.mapping()
        self._places = {name: file.place(name) for name in file}
        self._specs = {name: file.spec(name) for name in file}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """A view of the mapping."""
        dtype, shape = self._specs[name]
        begin, end = self._places[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        flat = torch.frombuffer(
            self._memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin
        )
        return flat.view(shape)

    def _advise(self, names: Iterable[str], advice: str) -> None:
        option = getattr(mmap, advice, None)
        if option is None:  # this system has no madvise: it reads and drops pages by itself
            return
        for name in names:
            if name in self._places:
                begin, end = self._places[name]
                begin -= begin % mmap.PAGESIZE
                if end > begin:
                    self._memory.madvise(option, begin, end - begin)

    def prefetch(self, names: Iterable[str]) -> None:
        """Has the system read these from the disk while others are worked on."""
        self._advise(names, "MADV_WILLNEED")

    def release(self, names: Iterable[str]) -> None:
        """Takes the pages out of this process; the system's cache may still have them."""
        self._advise(names, "MADV_DONTNEED")
