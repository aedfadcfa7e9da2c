"""safetensors files with provenance in the header, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_KEY = "fasttax"
Spec = tuple[torch.dtype, tuple[int, ...]]
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes to a temporary name in the same folder and renames: a crash leaves the old file, or none."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"fasttax: cannot write {target}: folder {target.parent} does not exist; create it first")
    header = {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata))}
    with _renamed(target) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=header)


@contextlib.contextmanager
def _renamed(target: Path) -> Iterator[str]:
    """A temporary name beside `target`, which takes its place if the block ends well and vanishes if not."""
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_streamed(
    path: str | os.PathLike[str], kind: str, specs: Mapping[str, Spec], metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """As `write`, with one tensor in memory at a time; `specs` says beforehand what each will be."""
    header: dict[str, Any] = {"__metadata__": {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata))}}
    end = 0
    for name in sorted(specs, key=lambda n: -specs[n][0].itemsize):  # so that every tensor is aligned, and without holes, which readers refuse
        dtype, shape = specs[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _renamed(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, t in tensors:
            if (t.dtype, tuple(t.shape)) != specs[name]:
                raise AssertionError(f"{name}: {t.dtype} {tuple(t.shape)}, announced as {specs[name]}")
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            if t.numel():
                file.write(t.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data)
        file.truncate(8 + len(text) + end)


class Mapped:
    """A safetensors file's tensors where they lie: pages are read when they are touched, and the system may drop them at any time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # nothing writes to it; torch warns of read-only memory
        length = int.from_bytes(self._memory[:8], "little")
        self._start = 8 + length
        self._header: dict[str, Any] = json.loads(self._memory[8 : self._start])
        self._header.pop("__metadata__", None)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def tensor(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype = next(d for d, code in _CODES.items() if code == entry["dtype"])
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=self._start + begin)
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
        self._advise(names, "MADV_WILLNEED")

    def release(self, names: Iterable[str]) -> None:
        """Takes the pages out of this process; the system's cache may still have them."""
        self._advise(names, "MADV_DONTNEED")


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"fasttax: no file {target}; expected a {kind} file written by .save()")
    try:
        with safe_open(target, framework="pt") as file:
            header = file.metadata() or {}
            if header.get(FORMAT_KEY) != kind:
                found = header.get(FORMAT_KEY, "no fasttax header")
                raise ValueError(f"fasttax: {target} is not a {kind} file: expected header {FORMAT_KEY}={kind!r}, got {found!r}; write it with .save()")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["metadata"])  # noqa: SIM118 (no Mapping)
    except SafetensorError as error:
        raise ValueError(f"fasttax: {target} is truncated or no safetensors file ({error}); write it anew with .save()") from error


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of names, shapes and up to 256 evenly spaced values a tensor, rounded to bfloat16.

    Equal for a checkpoint loaded in float32 and in bfloat16; 1 ms per hundred tensors whatever their size.
    """
    digest = hashlib.sha256()
    for name, t in sorted(tensors, key=lambda item: item[0]):
        flat = t.detach().reshape(-1)
        index = torch.linspace(0, max(0, flat.numel() - 1), min(256, flat.numel()), dtype=torch.float64, device=flat.device).long()
        sample = flat[index].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
