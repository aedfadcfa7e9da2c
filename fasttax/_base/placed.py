"""Files and folders that take their place whole or not at all, power losses included."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path


def in_a_folder(op: str, path: str | os.PathLike[str]) -> Path:
    """`path`, whose folder is there.

    Raises:
        FileNotFoundError: it is not.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{op}: cannot write {target}: folder {target.parent} does not exist; create it first"
        )
    return target


@contextlib.contextmanager
def file(target: Path, lasting: bool = True) -> Iterator[Path]:
    """An empty file beside `target`, whose place it takes if the block ends well.

    It vanishes if not. Its mode is that of the file that it replaces, or what the umask leaves of
    0666. If `lasting`, contents are on the disk before the name is, and it before this returns.

    Yields:
        The temporary name.
    """
    temporary = _beside(target)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        if lasting:
            sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if lasting:
        sync(target.parent)


@contextlib.contextmanager
def folder(target: Path) -> Iterator[Path]:
    """The same for a new folder, whose mode is what the umask leaves of 0777.

    Yields:
        The temporary folder.
    """
    temporary = _beside(target)
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def _beside(target: Path) -> Path:
    """A free name in the folder of `target`, within the 255 bytes that a name may have."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only posix opens folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
