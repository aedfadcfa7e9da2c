"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fasttax.demo.settings import DemoError


def write(path: Path, produce: Callable[[Path], object]) -> None:
    """Has `produce` write to a temporary name beside `path`, then renames."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        produce(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def folder(path: Path, what: str) -> Path:
    """Creates a folder that can be written to, or says what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise DemoError(f"cannot write to {what} {path} ({error.strerror}); expected a folder, or a place where one can be made") from None
