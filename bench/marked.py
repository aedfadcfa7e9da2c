"""Text between a pair of marks in a file, which a command writes."""

from __future__ import annotations

from pathlib import Path


def renew(path: Path, name: str, text: str) -> None:
    """Puts `text` between <!-- NAME:begin --> and <!-- NAME:end -->."""
    whole = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, tail = whole.index(begin) + len(begin), whole.index(end)
    path.write_text(f"{whole[:head]}\n{text.strip()}\n{whole[tail:]}", encoding="utf-8")
