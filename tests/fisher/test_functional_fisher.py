"""functional.*_sqgrad against a float64 sum over examples written out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import functional as F
from fasttax import reference
from tests.tools.utils import assert_within

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)

# (N, T, I, O), each with a reason
SHAPES = {
    "tile": (2, 5, 32, 12),  # exactly one AVX-512 tile
    "ragged": (3, 7, 37, 29),  # no multiple of any tile (12x32, 6x16, 4x8)
    "below": (2, 3, 3, 2),  # smaller than one vector
    "one_token": (5, 1, 33, 13),  # the path that squares before it multiplies
    "one_example": (1, 19, 17, 25),
    "one_by_one": (1, 1, 1, 1),
    "groups": (2, 4, 65, 211),  # more than two groups of 96 rows, so both threads work
}


def oracle(
    a: Tensor,
    d: Tensor,
    bounds: list[int],
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """sum_n w_n (sum_t D[t] A[t]^T)^2 by einsum; in float32 it is PyTorch's own composition."""
    a, d = a.to(dtype), d.to(dtype)
    total = torch.zeros(d.shape[1], a.shape[1], dtype=dtype)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        g = torch.einsum("to,ti->oi", d[begin:end], a[begin:end])
        total += g * g * (1.0 if weight is None else weight[n].to(dtype))
    return total


def pair(N: int, T: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, width).to(dtype), torch.randn(N, T, out).to(dtype)


def own(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results have, and that PyTorch's own composition is judged in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_sqgrad(shape: str, dtype: torch.dtype, simd: int) -> None:
    N, T, width, O = SHAPES[shape]
    a, d = pair(N, T, width, O, dtype)
    bounds = [n * T for n in range(N + 1)]
    out = F.linear_sqgrad(a, d)
    assert out.dtype == own(dtype)
    flat = a.flatten(0, 1), d.flatten(0, 1)
    assert_within(out, oracle(*flat, bounds, dtype=own(dtype)), oracle(*flat, bounds))


@pytest.fixture
def bf16_products() -> Iterator[None]:
    """vdpbf16ps, also where the CPU has it and it does not gain."""
    best = torch.ops.fasttax._simd_level(-1)
    try:
        torch.ops.fasttax._simd_level(3)
    except RuntimeError:
        pytest.skip("this CPU has no AVX512-BF16")
    yield
    torch.ops.fasttax._simd_level(best)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 4, 0, 7, 2), (300, 257), (1, 1)], ids=str)
def test_linear_sqgrad_bf16_in_pairs(lengths: tuple[int, ...], bf16_products: None) -> None:
    """Odd lengths end with half a pair; long ones are summed in runs; examples of one token are
    squared first.
    """
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    a, d, weight = (
        torch.randn(bounds[-1], 71).bfloat16(),
        torch.randn(bounds[-1], 29).bfloat16(),
        torch.rand(len(lengths)),
    )
    for w in (None, weight):
        out = F.linear_sqgrad(a, d, cu_seqlens=torch.tensor(bounds), example_weight=w)
        assert_within(out, oracle(a, d, bounds, w, torch.float32), oracle(a, d, bounds, w))


def test_linear_sqgrad_long_examples_round_as_a_gemm(simd: int) -> None:
    a, d = pair(1, 4096, 40, 24, torch.float32)
    assert_within(
        F.linear_sqgrad(a, d),
        oracle(a[0], d[0], [0, 4096], dtype=torch.float32),
        oracle(a[0], d[0], [0, 4096]),
    )


