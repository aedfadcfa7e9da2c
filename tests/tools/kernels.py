"""The kernels that a test runs on: the CPU's instruction sets, and Triton's and CUDA's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fasttax._base import library

SIMD = {0: "portable", 1: "avx2", 2: "avx512"}


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


def kernels() -> list[str | int]:
    """What stands behind the ops over logits here.

    The CPU's instruction sets, or "triton" in its interpreter (tests/gpu/test_triton_kl.py starts
    such a run); with a GPU also "cuda", whichever kernel is registered there, and "triton" beside
    it.
    """
    if ("token_kl", "CPU") in library.on_triton:
        return ["triton"]
    if torch.cuda.is_available():
        return [*simd_levels(), "cuda", "triton"]
    return list(simd_levels())


def cpu_kernels() -> list[str | int]:
    """Those of `kernels` that take tensors on the CPU."""
    gpu = ("cuda", "triton") if torch.cuda.is_available() else ("cuda",)
    return [kernel for kernel in kernels() if kernel not in gpu]


def name(kernel: str | int) -> str:
    """A parameter's name in a test's id."""
    return kernel if isinstance(kernel, str) else SIMD[kernel]


def chosen(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """The fixture's parameter; while an instruction set is in use, the CPU's kernels are its."""
    if isinstance(request.param, str):
        yield request.param
        return
    best = torch.ops.fasttax._simd_level(-1)
    torch.ops.fasttax._simd_level(request.param)
    yield request.param
    torch.ops.fasttax._simd_level(best)
