"""Shared fixtures: a fixed seed for every test, and every instruction set in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # thousands of tiny parallel regions: spinning threads would fight over two cores

import pytest
import torch

import fasttax  # noqa: F401  (loads the native library)
from fasttax import _library

SIMD = {0: "portable", 1: "avx2", 2: "avx512"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def simd_levels() -> list[int]:
    """The levels that this CPU runs; none where _C is not built."""
    return [] if "_C" in _library.problems else list(range(torch.ops.fasttax._simd_level(-1) + 1))


@pytest.fixture(params=simd_levels(), ids=lambda level: SIMD[level])
def simd(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every instruction set in turn."""
    best = torch.ops.fasttax._simd_level(-1)
    torch.ops.fasttax._simd_level(request.param)
    yield request.param
    torch.ops.fasttax._simd_level(best)


def backends() -> list[str | int]:
    """ "triton" where its interpreter stands in for the CPU's kernels: tests/test_triton.py starts such a run."""
    return ["triton"] if ("token_kl", "CPU") in _library.on_triton else ["reference", *simd_levels()]


@pytest.fixture(params=backends(), ids=lambda backend: backend if isinstance(backend, str) else SIMD[backend])
def backend(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """The reference, then every instruction set."""
    if isinstance(request.param, str):
        yield request.param
        return
    best = torch.ops.fasttax._simd_level(-1)
    torch.ops.fasttax._simd_level(request.param)
    yield request.param
    torch.ops.fasttax._simd_level(best)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
