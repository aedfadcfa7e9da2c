"""The planted faults, which are data: the .txt files beside this one.

A fault is a line of three parts, the file's text that it takes away and what it puts there; a blank
line ends it. What nothing finds says why that is, in lines of prose:

    @ csrc/cuda/ewc.cuh | off by one | simt ewc
    - i < end
    + i <= end
    why: ...

The last part is who must find it (killers.py). The text must be in the file once: a fault whose
text is not is stale, and an error, so that a kernel that is rewritten takes its faults along.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


class Mutant(NamedTuple):
    file: str
    kind: str
    killer: str
    old: str
    new: str
    why: str  # nothing finds it
    source: str  # "cuda.txt:12"

    @property
    def name(self) -> str:
        return f"{self.source} {self.file}: {self.kind}"

    def is_stale(self, root: Path = ROOT) -> bool:
        """Whether its text is no longer in its file once."""
        path = root / self.file
        return not path.exists() or path.read_text().count(self.old) != 1

    def plant(self, root: Path) -> None:
        """Puts it into a copy of the tree."""
        assert root != ROOT
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def _block(lines: list[str], source: str) -> Mutant:
    match = re.fullmatch(r"@ (\S+) \| ([^|]+) \| (.+)", lines[0])
    assert match, f"{source}: expected '@ file | kind | killer', got {lines[0]!r}"
    old = [line[2:] for line in lines[1:] if line.startswith("- ")]
    new = [line[2:] for line in lines[1:] if line.startswith("+ ")]
    prose = [line for line in lines[1:] if not line.startswith(("- ", "+ "))]
    assert old, f"{source}: nothing is taken away"
    assert not prose or prose[0].startswith("why: "), f"{source}: {prose[0]!r}?"
    why = " ".join(prose).removeprefix("why: ")
    return Mutant(match[1], match[2], match[3], "\n".join(old), "\n".join(new), why, source)


def read(path: Path) -> Iterator[Mutant]:
    """The faults of a file."""
    lines: list[str] = []
    first = 0
    for number, line in enumerate([*path.read_text().splitlines(), ""], 1):
        if line.startswith("@ "):
            first = number
        if line and first:
            lines.append(line)
        elif lines:
            yield _block(lines, f"{path.name}:{first}")
            lines, first = [], 0


def catalog() -> list[Mutant]:
    """All of them."""
    return [mutant for path in sorted(FOLDER.glob("*.txt")) for mutant in read(path)]


def stale(mutants: Iterable[Mutant]) -> list[Mutant]:
    """Those that the source has left behind."""
    return [mutant for mutant in mutants if mutant.is_stale()]
