"""Values that may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def given(value: Given | None, then: Callable[[Given], Result]) -> Result | None:
    """What `then` makes of the value; None where there is none."""
    return None if value is None else then(value)
