"""_gemm_, the products of a head's backward on the CPU, on every instruction set, and gemm(), which
chooses it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttax._base import library
from fasttax._base.gemm import gemm
from tests.tools.utils import assert_within

pytestmark = pytest.mark.skipif(
    "_C" in library.problems, reason="the C++ CPU library is not loaded"
)

SHAPES = {  # rows, products, columns
    "one": (1, 1, 1),
    "tile": (8, 128, 48),  # AVX-512's
    "below": (5, 7, 3),
    "ragged": (101, 257, 100),  # no tile, no pair and no fold is whole
    "b_once": (2100, 131, 60),  # groups of rows, two folds
    "deep": (20, 4099, 33),  # fold by fold
    "wide": (40, 100, 70),  # blocks of AMX's, two and a part
    "deeper": (70, 9000, 40),  # of more products than AMX packs at once
    "deep_rows": (300, 2100, 50),  # more rows than one thread sums
    "deep_columns": (9, 3000, 1201),  # more columns
}
DTYPES = [
    (torch.float32,) * 2,
    (torch.bfloat16,) * 2,
    (torch.float16,) * 2,
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def product(a: Tensor, b: Tensor, before: Tensor | None = None) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), float("nan")) if before is None else before.clone()
    torch.ops.fasttax._gemm_(out, a, b, before is not None)
    return out


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_equals_float64(
    by: str, shape: str, dtypes: tuple[torch.dtype, torch.dtype], simd: int
) -> None:
    M, K, N = SHAPES[shape]
    a = torch.randn(M, K).to(dtypes[0]) if by == "rows" else torch.randn(K, M).to(dtypes[0]).T
    b, before = torch.randn(K, N).to(dtypes[1]), torch.randn(M, N)
    truth = a.double() @ b.double()
    assert_within(product(a, b), a.float() @ b.float(), truth)
    assert_within(product(a, b, before), before + a.float() @ b.float(), before + truth)


def test_strided_rows(simd: int) -> None:
    a, b, whole = (
        torch.randn(70, 90)[3:60:2, 20:77],
        torch.randn(57, 70)[:, 3:60],
        torch.zeros(29, 90),
    )
    torch.ops.fasttax._gemm_(whole[:, 10:67], a, b, False)
    assert_within(whole[:, 10:67], a @ b, a.double() @ b.double())
    assert not whole[:, :10].any()
    assert not whole[:, 67:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_on_any_number_of_threads(
    shape: str, dtype: torch.dtype, threads: Callable[[int], None], simd: int
) -> None:
    M, K, N = SHAPES[shape]
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    together = product(a, b)
    for n in (1, 3, 16):
        threads(n)
        assert torch.equal(together, product(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["ragged", "deep"])
def test_not_a_number_stays_with_its_row_and_its_column(
    shape: str, dtype: torch.dtype, simd: int
) -> None:
    M, K, N = SHAPES[shape]
    a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
    a[3, K - 1], b[K - 1, N - 2] = float("nan"), float("inf")
    want = torch.zeros(M, N, dtype=torch.bool)
    want[3], want[:, N - 2] = True, True
    assert torch.equal(~product(a, b).isfinite(), want)


def test_a_wide_gradient_is_not_rounded_to_meet_a_bfloat16_head(simd: int) -> None:
    """Its entries add up to nothing over a vocabulary of equal rows; their roundings would not."""
    d = torch.randn(4, 3000).softmax(-1)
    d[:, 0] -= d.double().sum(1).float()
    head = torch.full((3000, 16), 100.0, dtype=torch.bfloat16)
    assert product(d, head).abs().max() < 100 * 1e-6


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_a_bfloat16_result_is_the_sums_rounded_once(
    by: str, shape: str, dtypes: tuple[torch.dtype, torch.dtype], simd: int
) -> None:
    M, K, N = SHAPES[shape]
    a = torch.randn(M, K).to(dtypes[0]) if by == "rows" else torch.randn(K, M).to(dtypes[0]).T
    b, whole = torch.randn(K, N).to(dtypes[1]), torch.zeros(M, N + 6, dtype=torch.bfloat16)
    torch.ops.fasttax._gemm_(whole[:, 3 : N + 3], a, b, False)
    assert torch.equal(whole[:, 3 : N + 3], product(a, b).bfloat16())
    assert not whole[:, :3].any()
    assert not whole[:, N + 3 :].any()


def test_rows_of_a_bfloat16_result_are_made_some_at_a_time(simd: int) -> None:
    for a in (torch.randn(9000, 5), torch.randn(5, 9000).T):
        b, out = torch.randn(5, 256), torch.empty(9000, 256, dtype=torch.bfloat16)
        torch.ops.fasttax._gemm_(out, a, b, False)
        assert torch.equal(out, product(a, b).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gemm_in_any_way_is_the_product(dtype: torch.dtype, simd: int) -> None:
    """By the kernel, of operands in no order that it reads, into half results, of no depth."""
    a, b = torch.randn(6, 30).to(dtype), torch.randn(30, 40).to(dtype)
    truth = a.double() @ b.double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for one in (a, a.repeat_interleave(2, 1)[:, ::2]):
        for other in (b, b.T.contiguous().T):
            for out in {wide, dtype}:
                got = torch.ones(6, 40, dtype=out)
                gemm(one, other, got, add=False)
                assert_within(got, a.to(out) @ b.to(out), truth)
                gemm(one, other, got, add=True)
                assert_within(got, 2 * (a.to(out) @ b.to(out)), 2 * truth)
    nothing = torch.ones(2, 5)
    gemm(torch.empty(2, 0), torch.empty(0, 5), nothing, add=True)
    assert torch.equal(nothing, torch.ones(2, 5))
    gemm(torch.empty(2, 0), torch.empty(0, 5), nothing, add=False)
    assert not nothing.any()


REFUSED: dict[str, tuple[tuple[Tensor, Tensor, Tensor], str]] = {
    "float64": ((torch.empty(2, 3), torch.empty(2, 4).double(), torch.empty(4, 3)), "none float64"),
    "out's dtype": ((torch.empty(2, 3).half(), torch.empty(2, 4), torch.empty(4, 3)), "float32"),
    "added to bfloat16": (
        (torch.empty(2, 3).bfloat16(), torch.empty(2, 4), torch.empty(4, 3)),
        "not added to",
    ),
    "shapes": ((torch.empty(2, 3), torch.empty(2, 5), torch.empty(4, 3)), "shapes do not fit"),
    "b's columns": (
        (torch.empty(2, 3), torch.empty(2, 4), torch.empty(3, 4).T),
        "must be contiguous",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    (out, a, b), says = REFUSED[case]
    with pytest.raises(RuntimeError, match=says):
        torch.ops.fasttax._gemm_(out, a, b, case == "added to bfloat16")
