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

from tests.tools import fake_cuda
from tests.tools.cuda_tools import ROOT
from tests.tools.fake_cuda import Built, Fault

TORCH, LAUNCH = "csrc/cuda/launch_torch.h", "csrc/cuda/launch.cuh"
KL_LAUNCH = "csrc/cuda/kl_launch.cuh"
EWC, KL = ("ewc.cu",), ("kl.cu",)
LAUNCHED = "return cuda_words(cudaLaunchKernelEx(&config, kernel, args...));"
FAULTS = {
    "no device guard": Fault(
        TORCH,
        "const torch::stable::accelerator::DeviceGuard guard(device);",
        "",
        ("ewc_torch.cpp",),
        "goes_to_its_tensors and ewc",
    ),
    "no device guard where memory is planned": Fault(
        "csrc/cuda/kl_torch.cpp",
        "guard(logits.get_device_index());\n    if (launch.args.n == 0) return;\n    int64_t floats",
        "guard(0);\n    if (launch.args.n == 0) return;\n    int64_t floats",
        ("kl_torch.cpp",),
        "goes_to_its_tensors and token_kl",
    ),
    "the default stream": Fault(
        "csrc/cuda/ewc_torch.cpp",
        "launch.stream = stream;",
        "launch.stream = nullptr;",
        ("ewc_torch.cpp",),
        "stream and ewc",
    ),
    "the default stream in a graph": Fault(
        "csrc/cuda/fisher.cu",
        "Launcher{stream}",
        "Launcher{nullptr}",
        ("fisher.cu",),
        "captured and accumulate",
    ),
    "the stream of the current device": Fault(
        TORCH,
        "aoti_torch_get_current_cuda_stream(device,",
        "aoti_torch_get_current_cuda_stream(0,",
        ("ewc_torch.cpp",),
        "goes_to_its_tensors and ewc",
    ),
    "a launch that nobody checks": Fault(
        LAUNCH,
        LAUNCHED,
        "cudaLaunchKernelEx(&config, kernel, args...);\n    return nullptr;",
        EWC,
        "launch_that_fails and ewc",
    ),
    "an error that names no op": Fault(
        TORCH,
        'FASTTAX_CHECK(failed == nullptr, op, "the',
        'FASTTAX_CHECK(failed == nullptr, "cuda", "the',
        ("ewc_torch.cpp",),
        "launch_that_fails and ewc",
    ),
    "an error that stays behind": Fault(
        LAUNCH, "cudaGetLastError();", "", KL, "launch_that_fails and token_kl"
    ),
    "a refused cluster's error that stays behind": Fault(
        LAUNCH, "cudaGetLastError();", "", ("kl_both.cu",), "a_cluster_that_is_refused"
    ),
    "no word of a library for other GPUs": Fault(
        LAUNCH, "case cudaErrorNoKernelImageForDevice:", "", EWC, "library_is_not_for and ewc"
    ),
    "no word of an old driver": Fault(
        LAUNCH, "case cudaErrorUnsupportedPtxVersion:", "", EWC, "library_is_not_for and ewc"
    ),
    "a wait": Fault(
        LAUNCH,
        LAUNCHED,
        "cudaLaunchKernelEx(&config, kernel, args...);\n"
        "    return cuda_words(cudaStreamSynchronize(config.stream));",
        EWC,
        "captured and ewc",
    ),
    "a wait that is not captured": Fault(
        LAUNCH,
        LAUNCHED,
        "cudaLaunchKernelEx(&config, kernel, args...);\n"
        "    return cuda_words(cudaDeviceSynchronize());",
        EWC,
        "asks_nothing_back",
    ),
    "memory that is not torch's": Fault(
        "csrc/cuda/ewc.cu",
        "return ewc_call(",
        "void* more = nullptr;\n  cudaMalloc(&more, 64);\n  return ewc_call(",
        EWC,
        "captured and ewc",
    ),
    "shared memory that nobody asked for": Fault(
        KL_LAUNCH, "if (bytes <= 48 * 1024)", "if (true)", ("kl_both.cu",), "shared_memory"
    ),
    "more shared memory than the device has": Fault(
        "csrc/cuda/kl.cuh",
        "if (bytes > block_limit ||",
        "if (bytes > 232448 ||",
        ("kl_both.cu",),
        "shared_memory and not H100",
    ),
    "clusters that the device has no room for": Fault(
        KL_LAUNCH, "clusters > 0", "clusters >= 0", ("kl_both.cu",), "shared_memory"
    ),
    "rows in a grid's second dimension": Fault(
        "csrc/cuda/kl_gradient.cu",
        "const dim3 blocks(unsigned(x.args.n), unsigned((x.args.v + kTile - 1) / kTile));",
        "const dim3 blocks(unsigned((x.args.v + kTile - 1) / kTile), unsigned(x.args.n));",
        ("kl_gradient.cu",),
        "shared_memory",
    ),
    "tokens of 16 bits": Fault(
        "csrc/cuda/weigh.cu",
        "return (n + kWeighThreads - 1)",
        "return (uint16_t(n) + kWeighThreads - 1)",
        ("weigh.cu",),
        "tokens_beyond",
    ),
    "a row's offset of 32 bits": Fault(
        "csrc/cuda/kl_elements.cuh",
        "int64_t offset = 0;",
        "int32_t offset = 0;",
        KL,
        "entries_beyond",
    ),
    "a chunk's offset of 32 bits": Fault(
        "csrc/cuda/ewc.cuh",
        "(block - tensor.first_chunk) * kEwcChunk;",
        "int32_t(uint32_t(block - tensor.first_chunk) * uint32_t(kEwcChunk));",
        EWC,
        "parameters_beyond",
    ),
    "a step's offset of 32 bits": Fault(
        "csrc/cuda/adamw.cuh",
        "(block - tensor.first_chunk) * kAdamWChunk;",
        "int32_t(uint32_t(block - tensor.first_chunk) * uint32_t(kAdamWChunk));",
        ("adamw.cu",),
        "step_beyond",
    ),
    "large arguments for every driver": Fault(
        LAUNCH, "version >= 12010", "version >= 12000", EWC, "large_tables"
    ),
    "memory that its stream takes back too soon": Fault(
        "fasttax/ewc/store.py", "t.record_stream(current)", "pass", (), "outlive"
    ),
    "no wait for what another stream brings": Fault(
        "fasttax/ewc/store.py", "current.wait_event(event)", "pass", (), "outlive"
    ),
}
OLD_DRIVER = {"large arguments for every driver": 12000}
FILES = ("cases.py", "steps.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


def test_launches(built: Built) -> None:
    done = fake_cuda.pytest_on(built, FILES)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 140


@pytest.mark.parametrize("driver", [12000, 12010])
def test_older_drivers(built: Built, driver: int) -> None:
    """4 KB of arguments a launch before CUDA 12.1."""
    done = fake_cuda.pytest_on(built, FILES, "-k", "large_tables or goes_to", driver=driver)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("name", list(FAULTS))
def test_catches(built: Built, name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    library, root = fake_cuda.faulty(built, fault, tmp_path)
    driver = OLD_DRIVER.get(name, 13000)
    options = ("-x", "-k", fault.cases)
    done = fake_cuda.pytest_on(built, FILES, *options, library=library, root=root, driver=driver)
    found = done.returncode < 0 or re.search(r"^FAILED", done.stdout, re.MULTILINE)  # < 0: a crash
    assert found, f"nobody finds it:\n{done.stdout}{done.stderr[-2000:]}"


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
