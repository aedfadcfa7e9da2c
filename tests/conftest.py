"""Shared fixtures: a fixed seed for every test, and every instruction set in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

# thousands of tiny parallel regions: spinning threads would fight over two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import fasttax  # noqa: F401  (loads the native library)
from fasttax._base import library

SIMD = {0: "portable", 1: "avx2", 2: "avx512"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def simd_levels() -> list[int]:
    """The levels that this CPU runs and the library has; none where _C is not built."""
    if "_C" in library.problems:
        return []
    best = torch.ops.fasttax._simd_level(-1)
    try:
        torch.ops.fasttax._simd_level(0)
    except RuntimeError:  # compiled for one instruction set: `make quick`
        return [best]
    torch.ops.fasttax._simd_level(best)
    return list(range(best + 1))


def name(backend: str | int) -> str:
    return backend if isinstance(backend, str) else SIMD[backend]


def chosen(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The fixture's parameter; while an instruction set is in use, the CPU's kernels are its."""
    if isinstance(request.param, str):
        yield request.param
        return
    best = torch.ops.fasttax._simd_level(-1)
    torch.ops.fasttax._simd_level(request.param)
    yield request.param
    torch.ops.fasttax._simd_level(best)


def kernels() -> list[str | int]:
    """What stands behind the ops over logits here: the CPU's instruction sets, or "triton" in its
    interpreter (tests/gpu/test_triton_kl.py starts such a run); and with a GPU "cuda", whichever
    kernel is registered there, and "triton" beside it.
    """
    if ("token_kl", "CPU") in library.on_triton:
        return ["triton"]
    return [*simd_levels(), *(["cuda", "triton"] if torch.cuda.is_available() else [])]


@pytest.fixture(
    params=[
        kernel
        for kernel in kernels()
        if kernel != "cuda" and not (kernel == "triton" and torch.cuda.is_available())
    ],
    ids=name,
)
def simd(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Every kernel for tensors on the CPU: its instruction sets, or Triton's interpreter."""
    yield from chosen(request)


@pytest.fixture(params=kernels(), ids=name)
def kernel(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Every kernel of the ops over logits."""
    yield from chosen(request)


@pytest.fixture(params=["reference", *kernels()], ids=name)
def backend(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """The reference, then every kernel."""
    yield from chosen(request)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
