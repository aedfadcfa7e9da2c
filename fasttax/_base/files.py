"""safetensors files with provenance in the header, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasttax._base.hashes import weights_hash as weights_hash

FORMAT_KEY = "fasttax"


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Writes to a temporary name in the same folder and renames: a crash leaves the old file."""
    target = _in_a_folder("fasttax", path)
    header = {FORMAT_KEY: kind, "metadata": json.dumps(dict(metadata))}
    with renamed(target) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary,
            metadata=header,
        )


def whole(op: str, path: str | os.PathLike[str], produce: Callable[[Path], object]) -> Path:
    """Has `produce` write a file of any kind, readable by all, in the same way."""
    target = _in_a_folder(op, path)
    with renamed(target) as temporary:
        produce(Path(temporary))
        os.chmod(temporary, 0o644)
    return target


def _in_a_folder(op: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{op}: cannot write {target}: folder {target.parent} does not exist; create it first"
        )
    return target


@contextlib.contextmanager
def renamed(target: Path) -> Iterator[str]:
    """A temporary name beside `target`, whose place it takes if the block ends well.

    It vanishes if not.

    Yields:
        The temporary name.
    """
    handle, temporary = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".partial", dir=target.parent
    )
    os.close(handle)
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _opened(path, kind) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no Mapping)


def read_metadata(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    with _opened(path, kind) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(
            f"fasttax: no file {target}; expected a {kind} file written by .save()"
        )
    try:
        with safe_open(target, framework="pt") as file:
            header = file.metadata() or {}
            if header.get(FORMAT_KEY) != kind:
                found = header.get(FORMAT_KEY, "no fasttax header")
                raise ValueError(
                    f"fasttax: {target} is not a {kind} file: expected header "
                    f"{FORMAT_KEY}={kind!r}, got {found!r}; write it with .save()"
                )
            yield file, json.loads(header["metadata"])
    except SafetensorError as error:
        raise ValueError(
            f"fasttax: {target} is truncated or no safetensors file ({error}); write it anew with "
            ".save()"
        ) from error
