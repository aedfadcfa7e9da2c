"""The public names of fasttax, read from its sources: no module is imported."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"fasttax.merge": ["sweep"]}  # on use, as the room's __getattr__ has it
ELSEWHERE = {"fasttax.merge.sweep": "fasttax.tax.sweeps"}  # where what comes on use is defined
ENTRIES = ("main",)  # of `python -m`


def source(module: str) -> Path:
    """The file of a module."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree(module: str) -> ast.Module:
    """A module's syntax."""
    return ast.parse(source(module).read_text(encoding="utf-8"))


def assigned(module: str, name: str) -> list[str] | None:
    """The strings of a list or tuple that a module binds to `name`; None where it does not."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [
                leaf.value
                for leaf in ast.walk(node.value)
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
            ]
    return None


def trainers() -> list[str]:
    """The modules of fasttax.integrations, each for a framework."""
    found = assigned("fasttax.integrations", "MODULES") or []
    return [f"fasttax.integrations.{name}" for name in found]


def public() -> list[str]:
    """The modules whose names are public."""
    families = ("functional", "ewc", "fisher", "kl", "merge", "tax", "integrations")
    return ["fasttax", *(f"fasttax.{name}" for name in families), *trainers()]


def names(module: str) -> list[str]:
    """A module's `__all__`, or where it has none the functions and classes that it defines."""
    listed = assigned(module, "__all__")
    if listed is not None:
        return [*listed, *BESIDE.get(module, [])]
    kinds = (ast.ClassDef, ast.FunctionDef)
    defined = [node.name for node in tree(module).body if isinstance(node, kinds)]
    return [n for n in dict.fromkeys(defined) if not n.startswith("_") and n not in ENTRIES]


def home(module: str, name: str) -> str:
    """The module that defines what another one has by import."""
    if f"{module}.{name}" in ELSEWHERE:
        return ELSEWHERE[f"{module}.{name}"]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            return home(str(node.module), name)
    return module


def docstring(module: str) -> str:
    """A module's."""
    return ast.get_docstring(tree(module)) or ""
