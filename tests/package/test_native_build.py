"""Installing with no compiler, with one that fails, and with FASTTAX_CPP."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).resolve().parents[2]


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTTAX_CPP", "FASTTAX_CUDA", "CXX")}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=kept | environment, timeout=300
    )


def test_fasttax_cpp_0_leaves_the_kernels_out() -> None:
    done = setup(FASTTAX_CPP="0", CXX="no-such-compiler")
    assert done.returncode == 0
    assert "no native kernels, as FASTTAX_CPP=0 says" in done.stderr


def test_without_a_compiler_a_note_and_with_fasttax_cpp_1_an_error() -> None:
    lenient = setup(CXX="no-such-compiler")
    assert lenient.returncode == 0
    assert "no C++ compiler found: installing without native kernels" in lenient.stderr
    strict = setup(CXX="no-such-compiler", FASTTAX_CPP="1")
    assert strict.returncode != 0
    assert "FASTTAX_CPP=1, but no C++ compiler found; install g++" in strict.stderr


def test_another_value_is_refused() -> None:
    done = setup(FASTTAX_CPP="yes")
    assert done.returncode != 0
    assert "FASTTAX_CPP must be 0 (no C++ kernels) or 1 (C++ kernels or fail)" in done.stderr


@pytest.fixture
def native_build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/native_build.py, whose compiler fails."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location(
        "native_build", ROOT / "tools" / "native_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fail(self: Any, ext: Any) -> None:
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(BuildExtension, "build_extension", fail)
    monkeypatch.delenv("FASTTAX_CPP", raising=False)
    monkeypatch.chdir(ROOT)
    return module


def test_a_failed_compile_installs_without(
    native_build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = native_build.Build(Distribution())
    build.build_temp = "nowhere"
    ext = native_build.cpu_kernels()
    build.build_extension(ext)
    assert ext.optional  # setuptools waits for no file of it
    assert build.build_temp == "nowhere"
    said = capsys.readouterr().err
    assert "fasttax._C did not compile" in said
    assert "FASTTAX_CPP=1 makes this an error" in said
    monkeypatch.setenv("FASTTAX_CPP", "1")
    with pytest.raises(RuntimeError, match="Error compiling"):
        build.build_extension(native_build.cpu_kernels())


def test_a_failed_build_in_place_is_an_error(
    native_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the whole command: while setuptools compiles, `inplace` says False."""
    monkeypatch.setenv("FASTTAX_CUDA", "0")
    monkeypatch.chdir(tmp_path)  # run() deletes the libraries that are there
    build = native_build.Build(Distribution())
    build.inplace = True
    build.ensure_finalized()
    (extension,) = build.extensions
    extension.sources = ["module.cpp"]
    with pytest.raises(RuntimeError, match="Error compiling"):
        build.run()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FASTTAX_CPP": "0"}, "FASTTAX_CUDA=1, but FASTTAX_CPP=0 leaves all native kernels out"),
        ({"CXX": "no-such-compiler"}, "FASTTAX_CUDA=1, but no C++ compiler found; install g++"),
    ],
)
def test_cuda_kernels_that_were_asked_for(environment: dict[str, str], words: str) -> None:
    done = setup(FASTTAX_CUDA="1", **environment)
    assert done.returncode != 0
    assert words in done.stderr
