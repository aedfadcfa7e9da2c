"""Results as JSON, to a file or to stdout: what `--json` of a command asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fasttax._base import files

STDOUT = "-"  # as the name of a --json


def finite(value: Any) -> Any:
    """The value with None for numbers that are none: JSON has no inf and nan."""
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def text_of(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """The content as JSON, null for inf and nan; `default` makes JSON of what is none."""
    return json.dumps(finite(content), indent=1, default=default, allow_nan=False) + "\n"


def put(op: str, path: str, text: str) -> Path | None:
    """Prints the text where `path` is "-"; else writes it, whole or not at all, and says where."""
    if path == STDOUT:
        print(text, end="")
        return None
    return files.whole(op, path, lambda target: target.write_text(text, encoding="utf-8"))
