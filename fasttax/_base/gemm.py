"""Products of hidden states, heads and gradients.

fasttax's own kernels on the CPU, torch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasttax._base.library import problems
from fasttax._base.modes import HALVES, compiling

NARROW = (torch.float32, *HALVES)
BLOCK_BYTES = 4 << 20  # of a head at a time, on CPUs


def pieces(begin: int, end: int, step: int) -> Iterator[slice]:
    """Slices of `step` from begin to end, the last one shorter."""
    for start in range(begin, end, step):
        yield slice(start, min(start + step, end))


def narrow_gemm(device: torch.device) -> bool:
    """Whether torch has a GEMM of half-width operands with float32 results.

    cuBLAS (torch.mm(out_dtype=)) has it, torch's CPU does not.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def mixed_gemm(device: torch.device) -> bool:
    """Whether fasttax's kernels multiply operands of any two dtypes (csrc/cpu/gemm.cpp).

    They need a library that was built, x86 vectors from AVX2 on.
    """
    return (
        device.type == "cpu"
        and "_C" not in problems
        and not compiling()
        and int(torch.ops.fasttax._simd_level(-1)) > 0
    )


def bf16_gemm(device: torch.device) -> bool:
    """Whether fasttax's kernels multiply bfloat16 faster than float32: by AMX, by vdpbf16ps."""
    return mixed_gemm(device) and bool(torch.ops.fasttax._bf16_gemm())


def gemm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Computes out = a @ b, or out += a @ b, summed in float32 or, of float64, in float64.

    On a CPU by a kernel that packs no more of a head than it multiplies next, and takes the
    operands in their dtypes. MKL, which packs all of it and runs half as wide on AMD: 51 and 46 ms
    for the gradients of 176 hidden states and of the head, 576 -> 49152, against 25 and 22 (Zen 5).
    oneDNN's of bfloat16, whose results are rounded: 20 and 67 ms of 208 (AMX), against 21 and 32.
    """
    kernel = _own_kernel(out, b)
    if out.dtype == torch.bfloat16 and a.dtype == b.dtype == out.dtype:
        kernel = not add and mixed_gemm(out.device) and b.stride(1) == out.stride(1) == 1
    if kernel and a.dtype in NARROW and 1 in a.stride() and a.shape[1] > 0:
        torch.ops.fasttax._gemm_(out, a, b, add)
        return
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits of a chunk of tokens, out = hidden @ weight^T + bias in out's dtype; returned.

    Half-width logits are rounded once, behind the bias.

    On a CPU by a kernel that reads the head as it lies, where a GEMM packs all of it for every
    chunk (csrc/cpu/project_kernels.h): 98 -> 56 ms for 176 tokens of 576 -> 49152, 233 -> 158 for
    512 (MKL on Zen 4). Where it does not run, in blocks of the head that stay in cache while they
    are packed: 85 -> 64 ms for 176 tokens.
    """
    V, H = weight.shape
    if bias is not None and out.dtype in HALVES and hidden.dtype == weight.dtype == out.dtype:
        return torch.addmm(bias.to(out.dtype), hidden, weight.T, out=out)
    if _own_kernel(out, hidden, weight) and hidden.shape[1] > 0:
        torch.ops.fasttax._project_(out, hidden, weight)
    else:
        step = V
        if out.device.type == "cpu":
            step = max(256, BLOCK_BYTES // max(1, H * out.element_size()) // 64 * 64)
        for columns in pieces(0, V, step):
            gemm(hidden, weight[columns].T, out[:, columns], add=False)
    return out if bias is None else out.add_(bias)


def _own_kernel(out: Tensor, *operands: Tensor) -> bool:
    """Float32 sums, rows that are contiguous."""
    return (
        out.dtype == torch.float32
        and mixed_gemm(out.device)
        and all(t.dtype in NARROW and t.stride(1) == 1 for t in (out, *operands))
    )
