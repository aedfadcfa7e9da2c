"""Files and folders that take their place whole or not at all, power losses included.

What is being written has a temporary name, and its writer holds a lock on it. A writer that was
killed holds none: who writes to that place next takes what it left away.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fasttax._base import checks

try:
    import fcntl
except ImportError:  # not a posix system: what a killed writer leaves stays
    fcntl = None  # type: ignore[assignment]

ADVICE = "; free space there, or save elsewhere: what stood there before stands"
LONGEST = 40  # characters of the place's name that a temporary one has, which may have 255 bytes


def path_of(op: str, argument: str, value: Any, expected: str = "a path") -> Path:
    """A value that names a file or folder.

    Raises:
        TypeError: it does not.
    """
    try:
        return Path(value)
    except TypeError:
        raise checks.fail(op, argument, expected, value, error=TypeError) from None


def for_file(op: str, path: str | os.PathLike[str]) -> Path:
    """`path`, where a file may be put: its folder is there, and it is none itself.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: it is not so; each names `op`, the
            path and the way out.
    """
    target = in_a_folder(op, path)
    if target.is_dir():
        text = f"{op}: cannot write {target}: expected a file's name, got that of a folder; "
        raise IsADirectoryError(f"{text}give a name in it, as {target / 'NAME'}")
    return target


def for_folder(op: str, path: str | os.PathLike[str]) -> Path:
    """`path`, where a folder may be put or stands.

    Raises:
        FileNotFoundError, NotADirectoryError: as `for_file`; a file stands there.
    """
    target = in_a_folder(op, path)
    if target.exists() and not target.is_dir():
        text = f"{op}: cannot write {target}: expected a folder's name, got that of a file; "
        raise NotADirectoryError(f"{text}delete it, or give another name")
    return target


def in_a_folder(op: str, path: str | os.PathLike[str]) -> Path:
    """`path`, whose folder is there.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not, or is a file.
    """
    target = path_of(op, "path", path)
    parent = target.parent
    if parent.is_dir():
        return target
    text = f"{op}: cannot write {target}: "
    for above in (parent, *parent.parents):
        if above.is_dir():
            break
        if above.exists():
            raise NotADirectoryError(f"{text}{above} is a file, no folder; give another path")
    raise FileNotFoundError(f"{text}folder {parent} does not exist; create it first")


def check_not_read(op: str, output: str | os.PathLike[str], inputs: Iterable[str]) -> None:
    """That an output is none of the files that are read, by another name or a link either.

    An input that is a folder is every file in it; what a writer keeps in OUTPUT.partial is its own.

    Raises:
        ValueError: it is one of them.
    """
    mine = _identities(Path(output)) | _identities(Path(f"{output}.partial"))
    for read in inputs if mine else ():
        if mine & _identities(Path(read)):
            raise ValueError(
                f"{op}: {os.fspath(output)}: expected a file that is not read, got one that is "
                f"read as {read}; give another output"
            )


def _identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of a file, or of every file in a folder; none where there is nothing."""
    found = set()
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with contextlib.suppress(OSError):  # what is no name of a file, as a Hub's, is none here
            state = os.stat(each)
            if not stat.S_ISDIR(state.st_mode):
                found.add((state.st_dev, state.st_ino))
    return found


@contextlib.contextmanager
def file(op: str, target: Path) -> Iterator[Path]:
    """An empty file beside `target`, whose place it takes if the block ends well.

    It vanishes if not. Its mode is that of the file that it replaces, or what the umask leaves of
    0666. Contents are on the disk before the name is, and it before this returns.

    Yields:
        The temporary name.

    Raises:
        OSError: as `for_file`; the system does not write. Names `target` and says what to do.
    """
    for_file(op, target)

    def new(temporary: Path) -> int:
        return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)

    with _temporary(target, new) as temporary:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        sync(temporary)
        os.replace(temporary, target)
    sync(target.parent)


@contextlib.contextmanager
def folder(op: str, target: Path) -> Iterator[Path]:
    """The same for a new folder, whose mode is what the umask leaves of 0777.

    Yields:
        The temporary folder.

    Raises:
        OSError: as `for_folder`; the system does not write. Names `target` and says what to do.
    """
    for_folder(op, target)

    def new(temporary: Path) -> int:
        temporary.mkdir()
        return os.open(temporary, os.O_RDONLY) if fcntl else -1

    with _temporary(target, new) as temporary:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.replace(temporary, target)
    sync(target.parent)


@contextlib.contextmanager
def _temporary(target: Path, new: Callable[[Path], int]) -> Iterator[Path]:
    """A name beside `target` under which `new` makes something; it is gone if the block fails."""
    with told(target):
        sweep(target.parent, target.name)
        temporary, descriptor = _locked(target, new)
        try:
            yield temporary
        except BaseException:
            _remove(temporary)
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)


@contextlib.contextmanager
def told(target: str | os.PathLike[str]) -> Iterator[None]:
    """The system's error of a full disk names no file, others the temporary one: they get `target`.

    And the way out.
    """
    try:
        yield
    except OSError as error:
        told_already = str(error.strerror).endswith(ADVICE)  # of a file in a folder that is to be
        ours = told_already or ".partial" in str(error.filename)
        if error.errno is None or (error.filename is not None and not ours):
            raise
        raise OSError(error.errno, os.strerror(error.errno) + ADVICE, str(target)) from error


def _locked(target: Path, new: Callable[[Path], int]) -> tuple[Path, int]:
    """A new temporary name and its descriptor, which holds the lock; -1 where there are none."""
    while True:
        temporary = target.with_name(f".{target.name[:LONGEST]}.{secrets.token_hex(8)}.partial")
        descriptor = new(temporary)
        if fcntl is None or (_lock(descriptor) and is_at(descriptor, temporary)):
            return temporary, descriptor
        # another writer came between the two and took it for what a killed one left
        os.close(descriptor)
        _remove(temporary)


def _lock(descriptor: int) -> bool:
    """Whether nobody else has it. Where the system has no locks nobody can take it away either."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether a name is still that of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers left in `folder`, of the place `name` or of all places there."""
    if fcntl is None:
        return
    stem = ".*" if name is None else re.escape(name[:LONGEST])
    left = re.compile(rf"\.{stem}\.[0-9a-f]{{16}}\.partial", re.DOTALL)
    for entry in os.listdir(folder):
        if left.fullmatch(entry):
            with contextlib.suppress(OSError):  # another one was faster, or it is another user's
                _remove_if_left(folder / entry)


def _remove_if_left(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """A file or a folder; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only posix opens folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
