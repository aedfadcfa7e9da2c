"""A folder of safetensors files under one index.

For estimates that no file or rank should hold whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax._base import dtensor, files

INDEX = "index.safetensors"


def write(
    folder: str | os.PathLike[str],
    kind: str,
    groups: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    max_bytes: int,
) -> None:
    """Writes part files of about `max_bytes` each, then the index that names them.

    The parts have names of their own, and those of an older index go last: a crash leaves the old
    folder as it was. `groups` maps a name to tensors that stay in one file. Under torch.distributed
    rank 0 writes; the others help to gather.
    """
    together = dist.is_available() and dist.is_initialized()
    target, writes = Path(folder), not together or dist.get_rank() == 0
    token, old = secrets.token_hex(4), []
    if writes:
        target.mkdir(exist_ok=True)
        old = [*target.glob("part-*.safetensors")]
    parts: dict[str, list[str]] = {}
    part: dict[str, Tensor] = {}
    names: list[str] = []

    def flush() -> None:
        if writes and part:
            file = f"part-{token}-{len(parts):05d}.safetensors"
            files.write(target / file, kind, part, {})
            parts[file] = list(names)
        part.clear()
        names.clear()

    size = 0
    for name, tensors in groups.items():
        whole = {n: dtensor.whole(t) for n, t in tensors.items()}
        more = sum(t.nbytes for t in whole.values())
        if part and size + more > max_bytes:
            flush()
            size = 0
        part.update(whole)
        names.append(name)
        size += more
    flush()
    if writes:
        files.write(target / INDEX, kind, {"empty": torch.empty(0)}, {**metadata, "_parts": parts})
        for path in old:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    if together:
        dist.barrier()


def read(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _, metadata = files.read(Path(folder) / INDEX, kind)
    tensors: dict[str, Tensor] = {}
    for part in metadata.pop("_parts"):
        tensors |= files.read(Path(folder) / part, kind)[0]
    return tensors, metadata
