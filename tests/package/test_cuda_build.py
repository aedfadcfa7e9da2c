"""When CUDA C++ kernels are built: with a GPU, on request, never with an nvcc that can't."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.utils.cpp_extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.76" ;;
  --list-gpu-arch) printf 'compute_%s\n' {known} ;;
  *compute_120*) {newest} ;;
esac
"""
UNKNOWN = "echo \"nvcc fatal: Unsupported gpu architecture 'compute_120'\" >&2; exit 1"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/cuda_build.py under a torch of CUDA 13.0 that sees no GPU, with nothing asked for."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "tools" / "cuda_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("FASTTAX_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An nvcc of CUDA 13.0 that compiles for everything; its calls are written to `calls`."""
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.touch(mode=0o755)
    write(path)
    return path


def write(
    nvcc: Path, release: str = "13.0", newest: str = "", known: str = "80 90 100 120"
) -> None:
    calls = nvcc.with_name("calls")
    text = NVCC.format(release=release, newest=newest or ":", calls=calls, known=known)
    nvcc.write_text(text)


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (major, minor))


def refused(build: ModuleType) -> str:
    with pytest.raises(SystemExit) as refusal:
        build.cuda_wanted()
    return str(refusal.value)


def test_without_a_gpu_only_on_request(
    build: ModuleType,
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not build.cuda_wanted()
    assert "torch sees no GPU here; FASTTAX_CUDA=1 builds them" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.cuda_wanted()
    assert "compute_90,code=sm_90" in nvcc.with_name("calls").read_text()
    monkeypatch.setenv("FASTTAX_CUDA", "0")
    assert not build.cuda_wanted()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("FASTTAX_CUDA", "1")
    assert build.cuda_wanted()
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == build.ARCHITECTURES


def test_a_gpu_gets_its_own_architecture(
    build: ModuleType,
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu(monkeypatch, 9, 0)
    assert build.cuda_wanted()
    assert "TORCH_CUDA_ARCH_LIST" not in build.os.environ  # torch takes the GPU's
    assert "-arch=native" in nvcc.with_name("calls").read_text()
    gpu(monkeypatch, 7, 5)
    assert not build.cuda_wanted()
    assert "compute capability 8.0, and this one has 7.5" in capsys.readouterr().err


@pytest.mark.parametrize("misfit", ["none", "another version", "an old compiler", "no CUDA"])
def test_what_does_not_fit_is_a_note_or_on_request_an_error(
    build: ModuleType,
    nvcc: Path,
    misfit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = "nvcc is missing; install the CUDA toolkit"
    if misfit == "none":
        nvcc.unlink()
    elif misfit == "another version":
        write(nvcc, release="12.4")
        expected = "is 12.4 and torch's CUDA 13.0; install a toolkit of the same major version"
    elif misfit == "an old compiler":
        write(nvcc, newest=UNKNOWN)
        expected = "Unsupported gpu architecture 'compute_120'"
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
        expected = "this torch is built without CUDA"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    assert not build.cuda_wanted()
    assert expected in capsys.readouterr().err
    monkeypatch.setenv("FASTTAX_CUDA", "1")
    assert expected in refused(build)


def test_architectures_that_nvcc_does_not_know_are_left_out(
    build: ModuleType,
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(nvcc, newest=UNKNOWN, known="70 80 86 90 100")
    monkeypatch.setenv("FASTTAX_CUDA", "1")
    assert build.cuda_wanted()
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0+PTX"
    assert "does not know compute capability 12.0: PTX of 10.0" in capsys.readouterr().err
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    write(nvcc, known="50 52")  # none of them: nvcc's own word, as before
    assert build.cuda_wanted()
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == build.ARCHITECTURES


def test_later_gpus_get_ptx(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for which there is no machine code has its driver compile the newest one's PTX."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", build.ARCHITECTURES)
    flags = torch.utils.cpp_extension._get_cuda_arch_flags()
    newest = max(int(found) for found in re.findall(r"code=sm_(\d+)", " ".join(flags)))
    assert f"-gencode=arch=compute_{newest},code=compute_{newest}" in flags


def test_another_word_is_refused(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTAX_CUDA", "yes")
    assert "FASTTAX_CUDA must be 0" in refused(build)
