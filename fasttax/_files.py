"""safetensors files with provenance in the header, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_KEY = "fasttax"
INDEX = "index.safetensors"


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes to a temporary name in the same folder and renames: a crash leaves the old file, or none."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"fasttax: cannot write {target}: folder {target.parent} does not exist; create it first")
    header = {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata))}
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=header)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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


def gathered(t: Tensor) -> Tensor:
    """The whole of a DTensor, which every rank of its mesh must ask for; other tensors as they are."""
    whole: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[operator]
    return whole


def write_sharded(folder: str | os.PathLike[str], kind: str, groups: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any], max_bytes: int) -> None:
    """Part files of about `max_bytes` each, then an index that names them: a crash leaves no index, or the old one.

    groups: name -> tensors that stay in one file. Under torch.distributed rank 0 writes; the others help to gather.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    target = Path(folder)
    if rank == 0:
        target.mkdir(exist_ok=True)
    parts: list[list[str]] = []
    part: dict[str, Tensor] = {}
    names: list[str] = []

    def flush() -> None:
        if rank == 0 and part:
            write(target / f"part-{len(parts):05d}.safetensors", kind, part, {})
        parts.append(list(names))
        part.clear()
        names.clear()

    size = 0
    for name, tensors in groups.items():
        whole = {n: gathered(t) for n, t in tensors.items()}
        more = sum(t.nbytes for t in whole.values())
        if part and size + more > max_bytes:
            flush()
            size = 0
        part.update(whole)
        names.append(name)
        size += more
    flush()
    if rank == 0:
        files = {f"part-{i:05d}.safetensors": p for i, p in enumerate(parts)}
        write(target / INDEX, kind, {"empty": torch.empty(0)}, {**metadata, "_parts": files})
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def read_sharded(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _, metadata = read(Path(folder) / INDEX, kind)
    tensors: dict[str, Tensor] = {}
    for part in metadata.pop("_parts"):
        tensors |= read(Path(folder) / part, kind)[0]
    return tensors, metadata


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of names, shapes and up to 256 evenly spaced values a tensor, rounded to bfloat16.

    Equal for a checkpoint loaded in float32 and in bfloat16; 1 ms per hundred tensors whatever their size.
    """
    digest = hashlib.sha256()
    for name, t in sorted(tensors, key=lambda item: item[0]):
        flat = gathered(t.detach()).reshape(-1)
        index = torch.linspace(0, max(0, flat.numel() - 1), min(256, flat.numel()), dtype=torch.float64, device=flat.device).long()
        sample = flat[index].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
