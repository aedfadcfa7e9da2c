"""The calls that hypothesis draws on backends that a process chooses as it begins."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.tools.cuda_tools import ROOT

FILES = ("tests/faults/test_calls.py", "tests/faults/test_calls_weights.py")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_every_call(backend: str) -> None:
    """Triton's kernels in its interpreter, each op a few times; the reference as on any CPU."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
    chosen = {"FASTTAX_BACKEND": backend, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:warnings", *FILES]
    done = subprocess.run(
        [*command, "-k", f"{backend} or mask_and"],
        cwd=ROOT,
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=900,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 16
