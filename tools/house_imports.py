"""Who imports whom: rooms, floors, circles, and the arrows that run back up.

Rooms are the entries of fasttax/ (a file, or a folder with all that is in it), csrc/ and bench/. An
arrow goes from a room to each room that it imports. A circle is a set of files that import, or
include, each other in a loop: Python's import statements wherever they stand, C++'s #include "...".
A name imported from a package is an arrow to the submodule of that name, else to the package's
__init__.py. Not counted: importlib, and that importing a submodule runs its packages too.

Floor 1 imports no other room, and each other room stands one above the highest that it imports.
Where rooms import each other in a loop, the arrows that run back up are those whose removal opens
all loops, found greedily: the arrow that opens most goes first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from house_source import ROOT, Source

Graph = dict[str, set[str]]


def imported(source: Source, names: dict[str, str], scope: ast.AST) -> Iterator[str]:
    """The project's files that the import statements within `scope` name; `names` by module."""
    package = source.path.relative_to(ROOT).parent.parts
    for node in ast.walk(scope):
        if isinstance(node, ast.Import):
            yield from (names[alias.name] for alias in node.names if alias.name in names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = names.get(f"{module}.{alias.name}", names.get(module))
                if target:
                    yield target


def module_names(files: Iterable[Source]) -> dict[str, str]:
    names = {}
    for source in files:
        parts = Path(source.name).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = source.name
    return names


def includes(source: Source) -> Iterator[str]:
    for name in re.findall(r'^\s*#\s*include "([^"]+)"', source.text, flags=re.MULTILINE):
        for folder in (source.path.parent, ROOT / "csrc"):
            path = (folder / name).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                yield path.relative_to(ROOT).as_posix()
                break


def file_graph(files: list[Source]) -> Graph:
    names = module_names(source for source in files if source.python)
    graph: Graph = {}
    for source in files:
        found = imported(source, names, source.tree) if source.python else includes(source)
        graph[source.name] = set(found) - {source.name}
    return graph


def room(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == "fasttax" else parts[0]


def room_graph(files: Graph) -> Graph:
    rooms: Graph = {room(name): set() for name in files}
    for name, targets in files.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return rooms


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def circles(graph: Graph) -> list[list[str]]:
    reach = {name: reachable(graph, name) for name in graph}
    found = {tuple(sorted(o for o in reach[n] if n in reach[o])) for n in graph if n in reach[n]}
    return [list(circle) for circle in sorted(found)]


def arrows_up(graph: Graph) -> list[tuple[str, str]]:
    """Arrows to take away, one at a time, until no loop is left: the one that opens most first."""
    graph = {name: set(targets) for name, targets in graph.items()}
    taken: list[tuple[str, str]] = []
    while loops := circles(graph):
        within = [(a, b) for loop in loops for a in loop for b in graph[a] if b in loop]

        def left(arrow: tuple[str, str]) -> int:
            a, b = arrow
            graph[a].discard(b)
            size = sum(len(loop) for loop in circles(graph))
            graph[a].add(b)
            return size

        a, b = min(sorted(within), key=left)
        graph[a].discard(b)
        taken.append((a, b))
    return taken


def floors(graph: Graph) -> dict[str, int]:
    up = set(arrows_up(graph))
    below = {a: [b for b in targets if (a, b) not in up] for a, targets in graph.items()}
    height: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((floor(b) for b in below[name]), default=0)
        return height[name]

    return {name: floor(name) for name in graph}


def hidden_imports(files: list[Source], graph: Graph) -> list[str]:
    """Imports inside functions of what imports the file back."""
    python = [source for source in files if source.python]
    names = module_names(python)
    found = []
    for source in python:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                targets = imported(source, names, node)
                back = [target for target in targets if source.name in reachable(graph, target)]
                found += [f"{source.name}:{node.name} -> {target}" for target in back]
    return sorted(set(found))
