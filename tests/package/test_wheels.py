"""The workflow that publishes asks for what tools/wheels.py and pyproject.toml have."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wheels
import yaml

ROOT = Path(__file__).resolve().parents[2]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())["jobs"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


@pytest.mark.parametrize(("job", "cuda"), [("linux", False), ("cuda", True)])
def test_its_wheels_are_checked(job: str, cuda: bool) -> None:
    """For the oldest glibc that is promised, beside each torch."""
    (command,) = [c for c in commands(job) if "tools/wheels.py" in c]
    asked = wheels.parser().parse_args(shlex.split(command)[2:])
    assert (asked.cuda, asked.glibc) == (cuda, "2.28")
    assert "manylinux" in JOBS[job]["container"]
    assert asked.torch[-1:] == ["2.14.1"]
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert cuda or asked.torch[0] == f"{floor}.0"


@pytest.mark.parametrize("job", ["others", "free_threaded"])
def test_what_was_built_is_tried(job: str) -> None:
    """Beside the sources, which Python finds first in their folder; and there are such tests."""
    built, tried = (next(c for c in commands(job) if word in c) for word in (" -e .", "pytest -q"))
    assert built.startswith("FASTTAX_CPP=1 ")
    command = [sys.executable, *shlex.split(tried)[1:], "--collect-only"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_nothing_is_published_that_a_job_did_not_build() -> None:
    publish = JOBS["publish"]
    assert {*publish["needs"]} == {*JOBS} - {"publish"}
    uploaded = {
        step["with"]["name"]
        for job in publish["needs"]
        for step in JOBS[job]["steps"]
        if "upload-artifact" in step.get("uses", "")
    }
    taken = {
        step["with"]["name"]
        for step in publish["steps"]
        if "download-artifact" in step.get("uses", "")
    }
    assert taken == uploaded == {"linux-x86_64", "cuda-x86_64"}


def test_a_publication_that_was_interrupted_can_be_run_again(tmp_path: Path) -> None:
    """By a `gh` that refuses, as GitHub's, to create a release twice."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "fasttax.whl").touch()
    gh = tmp_path / "gh"
    gh.write_text(
        f"""#!/bin/sh
        case "$2" in
        view) test -e {tmp_path}/made ;;
        create) test ! -e {tmp_path}/made && touch {tmp_path}/made ;;
        upload) echo "$@" >> {tmp_path}/uploads ;;
        esac"""
    )
    gh.chmod(0o755)
    (command,) = commands("publish")
    for _ in range(2):
        subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command],
            check=True,
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_REF_NAME": "v1.0"},
        )
    upload = "release upload v1.0 --clobber cuda/fasttax.whl"
    assert (tmp_path / "uploads").read_text().splitlines() == [upload, upload]
    pypi = next(s for s in JOBS["publish"]["steps"] if "pypi-publish" in s.get("uses", ""))
    assert pypi["with"]["skip-existing"] is True
