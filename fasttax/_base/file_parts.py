"""A folder of safetensors files under one index.

For estimates that no file or rank should hold whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax._base import dtensor, files, mapped, packed, placed

try:
    import fcntl
except ImportError:  # not a posix system: writers of one folder must take turns by themselves
    fcntl = None  # type: ignore[assignment]

INDEX = "index.safetensors"
PART = re.compile(r"part-[0-9a-f]+-\d+\.safetensors")
TRIES = 1000  # to open all parts of a folder while others replace them


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
    rank 0 writes; the others help to gather. Of several writers one comes after the other.
    """
    together = dist.is_available() and dist.is_initialized()
    with contextlib.ExitStack() as stack:
        parts = None
        if not together or dist.get_rank() == 0:
            target = placed.for_folder(kind, folder)
            target.mkdir(exist_ok=True)
            stack.enter_context(_alone_in(target))
            parts = stack.enter_context(_written(target, kind, metadata))
        part: dict[str, Tensor] = {}
        names: list[str] = []
        for name, tensors in groups.items():
            whole = {n: dtensor.whole(t) for n, t in tensors.items()}
            if part and _bytes(part) + _bytes(whole) > max_bytes:
                _add(parts, part, names)
                part, names = {}, []
            part |= whole
            names.append(name)
        if part:
            _add(parts, part, names)
    if together:
        dist.barrier()


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _add(parts: _Parts | None, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    """Writes a part on the rank that writes."""
    if parts is not None:
        parts.add(tensors, names)


class _Parts:
    """The part files of one index, as they are written."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.token = folder, kind, secrets.token_hex(4)
        self.named: dict[str, list[str]] = {}

    def add(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        file = f"part-{self.token}-{len(self.named):05d}.safetensors"
        files.write(self.folder / file, self.kind, tensors, {})
        self.named[file] = names


@contextlib.contextmanager
def _written(folder: Path, kind: str, metadata: Mapping[str, Any]) -> Iterator[_Parts]:
    """Parts whose index takes its place if the block ends well; without it they vanish.

    Yields:
        The parts, none at first.
    """
    placed.sweep(folder)
    old = [*folder.glob("part-*.safetensors")]
    parts = _Parts(folder, kind)
    try:
        yield parts
        empty = {"empty": torch.empty(0, dtype=torch.float32, device="cpu")}
        files.write(folder / INDEX, kind, empty, {**metadata, "_parts": parts.named})
    except BaseException:
        old = [folder / file for file in parts.named]
        raise
    finally:
        for path in old:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for other writers of a folder; readers wait for nobody."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Parts(mapped.Open, Mapping[str, Tensor]):
    """The tensors of one file or of a folder's part files, read when they are asked for.

    Every file is open from the start: writers that come later change nothing.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, of another kind, or not what the index says of it.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        super().__init__(self._stack)
        self._file_of: dict[str, mapped.TensorFile] = {}
        try:
            with _named():
                self._open(kind)
        except BaseException:
            self.close()
            raise

    def _open(self, kind: str) -> None:
        if not self.path.is_dir():
            file = self._stack.enter_context(files.opened_file(self.path, kind))
            self.metadata = files.metadata_of(file)
            self._file_of = dict.fromkeys(file, file)
            return
        for tries in range(TRIES):
            with files.opened_file(self.path / INDEX, kind) as index:
                self.metadata = files.metadata_of(index)
                named = _checked(index.path, self.metadata.pop("_parts", None))
            try:
                for part, names in named.items():
                    path = self.path / part
                    file = self._stack.enter_context(files.opened_file(path, kind))
                    self._take(file, names)
                self._refuse_unlisted(named)
            except FileNotFoundError:
                self.close()
                self._file_of.clear()
                if tries + 1 == TRIES or self._is_index_of(named, kind):
                    raise
            else:
                return

    def _refuse_unlisted(self, named: Mapping[str, Any]) -> None:
        """Part files that were written with those of the index, which does not name them."""
        for token in {part.split("-")[1] for part in named}:
            beside = {path.name for path in self.path.glob(f"part-{token}-*.safetensors")}
            if beside - set(named):
                raise mapped.BadFileError(
                    f"{self.path / INDEX} does not name {', '.join(sorted(beside - set(named)))}"
                )

    def _is_index_of(self, named: Mapping[str, Any], kind: str) -> bool:
        """Whether the index is still the one that names these parts."""
        with files.opened_file(self.path / INDEX, kind) as index:
            return bool(files.metadata_of(index).get("_parts") == named)

    def _take(self, file: mapped.TensorFile, names: list[str]) -> None:
        """A part, which must have what the index says: under each name one kind or more."""
        found = {key.partition(".")[2] for key in file}
        if found != set(names):
            differing = sorted(found ^ set(names))
            raise mapped.BadFileError(
                f"{file.path} has other tensors than {INDEX} says: {', '.join(differing[:5])}"
            )
        twice = sorted(set(file) & set(self._file_of))
        if twice:
            raise mapped.BadFileError(f"{file.path}: {twice[0]} is in another part too")
        self._file_of |= dict.fromkeys(file, file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        with _named():
            return self._file_of[name][name]

    def some(self, *names: str) -> dict[str, Tensor]:
        """Those of the names that are there, of one file.

        Raises:
            ValueError: one is damaged, or no Fisher.
        """
        tensors = {name: self[name] for name in names if name in self}
        where = {str(self._file_of[name].path) for name in tensors}
        packed.check_squares(" ".join(where), tensors)
        return tensors

    def every(self) -> dict[str, Tensor]:
        """All of them, file by file."""
        tensors: dict[str, Tensor] = {}
        for file in {id(file): file for file in self._file_of.values()}.values():
            tensors |= self.some(*file)
        return tensors


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A damaged file's error says how to get a whole one."""
    try:
        yield
    except mapped.BadFileError as error:
        raise ValueError(f"fasttax: {error}; write it anew with .save()") from None


def _checked(index: Path, parts: Any) -> dict[str, list[str]]:
    """The part files that an index names, all of them of its own folder."""
    if not isinstance(parts, dict):
        raise mapped.BadFileError(f"{index} names no part files")
    for part, names in parts.items():
        if not PART.fullmatch(part):
            raise mapped.BadFileError(f"{index} names {part!r}, which is no part file beside it")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise mapped.BadFileError(f"{index} names no tensors of {part}")
    return parts
