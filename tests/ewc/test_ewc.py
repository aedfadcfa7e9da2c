"""functional.ewc_* and lora_ewc_penalty against float64 autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import functional as F
from fasttax import reference
from fasttax._base.packed import SPLIT, decode_anchor, encode, encode_anchor
from tests.tools.models import ewc_compose as compose
from tests.tools.utils import assert_says, assert_within

# 0; 1; below, at and above the staging block of 256; a task of 65536 plus a ragged tail
SIZES = (0, 1, 255, 256, 257, 65536 + 3)
# of theta and anchor; fisher and grad are rotated
MIXES = [*itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2)]


def data(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> tuple[list[Tensor], ...]:
    """theta, anchor, fisher, grad by dtype, one tensor a size."""
    raw = (
        [torch.randn(n) for n in sizes],
        [torch.randn(n) for n in sizes],
        [torch.rand(n) for n in sizes],
        [torch.randn(n) for n in sizes],
    )
    return tuple([x.to(d) for x in xs] for xs, d in zip(raw, dtypes, strict=True))


@pytest.mark.parametrize(("first", "second"), MIXES, ids=lambda d: str(d).removeprefix("torch."))
def test_penalty_add_grad_and_prox(first: torch.dtype, second: torch.dtype, simd: int) -> None:
    params, anchors, fishers, grads = data(SIZES, (first, second, first, second))
    truth, pulls = compose(params, anchors, fishers, 3.0, torch.float64)
    plain, own = compose(params, anchors, fishers, 3.0, torch.float32)
    leaves = [p.clone().requires_grad_() for p in params]
    value = F.ewc_penalty(leaves, anchors, fishers, 3.0)
    assert_within(value, plain, truth)
    for got, o, t in zip(torch.autograd.grad(value, leaves), own, pulls, strict=True):
        if t.numel():
            assert_within(got, o.to(first), t)
    written = [g.clone() for g in grads]
    assert_within(F.ewc_add_grad_(params, written, anchors, fishers, 3.0), plain, truth)
    moved = [p.clone() for p in params]
    F.ewc_prox_(moved, anchors, fishers, 0.7)
    for i in range(len(SIZES)):
        if SIZES[i]:
            assert_within(
                written[i], (grads[i].float() + own[i]).to(second), grads[i].double() + pulls[i]
            )
            a, f = anchors[i], fishers[i]
            steps = [
                a.to(d) + (params[i].to(d) - a.to(d)) / (1 + 0.7 * f.to(d))
                for d in (torch.float32, torch.float64)
            ]
            assert_within(moved[i], steps[0].to(first), steps[1])


def test_float64_and_gradcheck() -> None:
    params, anchors, fishers, grads = (
        [x.double() for x in xs] for xs in data((3, 257), (torch.float32,) * 4)
    )
    truth, pulls = compose(params, anchors, fishers, 2.0, torch.float64)
    assert F.ewc_penalty(params, anchors, fishers, 2.0).dtype == torch.float64
    torch.testing.assert_close(
        F.ewc_penalty(params, anchors, fishers, 2.0), truth, rtol=1e-14, atol=0
    )
    before = [g.clone() for g in grads]
    F.ewc_add_grad_(params, grads, anchors, fishers, 2.0)
    torch.testing.assert_close(
        grads, [b + p for b, p in zip(before, pulls, strict=True)], rtol=1e-14, atol=0
    )
    leaves = [p[:5].clone().requires_grad_() for p in params]
    small = [[x[:5].clone() for x in xs] for xs in (anchors, fishers)]
    assert torch.autograd.gradcheck(
        lambda *p: F.ewc_penalty(list(p), small[0], small[1], 2.0), leaves
    )


def test_strided_parameters_and_upstream_gradient() -> None:
    theta = torch.randn(6, 4).T.requires_grad_()
    anchor, fisher = torch.randn(6, 4).T, torch.rand(8, 6)[::2]
    value = F.ewc_penalty([theta], [anchor], [fisher], 2.0) * 3
    (got,) = torch.autograd.grad(value, [theta])
    torch.testing.assert_close(got, 6 * fisher * (theta - anchor).detach())


def test_exactly_zero_at_the_anchor_and_deterministic(
    simd: int, threads: Callable[[int], None]
) -> None:
    params, _, fishers, _ = data(
        SIZES, (torch.bfloat16, torch.float32, torch.float32, torch.float32)
    )
    grads = [torch.zeros(n) for n in SIZES]
    assert float(F.ewc_add_grad_(params, grads, [p.float() for p in params], fishers, 1e30)) == 0.0
    assert not any(bool(g.any()) for g in grads)
    moved = [p.clone() for p in params]
    F.ewc_prox_(moved, params, fishers, 1e30)
    assert all(torch.equal(m, p) for m, p in zip(moved, params, strict=True))
    params, anchors, fishers, _ = data((400_003, 5), (torch.float32,) * 4)
    values = []
    for count in (1, 2, 3):
        threads(count)
        values += [F.ewc_penalty(params, anchors, fishers, 1.0) for _ in range(2)]
    assert len({float(v) for v in values}) == 1


def test_lora_penalty_is_the_dense_one() -> None:
    a, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7), (5, 3))
    )
    fisher = torch.rand(5, 7).double()
    dense = 2.0 / 2 * (fisher * (0.5 * b @ a) ** 2).sum()
    value = F.lora_ewc_penalty(a, b, fisher, 0.5, 2.0)
    torch.testing.assert_close(value, dense, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(value, [a, b]),
        torch.autograd.grad(dense, [a, b]),
        rtol=1e-12,
        atol=1e-14,
    )
    assert torch.autograd.gradcheck(lambda a, b: F.lora_ewc_penalty(a, b, fisher, 0.5, 2.0), (a, b))
    # more than one block of 2^20 / 1100 rows
    big = (
        torch.randn(2, 1100),
        torch.randn(2000, 2),
        torch.rand(2000, 1100),
    )
    truth = 0.5 * (big[2].double() * (big[1].double() @ big[0].double()) ** 2).sum()
    assert_within(
        F.lora_ewc_penalty(*big, 1.0, 1.0), 0.5 * (big[2] * (big[1] @ big[0]) ** 2).sum(), truth
    )


def lora_compose(a: Tensor, b: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (a, b)]
    value = 3.0 / 2 * (f.to(dtype) * (0.25 * leaves[1] @ leaves[0]) ** 2).sum()
    return value.detach(), *torch.autograd.grad(value, leaves)


# ragged and whole tiles of every instruction set (4 x 64 and 4 x 16), one row or column, more
# chunks than one, rank 1 and odd
LORA_SHAPES = ((1, 1, 1), (3, 5, 7), (16, 128, 192), (5, 131, 65), (17, 1300, 100), (2, 3, 300))


@pytest.mark.parametrize("shape", LORA_SHAPES, ids=str)
def test_lora_kernel(shape: tuple[int, int, int], backend: str | int) -> None:
    """Value and gradients, of every dtype of factors and Fisher, against float64 autograd over the
    values as stored.
    """
    r, out, width = shape
    op = (
        reference.lora_ewc_penalty if backend == "reference" else torch.ops.fasttax.lora_ewc_penalty
    )
    for dtype, storage in (
        (torch.float32, "fp32"),
        (torch.bfloat16, "bf16"),
        (torch.float32, "u8log"),
        (torch.float16, "fp32"),
    ):
        a, b = torch.randn(r, width).to(dtype), torch.randn(out, r).to(dtype)
        stored = encode(
            (torch.randn(out, width) * 2).exp() * (torch.rand(out, width) > 0.1), storage
        )
        truth, own = (
            lora_compose(a, b, stored.decode(), d) for d in (torch.float64, torch.float32)
        )
        got = op(
            a,
            b,
            stored.values,
            torch.empty(0) if stored.scales is None else stored.scales,
            0.25,
            3.0,
            True,
        )
        for g, o, t in zip(got, own, truth, strict=True):
            assert_within(g, o, t, ulps=64 if storage == "u8log" else 8)
        assert torch.equal(
            op(
                a,
                b,
                stored.values,
                torch.empty(0) if stored.scales is None else stored.scales,
                0.25,
                3.0,
                False,
            )[0],
            got[0],
        )


def test_lora_gradients_flow_in_the_factors_dtype_and_alone() -> None:
    a, b, f = (
        torch.randn(2, 9).bfloat16().requires_grad_(),
        torch.randn(4, 2).bfloat16(),
        torch.rand(4, 9),
    )
    value = F.lora_ewc_penalty(a, b, f, 0.25, 3.0)
    (got,) = torch.autograd.grad(2 * value, [a], create_graph=True)
    assert got.dtype == torch.bfloat16
    assert_within(
        got.detach(),
        (2 * lora_compose(a, b, f, torch.float32)[1]).bfloat16(),
        2 * lora_compose(a, b, f, torch.float64)[1],
    )
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        got.sum().backward()
    assert not F.lora_ewc_penalty(a.detach(), b, f, 0.25, 3.0).requires_grad


def test_lora_result_does_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    a, b, f = torch.randn(3, 200), torch.randn(700, 3), torch.rand(700, 200)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.ops.fasttax.lora_ewc_penalty(a, b, f, torch.empty(0), 1.0, 1.0, True))
    assert all(
        torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True)
    )


def test_strengths_beyond_float32() -> None:
    """0 at the anchor and for a Fisher of 0, the exact result where float32 holds it, and a
    contraction for any step.
    """
    theta, anchor, fisher = (
        torch.tensor([1.0, 2.0, 3.0, 1.0]),
        torch.tensor([1.0, 1.0, 1.0, 0.0]),
        torch.tensor([1.0, 0.0, 1e-37, 1e-30]),
    )
    for op in (torch.ops.fasttax, reference):
        grad = torch.ones(4)
        op.ewc_add_grad_([theta], [grad], [anchor], [fisher], [], 1e45, 1.0)
        torch.testing.assert_close(grad, torch.tensor([1.0, 1.0, 2e8, 1e15]))
        moved = theta.clone()
        op.ewc_prox_([moved], [anchor], [fisher], [], 1e40)
        torch.testing.assert_close(moved, torch.tensor([1.0, 2.0, 1 + 2 / (1 + 1e3), 1e-10]))
        moved = theta.clone()
        op.ewc_prox_([moved], [anchor], [torch.ones(4)], [], 1e70)
        assert torch.equal(moved, anchor)


def test_split_anchor_and_u8log_against_their_decoded_values(backend: str | int) -> None:
    """Packed operands, at sizes around the block of 256 and with extremes of both formats."""
    op = reference if backend == "reference" else torch.ops.fasttax
    for n in (1, 255, 256, 1000):
        theta = torch.randn(n) * 10.0 ** torch.randint(-6, 6, (n,))
        anchor, stored = (
            encode_anchor(theta * (1 + 1e-3 * torch.randn(n)), SPLIT),
            encode(torch.logspace(-37, 37, n) * (torch.rand(n) > 0.2), "u8log"),
        )
        a, f = decode_anchor(anchor, theta.shape), stored.decode()
        grads = [torch.zeros(n), torch.zeros(n)]
        op.ewc_add_grad_([theta], [grads[0]], [anchor], [stored.values], [stored.scales], 2.0, 1.0)
        op.ewc_add_grad_([theta], [grads[1]], [a], [f], [], 2.0, 1.0)
        # 2^x of an x up to 126, rounded in float32
        torch.testing.assert_close(grads[0], grads[1], rtol=4e-5, atol=0)


def test_split_anchor_keeps_drift_that_bfloat16_loses() -> None:
    weight = torch.randn(5000) * 2e-2
    error = (decode_anchor(encode_anchor(weight, SPLIT), weight.shape) - weight).abs()
    assert bool((error <= weight.abs() * 1.6e-5).all())
    # of a drift of 1e-4, where bfloat16's is beyond 10 %
    assert float((error / 1e-4).median()) < 2e-3
    assert float(((weight.bfloat16().float() - weight).abs() / 1e-4).median()) > 0.1
    odd = torch.tensor([0.0, -0.0, 1e-40, 3e38, -1.0, 65504.0])
    torch.testing.assert_close(
        decode_anchor(encode_anchor(odd, SPLIT), odd.shape), odd, rtol=1.6e-5, atol=1e-39
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    params, anchors, fishers, grads = (
        [x.to(dtype) for x in xs] for xs in data((0, 5, 300), (torch.float32,) * 4)
    )
    op = torch.ops.fasttax
    torch.library.opcheck(op.ewc_penalty.default, (params, anchors, fishers, [], 2.0))
    torch.library.opcheck(
        op.ewc_penalty.default,
        ([p.clone().requires_grad_() for p in params], anchors, fishers, [], 2.0),
    )
    torch.library.opcheck(
        op.ewc_penalty_backward.default,
        (torch.ones((), dtype=dtype), params, anchors, fishers, [], 2.0),
    )
    torch.library.opcheck(op.ewc_add_grad_.default, (params, grads, anchors, fishers, [], 2.0, 1.0))
    torch.library.opcheck(op.ewc_prox_.default, (params, anchors, fishers, [], 2.0))
    a, b, f = (
        torch.randn(2, 5, dtype=dtype, requires_grad=True),
        torch.randn(3, 2, dtype=dtype, requires_grad=True),
        torch.rand(3, 5, dtype=dtype),
    )
    scales = torch.empty(0)
    torch.library.opcheck(op.lora_ewc_penalty.default, (a, b, f, scales, 0.5, 2.0, True))
    torch.library.opcheck(
        op.lora_ewc_penalty.default, (a.detach(), b.detach(), f, scales, 0.5, 2.0, False)
    )
    torch.library.opcheck(
        op.lora_ewc_penalty_backward.default,
        (torch.ones((), dtype=dtype), *(x.detach() for x in (a, b, a, b))),
    )


def test_compiled_is_eager_and_second_derivatives_are_refused() -> None:
    theta, anchor, fisher = torch.randn(300, requires_grad=True), torch.randn(300), torch.rand(300)

    def loss(theta: Tensor) -> Tensor:
        return F.ewc_penalty([theta * 2], [anchor], [fisher], 3.0) + 1

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)(theta)
    torch.testing.assert_close(compiled, loss(theta), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, theta),
        torch.autograd.grad(loss(theta), theta),
        rtol=1e-6,
        atol=1e-6,
    )
    (grad,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="ewc_penalty: second derivatives are not available"):
        grad.sum().backward()


P = [torch.zeros(3), torch.zeros(2)]
Q, COLUMNS = [torch.zeros(2, 3)], [torch.zeros(3, 2).T]
INF = float("inf")
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "one tensor": (
        lambda: F.ewc_penalty(P[0], P, P, 1.0),
        TypeError,
        ("ewc_penalty", "params", "list of tensors", "[params]"),
    ),
    "lengths": (
        lambda: F.ewc_penalty(P, P[:1], P, 1.0),
        ValueError,
        ("ewc_penalty", "anchors", "2 tensors", "got 1"),
    ),
    "shape": (
        lambda: F.ewc_add_grad_(P, P, P, P[::-1], 1.0),
        ValueError,
        ("ewc_add_grad_", "fishers[0]", "(3,)", "(2,)"),
    ),
    "integer": (
        lambda: F.ewc_penalty(P, P, [p.long() for p in P], 1.0),
        TypeError,
        ("fishers[0]", "float32", "int64"),
    ),
    "codes without scales": (
        lambda: F.ewc_penalty(P, P, [p.byte() for p in P], 1.0),
        TypeError,
        ("fishers[0]", "uint8"),
    ),
    "one float64": (
        lambda: F.ewc_penalty(P, [p.double() for p in P], P, 1.0),
        TypeError,
        ("anchors[0]", "float64", ".to(params[0].dtype)"),
    ),
    "negative": (
        lambda: F.ewc_penalty(P, P, P, -1.0),
        ValueError,
        ("ewc_penalty", "strength", ">= 0", "-1.0"),
    ),
    "infinite": (
        lambda: F.ewc_prox_(P, P, P, INF),
        ValueError,
        ("ewc_prox_", "strength_times_lr", "finite", "inf"),
    ),
    "tensor strength": (
        lambda: F.ewc_penalty(P, P, P, torch.ones(())),
        TypeError,
        ("strength", ".item()"),
    ),
    "word": (
        lambda: F.ewc_penalty(P, P, P, "big"),
        TypeError,
        ("strength", "finite number", "big"),
    ),
    "strided grad": (
        lambda: F.ewc_add_grad_(Q, COLUMNS, Q, Q, 1.0),
        ValueError,
        ("grads[0]", "contiguous"),
    ),
    "lora rank": (
        lambda: F.lora_ewc_penalty(
            torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 3), 1.0, 1.0
        ),
        ValueError,
        ("lora_B", "(out, 2)", "(4, 3)"),
    ),
    "lora fisher": (
        lambda: F.lora_ewc_penalty(
            torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(3, 4), 1.0, 1.0
        ),
        ValueError,
        ("fisher", "(4, 3)", "(3, 4)"),
    ),
    "lora dtype": (
        lambda: F.lora_ewc_penalty(
            torch.zeros(2, 3).double(), torch.zeros(4, 2), torch.zeros(4, 3), 1.0, 1.0
        ),
        TypeError,
        ("lora_B", "float64"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_what_to_do(case: str) -> None:
    call, error, words = WRONG[case]
    assert_says(call, error, words)
