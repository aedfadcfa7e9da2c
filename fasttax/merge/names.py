"""Names of one tensor under wrappers, and errors that list how names differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fasttax._base import wrappers

PEFT, BASE_LAYER = "base_model.model.", "base_layer"  # PEFT's, the latter where an adapter is


def bare(name: str) -> str:
    """The name without what wrappers put into it.

    Copies of one module that PEFT keeps (modules_to_save, original_module) stay apart: a file has
    all of them, and nothing says which is used.
    """
    parts = [part for part in name.split(".") if part not in wrappers.TORCH]
    short = ".".join(parts)
    if short.startswith(PEFT):
        parts = [part for part in short.removeprefix(PEFT).split(".") if part != BASE_LAYER]
        short = ".".join(parts)
    return short


def paired(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """For each name the one of `others` that is the same, or the same but for wrappers."""
    found = {name: name for name in set(names) & set(others)}
    by_bare: dict[str, list[str]] = {}
    for other in others:
        if other not in found:
            by_bare.setdefault(bare(other), []).append(other)
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name not in found:
            wanted.setdefault(bare(name), []).append(name)
    for short, mine in wanted.items():
        theirs = by_bare.get(short, [])
        if len(mine) == len(theirs) == 1:
            found[mine[0]] = theirs[0]
    return found


class Renamed(Mapping[str, Tensor]):
    """The tensors of `source` under other names: `names` maps each to one of the source's."""

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.source, self.names = source, names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.names[name]]


def shortened(lines: Sequence[str]) -> str:
    """The first 20, a line each, and how many more there are."""
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n  ".join([*lines[:20], *more])
