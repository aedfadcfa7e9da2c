"""One source file of the tree: its lines of code, its comments, its Python tree."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPP = (".h", ".cuh", ".cpp", ".cu")
SPACE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Source:
    """One file, by its path from the root."""

    path: Path

    @cached_property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def python(self) -> bool:
        return self.path.suffix == ".py"

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def bare(self) -> str:
        """C++ with its comments blanked and its literals emptied, line by line as it was."""
        pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])+'"

        def blank(match: re.Match[str]) -> str:
            kept = '""' if match[0][0] in "\"'" else ""
            return kept + "\n" * match[0].count("\n")

        return re.sub(pattern, blank, self.text, flags=re.DOTALL)

    @cached_property
    def code_lines(self) -> list[str]:
        if not self.python:
            bare = self.bare.splitlines()
            return [line for line, left in zip(self.lines, bare, strict=False) if left.strip()]
        numbers: set[int] = set()
        for token in self.tokens:
            if token.type not in SPACE:
                numbers.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                numbers -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
        return [self.lines[number - 1] for number in sorted(numbers)]

    @cached_property
    def comments(self) -> list[str]:
        if self.python:
            return [token.string for token in self.tokens if token.type == tokenize.COMMENT]
        return re.findall(r"//[^\n]*", self.text)


def sources(*places: str) -> list[Source]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else path.rglob("*")
    return [Source(path) for path in sorted(found) if path.suffix in (".py", *CPP)]
