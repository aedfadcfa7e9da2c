"""Files of text."""

from __future__ import annotations

from pathlib import Path


def read(path: str | Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: it is none; names it.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None
