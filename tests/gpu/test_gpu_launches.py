"""What surrounds the CUDA kernels, without a GPU: devices, streams, errors, graphs, sizes.

tests/gpu/fake stands in for CUDA's runtime, under torch's own allocator, guards and graphs and
under csrc/cuda, and writes down what it is asked; blocks that matter run on the SIMT machine. One
fault of each kind, put into a copy of the source, must be found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalog import catalog
from tests.mutants.killers import launch_of
from tests.tools import fake_cuda
from tests.tools.cuda_tools import ROOT
from tests.tools.fake_cuda import Built

# one of each kind; `make mutants` has them all
MUTANTS = {m.kind: m for m in reversed(catalog()) if m.killer.startswith("launch")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


LEAST = {"csrc": 150, "triton": 115, "users": 85, "trainers": 9}
WORDS = {  # what needs no kernel of CUDA's own; of the examples, 8 s each, one
    "users": "not graph and not beyond and not side_stream and not compiled",
    "trainers": "test_device_trainers or trl_sft_lora",
}


@pytest.mark.parametrize("cases", fake_cuda.CASES)
def test_launches(built: Built, cases: str) -> None:
    if cases == "triton":
        pytest.importorskip("triton", reason="Triton's launches need triton: `pip install triton`")
    done = fake_cuda.pytest_on(built, "-k", WORDS.get(cases, ""), cases=cases)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= LEAST[cases]


@pytest.mark.parametrize("driver", [12000, 12010])
def test_older_drivers(built: Built, driver: int) -> None:
    """4 KB of arguments a launch before CUDA 12.1."""
    done = fake_cuda.pytest_on(built, "-k", "large_tables or goes_to", driver=driver)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("kind", sorted(MUTANTS))
def test_catches(built: Built, kind: str, tmp_path: Path) -> None:
    launch = launch_of(MUTANTS[kind])
    library, root = fake_cuda.faulty(built, MUTANTS[kind], launch.sources, tmp_path)
    done = launch.run(built, library, root)
    found = done.returncode < 0 or re.search(r"^FAILED", done.stdout, re.MULTILINE)  # < 0: a crash
    assert found, f"nobody finds it:\n{done.stdout}{done.stderr[-2000:]}"


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_way_out_of_a_gpu_that_the_library_is_not_for(built: Built, backend: str) -> None:
    """What the error names: other kernels than CUDA C++'s, or none of fasttax's."""
    program = (
        "import sys, torch\n"
        "from tests.gpu.fake import control\n"
        "import fasttax\n"
        "from fasttax._base import library\n"
        "assert library.active('token_kl', 'cuda')[0].lower() == sys.argv[1]\n"
        "x = torch.empty(4, 300, device='cuda')\n"
        "if sys.argv[1] == 'reference':\n"
        "    fasttax.token_kl(x, x)\n"
        "    assert any(call['call'] == 'launch' for call in control.log())\n"
        "assert not control.launches()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, backend],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": str(built.fake),
            "FASTTAX_BACKEND": backend,
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_driver_that_is_too_old(built: Built, tmp_path: Path) -> None:
    """The CPU works all the same, and `fasttax doctor` says what is wrong and what helps."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    program = (
        "import torch, fasttax\n"
        "from fasttax.cli import doctor\n"
        "x = torch.randn(2, 9)\n"
        "assert fasttax.token_kl(x, x).tolist() == [0, 0]\n"
        "doctor.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": str(built.fake),
            "FAKE_CUDA_DRIVER": "11040",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "GPU: none (" in done.stdout
    assert "install a driver for CUDA" in done.stdout
