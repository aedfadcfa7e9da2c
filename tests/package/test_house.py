"""The numbers that the house is held to, and that the script which prints them counts right."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# One circle of files within a room, one between two rooms, of which one arrow is in a function.
TREE = {
    "fasttax/__init__.py": "from fasttax.kl import token_kl\n",
    "fasttax/kl/__init__.py": '"""Words."""\n\nfrom fasttax.kl.call import token_kl\n',
    "fasttax/kl/call.py": "from . import rows\n\ntoken_kl = rows\n",
    "fasttax/kl/rows.py": "from fasttax.kl import call\n\nx = 1 if call else 2\n",
    "fasttax/base.py": "def late():\n    from fasttax.store import Store\n    Store()._kept\n",
    "fasttax/store.py": "from fasttax import base\n\n\nclass Store:\n    _kept = base\n",
    "csrc/math/kl.h": '#include "row.h"\n// is it so? "?"\nint f(int x) { return x ? 1 : 2; }\n',
    "csrc/math/row.h": "int g();\n",
    "csrc/kl.cpp": '#include "math/kl.h"\n',
    "bench/__init__.py": "",
    "tests/test_kl.py": f'"""{"w" * 120}"""\n\nx = "{"w" * 100}"  # fmt: skip\n# {"w" * 120}\n',
    "setup.py": "",
}
FIGURES = {
    "circles of files": 2,
    "arrows that run back up": 1,
    "imports in functions that hide a circle": 1,
    "rooms at the top": 6,
    "floors": 2,
    "code lines over 100 columns, %": 5.88,
    "lines over 110 columns": 3,
    "places where the formatter is off": 1,
    "?: of csrc/ per 100 code lines": 25,
    "files over 500 lines": 0,
    "uses of another object's private names": 1,
}


def house(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/house.py", *options]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_the_house_keeps_its_goals() -> None:
    done = house(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_of_a_small_tree(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = house(tmp_path, "--where", "circles")
    assert done.returncode == 1, done.stderr
    found = {
        what: line for line in done.stdout.splitlines() for what in FIGURES if line.startswith(what)
    }
    values = {what: float(line.removeprefix(what).split()[0]) for what, line in found.items()}
    assert values == FIGURES
    assert "    fasttax/base.py fasttax/store.py" in done.stdout.splitlines()


def test_names_of_test_files() -> None:
    """Pytest imports each by its name alone: of two of one name it collects one."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert sorted(set(names)) == sorted(names)
