"""What every integration returns, and how it replaces an attribute so that it can be put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Handle:
    """`undo()`, any number of times, takes back what was done; also a context manager."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        return bool(self._restore)

    def undo(self) -> None:
        while self._restore:
            self._restore[-1]()  # one that raises stays, to be tried again
            self._restore.pop()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def replace(self, owner: Any, name: str, value: Any, label: str) -> None:
        """owner.name = value until `undo`.

        What was in the owner's own namespace (or was not) comes back.
        """
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

        def restore() -> None:
            if vars(owner).get(name, _MISSING) is not value:
                raise RuntimeError(
                    f"{label} was replaced again after fasttax did, by something that is still in "
                    "place; undo that first"
                )
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._restore.append(restore)
