"""Shared fixtures: a fixed seed for every test, and every kernel in turn."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

# thousands of tiny parallel regions: spinning threads would fight over two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import fasttax  # noqa: F401  (loads the native library)
from tests.tools import kernels
from tests.tools.interpreter import quicken

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make soak`: what tests/faults tries a few times it tries for hours."""
    parser.addoption("--soak", action="store_true", help="the long forms of tests/faults")


def pytest_collection_finish() -> None:
    """What was imported stays: a gc.collect(), of which Trainer's loops make many, looks at 12,000
    tests and all of transformers else, and takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether a test is to be its long form."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=kernels.cpu_kernels(), ids=kernels.name)
def simd(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Every kernel for tensors on the CPU: its instruction sets, or Triton's interpreter."""
    yield from kernels.chosen(request)


@pytest.fixture(params=kernels.kernels(), ids=kernels.name)
def kernel(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Every kernel of the ops over logits."""
    yield from kernels.chosen(request)


@pytest.fixture(params=["reference", *kernels.kernels()], ids=kernels.name)
def backend(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """The reference, then every kernel."""
    yield from kernels.chosen(request)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, taken back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: Callable[[int], None]) -> None:
    """For models that are smaller than what starting a second thread costs."""
    threads(1)
