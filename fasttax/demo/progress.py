"""Progress bars that fit a terminal, and a log file (where a line every few seconds is enough)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A tqdm that is renewed five times a second on a terminal, every 5 seconds elsewhere."""
    return tqdm(
        items,
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
        dynamic_ncols=True,
        **options,
    )
