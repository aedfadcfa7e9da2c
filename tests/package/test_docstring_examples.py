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

import docs_names
import pytest
import torch

from fasttax import integrations
from tests.tools import example_names

LINES = 4  # of code beside imports, at most: an example shows one use
CASES = [(module, name) for module in docs_names.public() for name in docs_names.names(module)]


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
    vars(integrations).pop("axolotl", None)  # made on a stand-in: the next import is anew


def test_the_public_names_are_found() -> None:
    assert len(CASES) > 80
    assert {("fasttax", "token_kl"), ("fasttax.integrations.trl", "FullKL")} <= set(CASES)
    assert ("fasttax.integrations.axolotl", "FasttaxPlugin") in CASES


@pytest.mark.parametrize(("module", "name"), CASES, ids=lambda x: x.removeprefix("fasttax."))
def test_example(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(importlib.import_module(module), name)
    if inspect.ismodule(found):
        assert f"fasttax.{name}" in docs_names.public()
        return
    example = example_of(found)
    assert example, f"{module}.{name} has no section `Example:` in its docstring"
    parsed = doctest.DocTestParser().get_examples(example)
    code = "".join(each.source for each in parsed)
    lines = [line for line in code.splitlines() if not line.startswith("from ")]
    assert 0 < len(lines) <= LINES, f"{module}.{name}: its example is too long"
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


@pytest.mark.parametrize(("module", "name"), CASES, ids=lambda x: x.removeprefix("fasttax."))
def test_a_function_says_what_it_takes_and_refuses(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    if inspect.isfunction(found):
        text = inspect.cleandoc(found.__doc__ or "")
        arguments = re.search(r"^Args:\n((?:[ ]{4}.*\n|\n)+)", text, flags=re.MULTILINE)
        assert arguments is not None
        told = re.findall(r"^    (\w+): ", arguments[1], flags=re.MULTILINE)
        assert told == list(inspect.signature(found).parameters)
        assert re.search(r"^Raises:\n    \w+", text, flags=re.MULTILINE)
