"""What functional.*_sqgrad say of wrong calls, and what a direct call of an op refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import functional as F
from tests.tools.utils import assert_says

A, D = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
IDS, NAN = torch.zeros(2, 3, dtype=torch.int64), float("nan")
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no tensor": (
        lambda: F.linear_sqgrad([1.0], D),
        TypeError,
        ("linear_sqgrad", "inputs", "torch.Tensor"),
    ),
    "integers": (
        lambda: F.linear_sqgrad(A.long(), D),
        TypeError,
        ("linear_sqgrad", "inputs", "float32", "int64", ".to("),
    ),
    "tokens differ": (
        lambda: F.linear_sqgrad(A, D[:, :2]),
        ValueError,
        ("linear_sqgrad", "grad_outputs", "(2, 3)", "(2, 2, 5)"),
    ),
    "one is float64": (
        lambda: F.linear_sqgrad(A, D.double()),
        TypeError,
        ("linear_sqgrad", "grad_outputs", "float64"),
    ),
    "four dimensions": (
        lambda: F.linear_sqgrad(A[None], D[None]),
        ValueError,
        ("linear_sqgrad", "inputs", "(N, T, ...)"),
    ),
    "cu with (N, T)": (
        lambda: F.linear_sqgrad(A, D, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        ("linear_sqgrad", "cu_seqlens", "flat"),
    ),
    "cu too short": (
        lambda: F.linear_sqgrad(A[0], D[0], cu_seqlens=torch.tensor([0, 2])),
        ValueError,
        ("cu_seqlens", "0 to 3", "[0, 2]"),
    ),
    "cu falls": (
        lambda: F.linear_sqgrad(A[0], D[0], cu_seqlens=torch.tensor([0, 2, 1, 3])),
        ValueError,
        ("cu_seqlens", "rise"),
    ),
    "cu starts late": (
        lambda: F.linear_sqgrad(A[0], D[0], cu_seqlens=torch.tensor([1, 3])),
        ValueError,
        ("cu_seqlens", "[1, 3]"),
    ),
    "cu floats": (
        lambda: F.linear_sqgrad(A[0], D[0], cu_seqlens=torch.tensor([0.0, 3.0])),
        TypeError,
        ("cu_seqlens", "int64", "float32"),
    ),
    "cu empty": (
        lambda: F.linear_sqgrad(A[0], D[0], cu_seqlens=torch.tensor([], dtype=torch.int64)),
        ValueError,
        ("cu_seqlens", "N + 1"),
    ),
    "weights": (
        lambda: F.linear_sqgrad(A, D, example_weight=torch.ones(3)),
        ValueError,
        ("example_weight", "(2,)", "(3,)"),
    ),
    "weight list": (
        lambda: F.bias_sqgrad(D, example_weight=[1, 2]),
        TypeError,
        ("bias_sqgrad", "example_weight", "torch.Tensor"),
    ),
    "out shape": (
        lambda: F.linear_sqgrad(A, D, out=torch.zeros(4, 5)),
        ValueError,
        ("linear_sqgrad", "out", "(5, 4)", "(4, 5)"),
    ),
    "out dtype": (
        lambda: F.linear_sqgrad(A, D, out=torch.zeros(5, 4).double()),
        TypeError,
        ("out", "float32", "float64"),
    ),
    "out strided": (
        lambda: F.linear_sqgrad(A, D, out=torch.zeros(4, 5).T),
        ValueError,
        ("out", "contiguous"),
    ),
    "bias vector": (
        lambda: F.bias_sqgrad(D[0, 0]),
        ValueError,
        ("bias_sqgrad", "grad_outputs", "(5,)"),
    ),
    "norm shapes": (
        lambda: F.norm_sqgrad(A, D),
        ValueError,
        ("norm_sqgrad", "grad_outputs", "(2, 3, 4)"),
    ),
    "id too big": (
        lambda: F.embedding_sqgrad(IDS + 7, D, 7),
        IndexError,
        ("embedding_sqgrad", "ids", "[0, 7)", "7 to 7"),
    ),
    "id negative": (
        lambda: F.embedding_sqgrad(IDS - 1, D, 7),
        IndexError,
        ("embedding_sqgrad", "ids", "[0, 7)", "-1"),
    ),
    "ids floats": (
        lambda: F.embedding_sqgrad(IDS.float(), D, 7),
        TypeError,
        ("embedding_sqgrad", "ids", "int64"),
    ),
    "ids shape": (
        lambda: F.embedding_sqgrad(IDS[:, :2], D, 7),
        ValueError,
        ("embedding_sqgrad", "grad_outputs", "(2, 2)"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(call, error, words)


@pytest.mark.parametrize(
    "arguments",
    [
        # would read past the last row
        lambda: (
            torch.zeros(5, 4),
            A[0],
            D[0],
            torch.tensor([0, 4]),
        ),
        lambda: (torch.zeros(5, 4), A[0], D[0], torch.tensor([0, -1, 3])),
        lambda: (torch.zeros(4, 4), A[0], D[0], torch.tensor([0, 3])),  # would write past out
        lambda: (torch.zeros(5, 4), A[0], D[0, :2], torch.tensor([0, 3])),
    ],
)
def test_direct_op_call_never_leaves_its_tensors(
    arguments: Callable[[], tuple[Tensor, ...]], simd: int
) -> None:
    with pytest.raises(RuntimeError, match="linear_sqgrad_"):
        torch.ops.fasttax.linear_sqgrad_(*arguments(), None)