@pytest.mark.parametrize("tokens", [300, 3001])
def test_linear_sqgrad_of_single_tokens_is_a_product_of_squares(tokens: int, simd: int) -> None:
    """Few are packed at once, many fold by fold; each with its weight."""
    a, d, weight, out = (
        torch.randn(tokens, 50)[:, 3:],
        torch.randn(tokens, 21),
        torch.rand(tokens),
        torch.rand(21, 47),
    )
    own, truth = (
        out.to(t) + (weight.to(t)[:, None] * d.to(t) ** 2).T @ a.to(t) ** 2
        for t in (torch.float32, torch.float64)
    )
    got = F.linear_sqgrad(a[:, None], d[:, None], example_weight=weight, out=out)
    assert got is out
    assert_within(out, own, truth)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "lengths",
    [
        (4, 9, 1),  # ragged
        (0, 5, 0, 0, 3, 0),  # empty examples first, inside, last
        (1, 1, 0, 1),  # one token or none each: the squared path
        (2, 1, 1, 1),  # nearly that path: one example of two tokens
        (7,),
    ],
    ids=str,
)
def test_linear_sqgrad_cu_seqlens(lengths: tuple[int, ...], weighted: bool, simd: int) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    a, d = torch.randn(bounds[-1], 35), torch.randn(bounds[-1], 14)
    weight = torch.rand(len(lengths)) if weighted else None
    for kind in (torch.int32, torch.int64):
        out = F.linear_sqgrad(
            a, d, cu_seqlens=torch.tensor(bounds, dtype=kind), example_weight=weight
        )
        assert_within(
            out, oracle(a, d, bounds, weight, torch.float32), oracle(a, d, bounds, weight)
        )


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 5, 3), (3, 0, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)],
    ids=["N=0", "T=0", "I=0", "O=0"],
)
def test_linear_sqgrad_of_nothing_is_zero(shape: tuple[int, int, int, int], simd: int) -> None:
    N, T, width, O = shape
    out = F.linear_sqgrad(torch.randn(N, T, width), torch.randn(N, T, O))
    assert torch.equal(out, torch.zeros(O, width))


