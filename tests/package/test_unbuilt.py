"""A source folder without its library, imported though an installed fasttax has one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fasttax

PACKAGE = Path(fasttax.__file__).resolve().parent


def imported_in(folder: Path, site: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`import fasttax` by a Python started in `folder`, with `site` as its site-packages."""
    code = (
        "import sys\n"  # an editable install's finder would offer the library of its source folder
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(1, {str(site)!r})\n"
        "import fasttax\nprint(fasttax.__file__)"
    )
    dropped = ("FASTTAX_BACKEND", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONWARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )


def installed(site: Path) -> Path:
    """A fasttax as pip leaves it in site-packages; its library is never loaded."""
    library = site / "fasttax" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    record = site / "fasttax-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fasttax\nVersion: 0.1.0\n")
    (record / "RECORD").write_text("fasttax/_C.abi3.so,,\n")
    return library.parent


def test_sources_beside_an_installed_fasttax_say_so(tmp_path: Path) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, clone / "fasttax", ignore=leave_out)
    alone = imported_in(clone, site)
    assert "Install g++ and run" in alone.stderr
    place = installed(site)
    beside = imported_in(clone, site)
    assert beside.stdout.strip() == str(clone / "fasttax" / "__init__.py")
    said = " ".join(beside.stderr.split())
    assert f"imported from {clone / 'fasttax'}" in said
    assert f"not from {place}" in said
    assert "Start Python in another folder" in said
    assert said.count("RuntimeWarning") == 1
    refused = imported_in(clone, site, FASTTAX_BACKEND="cpp")
    assert refused.returncode != 0
    assert "ImportError: fasttax: imported from" in refused.stderr
