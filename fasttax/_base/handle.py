"""A handle takes out what was put into another object: an optimizer, a trainer, a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

H = TypeVar("H", bound="Handle")
_MISSING = object()


class Handle:
    """`undo()`, also called `remove()` as torch names it on its hooks, takes back what was done.

    Any number of calls does it once. A handle is a context manager, too: leaving the block undoes.
    """

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """Whether something is still in place."""
        return bool(self._restore)

    def on_undo(self, restore: Callable[[], None]) -> None:
        """Has `undo` call `restore`, before whatever was put in place earlier is taken out."""
        self._restore.append(restore)

    def put(self, make: Callable[..., Any], *args: Any) -> None:
        """What `make` puts somewhere, until `undo`; it has a `remove()`, as torch's hooks have.

        An exception on the way, as Ctrl-C raises, leaves none that `undo` does not know.
        """
        made: list[Any] = []

        def remove() -> None:
            for each in made:
                each.remove()

        self.on_undo(remove)
        made.append(make(*args))

    @contextmanager
    def or_undone(self) -> Iterator[None]:
        """What puts several things into their places within: all of them, or none."""
        try:
            yield
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Takes everything out, the last first.

        What raises stays, with all that came before it, and the next call tries it again.
        """
        while self._restore:
            self._restore[-1]()
            self._restore.pop()

    def remove(self) -> None:
        """`undo`, under the name that torch's handles have."""
        self.undo()

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def replace(self, owner: Any, name: str, value: Any, label: str) -> None:
        """owner.name = value until `undo`.

        What was in the owner's own namespace (or was not) comes back. Where another has replaced
        the attribute since, `undo` raises a RuntimeError that names `label` and leaves it alone.
        """
        before = vars(owner).get(name, _MISSING)

        def restore() -> None:
            now = vars(owner).get(name, _MISSING)
            if now is before:
                return  # an exception came before it was replaced
            if now is not value:
                raise RuntimeError(
                    f"{label} was replaced again after fasttax did, by something that is still in "
                    "place; undo that first"
                )
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self.on_undo(restore)
        setattr(owner, name, value)
