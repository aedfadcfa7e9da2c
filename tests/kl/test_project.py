"""_project_, the logits of linear_token_kl on the CPU, on every instruction set, and project(),
which chooses it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttax._base import library
from fasttax._base.gemm import project
from tests.tools.utils import assert_within

pytestmark = pytest.mark.skipif(
    "_C" in library.problems, reason="the C++ CPU library is not loaded"
)

SHAPES = {  # tokens, words, depth
    "one": (1, 1, 1),
    "tile": (48, 16, 64),  # AVX-512's
    "below": (5, 7, 3),
    "two_vectors": (17, 33, 100),
    # two blocks of tokens and a vector; a unit that is not whole; a fold and one product
    "ragged": (
        100,
        101,
        257,
    ),
    "deep": (49, 40, 1031),
    "threads": (20, 4099, 33),
    # too many logits for a cache: of rows that are whole lines, and are not
    "many": (35, 30016, 9),
    "many_ragged": (35, 30011, 9),
}


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    out = torch.full((hidden.shape[0], weight.shape[0]), float("nan"))
    torch.ops.fasttax._project_(out, hidden, weight)
    return out


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float16,) * 2,
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape: str, dtypes: tuple[torch.dtype, torch.dtype], simd: int) -> None:
    N, V, H = SHAPES[shape]
    hidden, weight = torch.randn(N, H).to(dtypes[0]), torch.randn(V, H).to(dtypes[1])
    assert_within(
        logits(hidden, weight),
        hidden.float() @ weight.float().T,
        hidden.double() @ weight.double().T,
    )


def test_strided_rows(simd: int) -> None:
    hidden, weight, whole = (
        torch.randn(9, 70)[:, 3:60],
        torch.randn(40, 90)[::2, 20:77],
        torch.zeros(9, 50),
    )
    torch.ops.fasttax._project_(whole[:, 10:30], hidden, weight)
    assert_within(whole[:, 10:30], hidden @ weight.T, hidden.double() @ weight.double().T)
    assert not whole[:, :10].any()
    assert not whole[:, 30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_alone_and_among_others(
    dtype: torch.dtype, threads: Callable[[int], None], simd: int
) -> None:
    hidden, weight = torch.randn(101, 300).to(dtype), torch.randn(500, 300).to(dtype)
    together = logits(hidden, weight)
    threads(1)
    assert torch.equal(together, logits(hidden, weight))
    for n in (0, 47, 48, 100):
        assert torch.equal(together[n : n + 1], logits(hidden[n : n + 1], weight))


def test_not_a_number_stays_with_its_token_and_its_word(simd: int) -> None:
    hidden, weight = torch.randn(50, 20), torch.randn(37, 20)
    hidden[3, 4], weight[30, 7] = float("nan"), float("inf")
    bad = ~logits(hidden, weight).isfinite()
    want = torch.zeros(50, 37, dtype=torch.bool)
    want[3], want[:, 30] = True, True
    assert torch.equal(bad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_project_in_any_way_is_the_product(
    dtype: torch.dtype, simd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, in blocks (here of 256 words), of a transposed head, into half logits, of no
    depth.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    monkeypatch.setattr("fasttax._base.gemm.BLOCK_BYTES", 1)
    hidden, weight = torch.randn(6, 30).to(dtype), torch.randn(600, 30).to(dtype)
    truth = hidden.double() @ weight.double().T
    for head in (weight, weight.T.contiguous().T):
        for out in {wide, dtype}:
            got = torch.empty(6, 600, dtype=out)
            assert project(hidden, head, None, got) is got
            assert_within(got, hidden.to(out) @ weight.to(out).T, truth)
    nothing = torch.ones(2, 5)
    project(torch.zeros(2, 0), torch.zeros(5, 0), None, nothing)
    assert not nothing.any()
    project(torch.zeros(2, 0), torch.zeros(5, 0), torch.arange(5.0), nothing)
    assert torch.equal(nothing, torch.arange(5.0).expand(2, 5))


O, A, W = torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    "call",
    [
        (O, A, W[:4]),
        (O, A[:2], W),
        (O, A[:, :3], W),
        (O.double(), A, W),
        (O, A.double(), W),
        (O.T, A, W),
        (O, A, W.T.contiguous().T),
    ],
)
def test_direct_op_call_never_leaves_its_tensors(call: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="_project_"):
        torch.ops.fasttax._project_(*call)
