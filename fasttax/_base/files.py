"""safetensors files with provenance in the header, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttax._base import mapped, packed, placed
from fasttax._base.hashes import weights_hash as weights_hash


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Writes to a temporary name in the same folder and renames: a crash leaves the old file.

    Tensors may share memory; each is written whole.
    """
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    mapped.write_streamed(path, kind, specs, metadata, tensors.items())


def whole(op: str, path: str | os.PathLike[str], produce: Callable[[Path], object]) -> Path:
    """Has `produce` write a file of any kind in the same way."""
    target = Path(path)
    with placed.file(op, target) as temporary:
        produce(temporary)
    return target


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata, once they are what a file of this kind may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or holds squares that are none.
    """
    with opened(path, kind) as (file, metadata):
        return checked(file), metadata


def checked(file: mapped.TensorFile) -> dict[str, Tensor]:
    """Every tensor of a file.

    Raises:
        ValueError: one is damaged, or of squares that are none.
    """
    tensors = dict(file)
    packed.check_squares(os.fspath(file.path), tensors)
    return tensors


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], kind: str
) -> Iterator[tuple[mapped.TensorFile, dict[str, Any]]]:
    """The open file and its metadata; a damaged file's errors say how to get a whole one.

    Yields:
        The file, whose tensors are read when they are asked for.
    """
    try:
        with opened_file(path, kind) as file:
            yield file, metadata_of(file)
    except mapped.BadFileError as error:
        raise ValueError(f"fasttax: {error}; write it anew with .save()") from None


def read_json(op: str, path: str | os.PathLike[str], way_out: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it holds none; names the file and the way out.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{os.fspath(path)}: expected JSON, got none ({error})"
        raise ValueError(f"{op}: {reason}; {way_out}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{op}: {os.fspath(path)}: expected a JSON object; {way_out}")
    return found


_WRITE = "write it with .save()"
_READ_BY = {  # what reads a file of another kind
    "EWC": "it is read by EWC.load(path, model)",
    "FisherEstimate": "it is read by FisherEstimate.load(path), and EWC(model, path, strength=...)",
    "KroneckerEstimate": "it is read by KroneckerEstimate.load(path), and EWC(model, path, "
    "strength=...)",
    "TopKReference": "it is read by TopKReference.load(path), and FullKL(trainer, path, beta)",
    "DiagonalFisher": "it is an estimation's checkpoint: pass it as estimate_fisher(checkpoint=)",
}


def _file_of(kind: str) -> str:
    return f"{'an' if kind.startswith('EWC') else 'a'} {kind} file"


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind that a file's header names; "" of a folder, or where it has none."""
    target = Path(path)
    if not target.is_file():
        return ""
    try:
        with mapped.TensorFile(target) as file:
            return file.about.get(mapped.FORMAT_KEY, "")
    except mapped.BadFileError:
        return ""


def opened_file(path: str | os.PathLike[str], kind: str) -> mapped.TensorFile:
    """The open file, which is of this kind."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(
            f"fasttax: no file {target}; expected {_file_of(kind)} written by .save()"
        )
    file = mapped.TensorFile(target)
    found = file.about.get(mapped.FORMAT_KEY, "no fasttax header")
    if found != kind:
        file.close()
        raise ValueError(
            f"fasttax: {target} is not {_file_of(kind)}: expected header "
            f"{mapped.FORMAT_KEY}={kind!r}, got {found!r}; {_READ_BY.get(found, _WRITE)}"
        )
    return file


def metadata_of(file: mapped.TensorFile) -> dict[str, Any]:
    """What `write` was given."""
    try:
        metadata = json.loads(file.about["metadata"])
    except (KeyError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise mapped.BadFileError(f"{file.path} is truncated or no safetensors file (no metadata)")
    return metadata
