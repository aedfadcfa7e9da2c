"""The folders that the demo writes to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fasttax.demo.settings import DemoError


def folder(path: Path, what: str) -> Path:
    """Creates a folder that can be written to, or says what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise DemoError(
            f"cannot write to {what} {path} ({error.strerror}); expected a folder, or a place "
            "where one can be made"
        ) from None
