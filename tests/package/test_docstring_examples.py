"""Every public name has an example in its docstring, and it runs as it stands."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttax.integrations import MODULES
from tests.tools import example_names

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    "fasttax",
    "fasttax.functional",
    "fasttax.ewc",
    "fasttax.fisher",
    "fasttax.kl",
    "fasttax.merge",
    "fasttax.tax",
    "fasttax.integrations",
    *(f"fasttax.integrations.{name}" for name in MODULES),
)
BESIDE = {"fasttax.merge": ["sweep"]}  # on use, as its room's __getattr__ has it
ENTRIES = ("main",)  # of `python -m`
LINES = 6  # of code, at most: an example shows one use


def names_of(module: str) -> list[str]:
    """A module's `__all__`, or where it has none what is defined in it."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(source.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [*ast.literal_eval(node.value), *BESIDE.get(module, [])]
    defined = [n.name for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return [name for name in dict.fromkeys(defined) if not name.startswith("_")]


CASES = [(m, name) for m in PUBLIC for name in names_of(m) if name not in ENTRIES]


def example_of(found: Any) -> str:
    """The section `Example:` of a docstring, or nothing."""
    text = inspect.cleandoc(found.__doc__ or "")
    section = re.search(r"^Example:\n((?:[ ]{4}.*\n?|\n)+)", text, flags=re.MULTILINE)
    return "" if section is None else inspect.cleandoc(section[1])


@pytest.fixture(scope="module", autouse=True)
def packages() -> Any:
    """Stand-ins for the frameworks that are not installed here, while these tests run."""
    absent = example_names.stand_ins()
    sys.modules.update(absent)
    yield
    for name in (*absent, "fasttax.integrations.axolotl"):
        sys.modules.pop(name, None)


def test_the_public_names_are_found() -> None:
    assert len(CASES) > 80
    assert {("fasttax", "token_kl"), ("fasttax.integrations.trl", "FullKL")} <= set(CASES)
    assert ("fasttax.integrations.axolotl", "FasttaxPlugin") in CASES


@pytest.mark.parametrize(("module", "name"), CASES, ids=lambda x: x.removeprefix("fasttax."))
def test_example(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(importlib.import_module(module), name)
    if inspect.ismodule(found):
        assert f"fasttax.{name}" in PUBLIC
        return
    example = example_of(found)
    assert example, f"{module}.{name} has no section `Example:` in its docstring"
    parsed = doctest.DocTestParser().get_examples(example)
    code = "".join(each.source for each in parsed)
    assert 0 < len(code.splitlines()) <= LINES, f"{module}.{name}: its example is too long"
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    test = doctest.DocTest(
        parsed, example_names.namespace(used), f"{module}.{name}", None, None, example
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    result = runner.run(test, out=said.append)
    assert result.attempted == len(parsed)
    assert result.failed == 0, "".join(said)
