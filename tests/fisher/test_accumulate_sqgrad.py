"""accumulate_sqgrad_: sums += weight grads^2 over lists, on every kernel, and where DiagonalFisher
uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import functional as F
from tests.tools.utils import assert_says, assert_within

# a vector, a stage, a program of Triton's, a task of the CPU's, and one more
SIZES = (
    0,
    1,
    15,
    16,
    17,
    256,
    257,
    2048,
    65536 + 3,
    4099,
)


def lists(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.rand(n, dtype=wide) for n in SIZES], [
        torch.randn(n, dtype=torch.float64).to(dtype) for n in SIZES
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_equals_float64(dtype: torch.dtype, backend: str | int) -> None:
    sums, grads = lists(dtype)
    before = [s.clone() for s in sums]
    op: Any = (
        torch.ops.fasttax._reference_accumulate_sqgrad_
        if backend == "reference"
        else torch.ops.fasttax.accumulate_sqgrad_
    )
    op(sums, grads, 0.3)
    for got, start, grad in zip(sums, before, grads, strict=True):
        if got.numel():
            g = grad.to(start.dtype)
            assert_within(
                got, start.addcmul(g, g, value=0.3), start.double() + 0.3 * grad.double() ** 2
            )


def test_mixed_lists_shapes_and_views(simd: str | int) -> None:
    sums = [torch.zeros(3, 4), torch.ones(5, dtype=torch.float64), torch.zeros(())]
    grads = [
        torch.arange(12.0).view(4, 3).T.bfloat16(),
        torch.full((5,), 2.0, dtype=torch.float64),
        torch.tensor(3.0, requires_grad=True),
    ]
    F.accumulate_sqgrad_(sums, grads)
    assert torch.equal(sums[0], (torch.arange(12.0).view(4, 3).T ** 2))
    assert torch.equal(sums[1], torch.full((5,), 5.0, dtype=torch.float64))
    assert sums[2].item() == 9
    F.accumulate_sqgrad_([], [])


def test_threads_give_the_same_bits(threads: Callable[[int], None], simd: str | int) -> None:
    results = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(1)
        sums, grads = lists(torch.float32)
        F.accumulate_sqgrad_(sums, grads, 0.7)
        results.append(torch.cat(sums))
    assert torch.equal(*results)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.fasttax.accumulate_sqgrad_.default,
        ([torch.zeros(3), torch.zeros(2, 2)], [torch.ones(3), torch.ones(2, 2)], 0.5),
    )


S, G = torch.zeros(2, 3), torch.ones(2, 3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no list": (
        lambda: F.accumulate_sqgrad_(S, [G]),
        TypeError,
        ("accumulate_sqgrad_", "sums", "list", "[sums]"),
    ),
    "lengths": (lambda: F.accumulate_sqgrad_([S], [G, G]), ValueError, ("grads", "1 tensors", "2")),
    "shape": (
        lambda: F.accumulate_sqgrad_([S], [G.T]),
        ValueError,
        ("grads[0]", "(2, 3)", "(3, 2)"),
    ),
    "half sums": (
        lambda: F.accumulate_sqgrad_([S.bfloat16()], [G]),
        TypeError,
        ("sums[0]", "float32", "bfloat16"),
    ),
    "float64 gradient": (
        lambda: F.accumulate_sqgrad_([S], [G.double()]),
        TypeError,
        ("sums[0]", "float64", "float32"),
    ),
    "integers": (lambda: F.accumulate_sqgrad_([S], [G.long()]), TypeError, ("grads[0]", "int64")),
    "strided": (lambda: F.accumulate_sqgrad_([S.T], [G.T]), ValueError, ("sums[0]", "contiguous")),
    "weight": (lambda: F.accumulate_sqgrad_([S], [G], float("nan")), ValueError, ("weight", "nan")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(call, error, words)


@pytest.mark.parametrize("grads", [[G[:1]], [G.long()], [G, G], [G.double()]])
def test_direct_op_call_never_leaves_its_tensors(grads: list[Tensor], simd: str | int) -> None:
    with pytest.raises(RuntimeError, match="accumulate_sqgrad_"):
        torch.ops.fasttax.accumulate_sqgrad_([S.clone()], grads, 1.0)
