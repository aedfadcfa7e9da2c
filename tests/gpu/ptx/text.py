"""PTX as text: a module's entries with their parameters, and the statements of a body."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BYTES = {
    **{kind + "8": 1 for kind in "bus"},
    **{kind + "16": 2 for kind in ("b", "u", "s", "f", "bf")},
    **{kind + "32": 4 for kind in ("b", "u", "s", "f", "tf")},
    **{kind + "64": 8 for kind in ("b", "u", "s", "f")},
    **{"f16x2": 4, "bf16x2": 4, "b128": 16, "pred": 0},
}

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|pragma)\b[^\n]*", re.MULTILINE)
HEAD = re.compile(
    r"^[ \t]*(?:\.(?:visible|extern|weak)\s+)*\.(entry|func)\b\s*(\([^)]*\))?\s*([\w$.]+)\s*"
    r"(?:\(([^)]*)\))?([^{;]*)([{;])",
    re.MULTILINE,
)
VARIABLE = re.compile(
    r"^[ \t]*(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|global|const)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$.]+)\s*(\[\d*\])?[^;]*;",
    re.MULTILINE,
)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)([^,]*?)([\w$.]+)(\[\d+\])?\s*$")
STATEMENT = re.compile(r"\s*(?:([\w$.]+)\s*:(?!:)|([{}])|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")


class PtxError(Exception):
    """What cannot be read, or is not simulated."""


class Variable(NamedTuple):
    name: str
    align: int
    bytes: int  # 0: as many as the launch gives


class Parameter(NamedTuple):
    name: str
    at: int
    bytes: int


class Statement(NamedTuple):
    text: str
    at: int  # in the module's text
    label: bool = False


@dataclass
class Entry:
    """A kernel, or a function that kernels call.

    Attributes:
        name: mangled.
        parameters: with their offsets, as a launch lays them out.
        results: of a function.
        limits: of threads and the like: .maxntid, .reqntid, .reqnctapercluster.
        body: its place in the module's text.
    """

    name: str
    parameters: list[Parameter]
    results: list[Parameter]
    limits: dict[str, list[int]]
    body: tuple[int, int]

    @property
    def parameter_bytes(self) -> int:
        return max((p.at + p.bytes for p in self.parameters), default=0)


@dataclass
class Module:
    text: str
    target: str
    entries: dict[str, Entry] = field(default_factory=dict)
    functions: dict[str, Entry] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)  # where each begins

    def line(self, at: int) -> int:
        return bisect_right(self.lines, at)

    def statements(self, entry: Entry) -> Iterator[Statement]:
        """Labels, braces that open or close a scope, and what a semicolon ends."""
        at, end = entry.body
        while at < end:
            found = STATEMENT.match(self.text, at, end)
            if found is None:
                if self.text[at:end].strip():
                    raise PtxError(f"line {self.line(at)}: {self.text[at : at + 80]!r}")
                return
            label, brace, words = found.groups()
            if label is not None:
                yield Statement(label, found.start(1), True)
            elif brace is not None:
                yield Statement(brace, found.start(2))
            elif words.strip():
                yield Statement(words.strip(), found.start(3))
            at = found.end()


def variable(align: str | None, kind: str, name: str, length: str | None) -> Variable:
    size = BYTES[kind]
    count = 1 if length is None else int(length[1:-1] or 0)
    return Variable(name, max(int(align or 1), size), size * count)


def parameters(text: str | None) -> list[Parameter]:
    found, at = [], 0
    for part in (text or "").split(","):
        if not part.strip():
            continue
        match = PARAMETER.search(part.strip().strip("()").strip())
        if match is None:
            raise PtxError(f"a parameter: {part!r}")
        align, kind, _, name, length = match.groups()
        one = variable(None if ".ptr" in part else align, kind, name, length)
        at = -(-at // one.align) * one.align
        found.append(Parameter(name, at, one.bytes))
        at += one.bytes
    return found


def end_of(text: str, at: int) -> int:
    """Of the block whose brace is before `at`."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.start()
    raise PtxError("a block without an end")


def blank(match: re.Match[str]) -> str:
    """As many lines, empty, so that places stay what they are."""
    return re.sub(r"[^\n]", " ", match[0])


def parse(source: str) -> Module:
    """The module's outline; bodies are read when they are asked for."""
    text = DIRECTIVE.sub(blank, COMMENT.sub(blank, source))
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module(text, target[1] if target else "")
    module.lines = [0, *(m.end() for m in re.finditer("\n", text))]
    bodies = []
    at = 0
    while (head := HEAD.search(text, at)) is not None:
        kind, results, name, arguments, rest, opens = head.groups()
        at = head.end()
        if opens == ";":
            continue
        end = end_of(text, at)
        limits = {
            key: [int(n) for n in numbers.split(",")]
            for key, numbers in re.findall(r"\.(\w+)[ \t]+([\d, ]+)", rest)
        }
        entry = Entry(name, parameters(arguments), parameters(results), limits, (at, end))
        (module.entries if kind == "entry" else module.functions)[name] = entry
        bodies.append((head.start(), end))
        at = end
    for found in VARIABLE.finditer(text):
        inside = any(begin <= found.start() < end for begin, end in bodies)
        if found[1] == "shared" and not inside:
            one = variable(*found.groups()[1:])
            module.shared[one.name] = one
    return module
