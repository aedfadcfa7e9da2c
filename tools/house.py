"""Prints the numbers that this house is held to, and fails when one is missed: `make house`.

Rooms, floors, circles and arrows are as tools/house_imports.py defines them. A code line holds more
than a comment or a docstring. A private name is another object's where it is used as x._name, or is
imported, and a file of the package defines it, this one does not, and x is not self or cls.
`--compile` adds the CPU-seconds of compiling after a change of csrc/math/kl.h: it builds the CPU
kernels into build/house, with one instruction set and with all, which takes minutes.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from house_imports import arrows_up, circles, file_graph, floors, hidden_imports, room_graph
from house_source import ROOT, Source, sources

CODE = ("fasttax", "csrc", "tests", "bench")
# A definition of a C++ function by the name of a formula of csrc/math/kl*.h.
FORMULA = re.compile(r"\b\w+\s+\w*(?:log_mix|bend|bregman|defect|jsd_g)\w*\([^;{}]*\)\s*\{")
FORMATTER_OFF = re.compile(r"fmt: *(skip|off)|clang-format off")


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined_private(source: Source) -> set[str]:
    """Names with one leading underscore that the file binds: functions, classes, attributes."""
    names: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            names.add(node.attr)
    return {name for name in names if re.match(r"_[^_]", name)}


def foreign_private(package: list[Source]) -> list[str]:
    """Uses of private names that another file of the package defines, and this one does not."""
    defined = {source.name: defined_private(source) for source in package}
    everywhere = set().union(*defined.values())
    modules = {part for source in package for part in Path(source.name).with_suffix("").parts}
    found = []
    for source in package:
        others = everywhere - defined[source.name] - modules
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in others and not of_self(node):
                found.append(f"{source.name}:{node.lineno} .{node.attr}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fasttax"):
                taken = [alias.name for alias in node.names if alias.name in others]
                found += [f"{source.name}:{node.lineno} import {name}" for name in taken]
    return found


# --- the table --------------------------------------------------------------------------------


@dataclass
class Figure:
    what: str
    value: float
    goal: float | None  # at most; None: no goal
    where: list[str]  # the places that count, for --where

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.value > self.goal


def plan() -> list[Figure]:
    files = sources("fasttax", "csrc", "bench")
    graph = file_graph(files)
    rooms = room_graph(graph)
    height = floors(rooms)
    loops = [" ".join(loop) for loop in circles(graph)]
    up = [f"{a} -> {b}" for a, b in arrows_up(rooms)]
    hidden = hidden_imports(files, graph)
    arrows = [f"{a} -> {b}" for a in sorted(rooms) for b in sorted(rooms[a])]
    storeys = [f"{height[name]:2} {name}" for name in sorted(rooms, key=lambda n: (-height[n], n))]
    return [
        Figure("circles of files", len(loops), 0, loops),
        Figure("arrows that run back up", len(up), 0, up),
        Figure("imports in functions that hide a circle", len(hidden), 0, hidden),
        Figure("rooms at the top", len(rooms), 16, storeys),
        Figure("floors", max(height.values()), 10, storeys),
        Figure("arrows between rooms", len(arrows), None, arrows),
    ]


def worst(counts: dict[str, int]) -> list[str]:
    ordered = sorted(counts, key=lambda name: -counts[name])
    return [f"{counts[name]:4} {name}" for name in ordered if counts[name]]


def share(counts: dict[str, int], files: list[Source]) -> float:
    lines = sum(len(source.code_lines) for source in files)
    return round(100 * sum(counts.values()) / lines, 2)


def ternaries(what: str, files: list[Source], goal: float | None) -> Figure:
    def count(source: Source) -> int:
        if source.python:
            return sum(isinstance(node, ast.IfExp) for node in ast.walk(source.tree))
        return source.bare.count("?")  # C++ has the character nowhere else

    counts = {source.name: count(source) for source in files}
    return Figure(f"{what} per 100 code lines", share(counts, files), goal, worst(counts))


def writing() -> list[Figure]:
    files = sources(*CODE)
    package, cpp, others = (
        sources(*places) for places in (["fasttax"], ["csrc"], ["tests", "bench"])
    )
    everything = [*files, *sources("tools", "examples", "setup.py")]
    wide = {s.name: sum(len(line) > 100 for line in s.code_lines) for s in files}
    wider = {s.name: sum(len(line) > 110 for line in s.lines) for s in everything}
    off = {s.name: sum(map(bool, map(FORMATTER_OFF.search, s.comments))) for s in everything}
    long = {s.name: len(s.lines) for s in everything if len(s.lines) > 500}
    reaches = foreign_private(package)
    return [
        Figure("code lines over 100 columns, %", share(wide, files), 2, worst(wide)),
        Figure("lines over 110 columns", sum(wider.values()), 0, worst(wider)),
        Figure("places where the formatter is off", sum(off.values()), 0, worst(off)),
        ternaries("ternaries of fasttax/", package, 2.5),
        ternaries("ternaries of tests/ and bench/", [s for s in others if s.python], 2.5),
        ternaries("?: of csrc/", cpp, None),
        Figure("files over 500 lines", len(long), 0, worst(long)),
        Figure("uses of another object's private names", len(reaches), 0, reaches),
    ]


def formulas() -> list[Figure]:
    """The KL's formulas stand in csrc/math, in the reference and in Triton's twin."""
    again = {
        s.name: len(FORMULA.findall(s.bare)) for s in sources("csrc/call", "csrc/cpu", "csrc/cuda")
    }
    what = "KL formulas written again in csrc/, outside math/"
    return [Figure(what, sum(again.values()), 0, worst(again))]


def touched(commit: str) -> list[Figure]:
    """How many production files a commit changes, that adds a divergence, say."""
    command = ["git", "show", "--format=", "--name-only", commit, "--", "fasttax", "csrc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    return [Figure(f"production files that {commit} touches", len(names), None, names)]


# --- how long a change takes to compile -------------------------------------------------------


def recompiling(isa: str | None) -> float:
    """CPU-seconds that ninja and its compilers take after csrc/math/kl.h has changed."""
    folder = ROOT / "build" / "house" / (isa or "all")
    options = ["--build-temp", str(folder), "--build-lib", str(folder / "lib")]
    one = ["--isa", isa] if isa else []
    command = [sys.executable, "setup.py", "-q", "build_ext", *options, *one]
    environment = os.environ | {"FASTTAX_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    header = ROOT / "csrc" / "math" / "kl.h"
    before = header.stat()
    header.touch()
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    ninja = Path(sys.executable).parent / "ninja"
    try:
        subprocess.run([ninja, "--quiet"], cwd=folder / "fasttax._C", check=True)
    finally:
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime, 1)


def compiling() -> list[Figure]:
    what = "CPU-seconds to compile after a change of math/kl.h, "
    return [
        Figure(what + "one ISA", recompiling("native"), 25, []),
        Figure(what + "all", recompiling(None), None, []),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/house.py", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="measure compiling too (minutes)")
    parser.add_argument("--commit", metavar="REV", help="count the production files it touches")
    parser.add_argument("--where", metavar="WORDS", help="list every place of the figures so named")
    asked = parser.parse_args()
    figures = [*plan(), *formulas(), *writing()]
    if asked.commit:
        figures += touched(asked.commit)
    if asked.compile:
        figures += compiling()
    for figure in figures:
        goal = "" if figure.goal is None else f"<= {figure.goal:g}"
        print(f"{figure.what:60} {figure.value:8g} {goal:>7}{'  MISSED' * figure.missed}")
        if asked.where and asked.where in figure.what:
            print(*(f"    {place}" for place in figure.where), sep="\n")
    missed = [figure for figure in figures if figure.missed]
    for figure in missed:
        if not asked.where:
            print(f"\n{figure.what}, for example:", *figure.where[:10], sep="\n    ")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