def test_linear_sqgrad_two_dimensions_are_one_token_examples() -> None:
    a, d = torch.randn(9, 33), torch.randn(9, 13)
    assert torch.equal(F.linear_sqgrad(a, d), F.linear_sqgrad(a[:, None], d[:, None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_sqgrad_out_accumulates_into_the_given_tensor(dtype: torch.dtype, simd: int) -> None:
    a, d = pair(3, 4, 33, 13, dtype)
    start = torch.rand(13, 33, dtype=own(dtype))
    out = start.clone()
    result = F.linear_sqgrad(a, d, out=out)
    assert result.data_ptr() == out.data_ptr()
    truth = start.double() + oracle(a.flatten(0, 1), d.flatten(0, 1), [0, 4, 8, 12])
    assert_within(
        out,
        (start + oracle(a.flatten(0, 1), d.flatten(0, 1), [0, 4, 8, 12], dtype=own(dtype))).to(
            out.dtype
        ),
        truth,
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row_stride": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    # tokens first in memory
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last_dim_strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    # 4 bytes off any vector alignment
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_sqgrad_layouts(layout: str, simd: int) -> None:
    a, d = (LAYOUTS[layout](x) for x in pair(3, 5, 35, 14, torch.float32))
    assert torch.equal(
        F.linear_sqgrad(a, d),
        F.linear_sqgrad(
            a.clone(memory_format=torch.contiguous_format),
            d.clone(memory_format=torch.contiguous_format),
        ),
    )


def test_linear_sqgrad_same_bits_for_any_thread_count(
    simd: int, threads: Callable[[int], None]
) -> None:
    a, d = pair(3, 9, 130, 400, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(F.linear_sqgrad(a, d))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_linear_sqgrad_levels_agree_to_rounding(simd: int) -> None:
    a, d = pair(2, 50, 70, 40, torch.float32)
    flat = a.flatten(0, 1), d.flatten(0, 1)
    assert_within(
        F.linear_sqgrad(a, d),
        oracle(*flat, [0, 50, 100], dtype=torch.float32),
        oracle(*flat, [0, 50, 100]),
    )


def test_linear_sqgrad_overwrites_poisoned_memory(simd: int) -> None:
    poison = torch.full((3, 1000), float("nan"))
    del poison  # the allocator may hand this block out again
    a, d = pair(2, 5, 35, 14, torch.float32)
    assert bool(torch.isfinite(F.linear_sqgrad(a, d)).all())


# --- bias, norm, embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_norm_sqgrad(dtype: torch.dtype, weighted: bool, simd: int) -> None:
    x, d = pair(4, 6, 141, 141, dtype)  # two groups of 64 columns and a rest
    weight = torch.rand(4) if weighted else None
    w = torch.ones(4, dtype=torch.float64) if weight is None else weight.double()
    for out, per_token in (
        (F.bias_sqgrad(d, example_weight=weight), d),
        (F.norm_sqgrad(x, d, example_weight=weight), (x, d)),
    ):

        def compose(kind: torch.dtype, per_token: Any = per_token) -> Tensor:
            value = (
                per_token.to(kind)
                if isinstance(per_token, Tensor)
                else per_token[0].to(kind) * per_token[1].to(kind)
            )
            return (w.to(kind)[:, None] * value.sum(1) ** 2).sum(0)

        assert out.dtype == own(dtype)
        assert_within(out, compose(own(dtype)), compose(torch.float64))


def test_bias_and_norm_sqgrad_cu_seqlens_and_out(simd: int) -> None:
    x, d = torch.randn(9, 5), torch.randn(9, 5)
    cu, bounds = torch.tensor([0, 4, 4, 9]), [(0, 4), (4, 9)]
    truth = sum(d[a:b].double().sum(0) ** 2 for a, b in bounds)
    start = torch.rand(5)
    out = F.bias_sqgrad(d, cu_seqlens=cu, out=start.clone())
    torch.testing.assert_close(out.double(), start + truth, rtol=1e-6, atol=0)
    truth = sum((x[a:b].double() * d[a:b]).sum(0) ** 2 for a, b in bounds)
    torch.testing.assert_close(
        F.norm_sqgrad(x, d, cu_seqlens=cu).double(), truth, rtol=1e-5, atol=1e-6
    )


def test_bias_sqgrad_of_a_long_example(simd: int) -> None:
    """Its 600 rows are summed in three parts of at most 256, at whole vectors of columns."""
    d = torch.randn(2, 600, 80)
    expected = d.double().sum(1).square().sum(0)
    own = (d.sum(1).square().sum(0) - expected).abs().max()
    rounding = torch.finfo(torch.float32).eps * expected.max()
    assert (F.bias_sqgrad(d) - expected).abs().max() <= 2 * own + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -1], ids=["none", "2", "negative"])
def test_embedding_sqgrad_repeated_tokens_sum_first(
    dtype: torch.dtype, padding_idx: int | None, simd: int
) -> None:
    # repeats inside an example and across examples
    ids = torch.tensor([[1, 1, 2, 6], [2, 2, 2, 1], [0, 5, 0, 5]])
    # 75: one group of 64 columns and a rest
    d, weight = (
        torch.randn(3, 4, 75).to(dtype),
        torch.tensor([1.0, 0.5, 0.0]),
    )
    truth = torch.zeros(7, 75, dtype=torch.float64)
    for n in range(3):
        g = torch.zeros(7, 75, dtype=torch.float64).index_add_(0, ids[n], d[n].double())
        if padding_idx is not None:
            g[padding_idx] = 0
        truth += weight[n] * g**2
    for kind in (torch.int64, torch.int32):
        out = F.embedding_sqgrad(ids.to(kind), d, 7, padding_idx=padding_idx, example_weight=weight)
        assert_within(out, truth.to(own(dtype)), truth)


def test_embedding_sqgrad_matches_autograd_and_accumulates() -> None:
    table = torch.nn.Embedding(11, 3)
    ids, d = torch.randint(0, 11, (10,)), torch.randn(10, 3)
    cu, start = torch.tensor([0, 4, 4, 10]), torch.rand(11, 3)
    truth = start.clone()
    for a, b in ((0, 4), (4, 10)):
        truth += torch.autograd.grad((table(ids[a:b]) * d[a:b]).sum(), table.weight)[0] ** 2
    torch.testing.assert_close(
        F.embedding_sqgrad(ids, d, 11, cu_seqlens=cu, out=start), truth, rtol=1e-6, atol=1e-7
    )
    assert torch.equal(
        F.embedding_sqgrad(torch.empty(0, 4, dtype=torch.int64), torch.empty(0, 4, 3), 11),
        torch.zeros(11, 3),
    )


def test_row_sqgrads_same_bits_for_any_thread_count_and_layout(
    simd: int, threads: Callable[[int], None]
) -> None:
    x, d, ids = torch.randn(3, 9, 300), torch.randn(3, 9, 300), torch.randint(0, 6, (3, 9))
    apart = torch.cat((d, d), -1)[..., :300], d.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for count in (1, 2):
        threads(count)
        results += [
            (F.bias_sqgrad(y), F.norm_sqgrad(x, y), F.embedding_sqgrad(ids, y, 6))
            for y in (d, *apart)
        ]
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_references_are_the_kernels(weighted: bool) -> None:
    x, d, ids, cu = (
        torch.randn(9, 70),
        torch.randn(9, 70),
        torch.randint(0, 4, (9,)),
        torch.tensor([0, 4, 4, 9]),
    )
    weight = torch.rand(3) if weighted else None
    ops = torch.ops.fasttax
    for name, shape, args in (
        ("linear_sqgrad_", (70, 70), (x, d, cu, weight)),
        ("bias_sqgrad_", (70,), (d, cu, weight)),
        ("norm_sqgrad_", (70,), (x, d, cu, weight)),
        ("embedding_sqgrad_", (4, 70), (ids, d, cu, weight, 1)),
        ("lm_head_fisher_", (5, 70), (x, torch.randn(5, 70), None, 4)),
    ):
        results = []
        for prefix, dtype in (
            ("", torch.float32),
            ("_reference_", torch.float32),
            ("_reference_", torch.float64),
        ):
            out = torch.zeros(shape, dtype=dtype)
            getattr(ops, prefix + name)(
                out,
                *(
                    a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
                    for a in args
                ),
            )
            results.append(out)
        assert_within(results[0], results[1], results[2], name=name)


def test_norm_sqgrad_of_two_dtypes_is_float32s() -> None:
    x, d = torch.randn(2, 3, 5).bfloat16(), torch.randn(2, 3, 5)
    assert torch.equal(F.norm_sqgrad(x, d), F.norm_sqgrad(x.float(), d))


def test_sqgrads_build_no_graph() -> None:
    x, d = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    results = (
        F.linear_sqgrad(x, d),
        F.bias_sqgrad(d),
        F.norm_sqgrad(x, d),
        F.embedding_sqgrad(ids, d, 2),
    )
    assert not any(r.requires_grad for r in results)


# --- operator contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    a, d = torch.randn(9, 5, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    for cu in (torch.tensor([0, 4, 4, 9]), torch.arange(10)):
        for weight in (None, torch.rand(cu.numel() - 1, dtype=dtype)):
            torch.library.opcheck(
                torch.ops.fasttax.linear_sqgrad_.default,
                (torch.zeros(3, 5, dtype=dtype), a, d, cu, weight),
            )
        torch.library.opcheck(
            torch.ops.fasttax.bias_sqgrad_.default, (torch.zeros(3, dtype=dtype), d, cu, None)
        )
        torch.library.opcheck(
            torch.ops.fasttax.norm_sqgrad_.default,
            (torch.zeros(3, dtype=dtype), d * 2, d, cu, None),
        )
        ids = torch.tensor([1, 1, 0, 3, 3, 2, 1, 0, 0])
        torch.library.opcheck(
            torch.ops.fasttax.embedding_sqgrad_.default,
            (torch.zeros(4, 3, dtype=dtype), ids, d, cu, None, 2),
        )


def test_compiled_is_eager() -> None:
    a, d = pair(3, 4, 33, 13, torch.float32)

    def square(a: Tensor, d: Tensor) -> Tensor:
        return F.linear_sqgrad(a * 2, d) + 1

    torch._dynamo.reset()
    assert torch.equal(torch.compile(square)(a, d), square(a, d))


def test_native_equals_the_reference(simd: int) -> None:
    a, d, cu = torch.randn(40, 37), torch.randn(40, 29), torch.tensor([0, 11, 11, 40])
    out, expected = torch.zeros(29, 37), torch.zeros(29, 37)
    torch.ops.fasttax.linear_sqgrad_(out, a, d, cu, None)
    reference.linear_sqgrad_(expected, a, d, cu, None)
    assert_within(out, expected, oracle(a, d, cu.tolist()))
