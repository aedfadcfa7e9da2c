"""Tensors that stay in their safetensors file: written one by one, read where they lie."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax._base.files import FORMAT_KEY, renamed

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


def write_streamed(
    path: str | os.PathLike[str],
    kind: str,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    more: Mapping[str, str] | None = None,
) -> None:
    """As `write`, with one tensor in memory at a time; `specs` says beforehand what each will be.

    `more`: header entries of other readers.

    Raises:
        AssertionError: a tensor is not what `specs` said.
    """
    header: dict[str, Any] = {
        "__metadata__": {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata)), **(more or {})}
    }
    end = 0
    # wide dtypes first, so that every tensor is aligned with no holes, which readers refuse
    for name in sorted(specs, key=lambda n: -specs[n][0].itemsize):
        dtype, shape = specs[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with renamed(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, t in tensors:
            if (t.dtype, tuple(t.shape)) != specs[name]:
                raise AssertionError(
                    f"{name}: {t.dtype} {tuple(t.shape)}, announced as {specs[name]}"
                )
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            if t.numel():
                file.write(t.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data)
        file.truncate(8 + len(text) + end)


class Mapped:
    """A safetensors file's tensors where they lie.

    Pages are read when they are touched, and the system may drop them at any time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            # nothing writes to it; torch warns of read-only memory
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._memory[:8], "little")
        self._start = 8 + length
        self._header: dict[str, Any] = json.loads(self._memory[8 : self._start])
        self._header.pop("__metadata__", None)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def tensor(self, name: str) -> Tensor:
        """A view of the mapping."""
        entry = self._header[name]
        dtype = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        flat = torch.frombuffer(
            self._memory,
            dtype=dtype,
            count=(end - begin) // dtype.itemsize,
            offset=self._start + begin,
        )
        return flat.view(entry["shape"])

    def _advise(self, names: Iterable[str], advice: str) -> None:
        option = getattr(mmap, advice, None)
        if option is None:  # this system has no madvise: it reads and drops pages by itself
            return
        for name in names:
            if name in self._header:
                begin, end = (self._start + offset for offset in self._header[name]["data_offsets"])
                begin -= begin % mmap.PAGESIZE
                if end > begin:
                    self._memory.madvise(option, begin, end - begin)

    def prefetch(self, names: Iterable[str]) -> None:
        """Has the system read these from the disk while others are worked on."""
        self._advise(names, "MADV_WILLNEED")

    def release(self, names: Iterable[str]) -> None:
        """Takes the pages out of this process; the system's cache may still have them."""
        self._advise(names, "MADV_DONTNEED")
