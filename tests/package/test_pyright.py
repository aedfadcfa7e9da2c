"""Strict pyright on a user's script: no `Any` and nothing unknown comes from fasttax."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("users_script.py")
SETTINGS = {
    "typeCheckingMode": "strict",
    "pythonVersion": "3.11",
    "extraPaths": [str(ROOT)],
    "enableTypeIgnoreComments": False,
    "reportUnnecessaryTypeIgnoreComment": "error",  # a wrong `kind` is an error
    "reportAny": "error",  # basedpyright's own
}


def checker() -> str:
    beside = Path(sys.executable).parent
    names = ("basedpyright", "pyright")
    found = [shutil.which(name, path=str(beside)) or shutil.which(name) for name in names]
    if not any(found):
        pytest.skip("no pyright (280 MB with its node): `make types` installs and runs it")
    return next(filter(None, found))


def errors(folder: Path, text: str) -> list[Any]:
    (folder / "script.py").write_text(text)
    (folder / "pyrightconfig.json").write_text(json.dumps(SETTINGS | {"include": ["script.py"]}))
    command = [checker(), "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] >= 1, done.stdout + done.stderr
    found: list[Any] = said["generalDiagnostics"]
    return found


@pytest.mark.slow
def test_a_users_script(tmp_path: Path) -> None:
    """And that this would see: what is wrong in a second script is found."""
    assert errors(tmp_path, SCRIPT.read_text()) == []
    wrong = "import fasttax\n\nx = fasttax.EWC.load('f', 3)\nreveal = fasttax.no_such_name\n"
    rules = {error["rule"] for error in errors(tmp_path, wrong)}
    assert {"reportArgumentType", "reportAttributeAccessIssue"} <= rules
