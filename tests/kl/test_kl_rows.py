"""token_kl on -inf, NaN, masks, every layout, and whatever must not change a row: neighbours,
threads, alignment, size.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax._base import library
from fasttax.kl.call import check_logits, tempering
from tests.tools.kl_cases import DTYPES, INF, KINDS, NAN, check, device_of, functions, oracle, run
from tests.tools.kl_inputs import LAYOUTS

# -inf, NaN, masks


@pytest.mark.parametrize("inf", ["propagate", "mask"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [5, 130, 9001])  # tail only, blocks and tail, several folds
@pytest.mark.parametrize("where", ["both", "policy", "ref", "each"])
def test_minus_infinity(where: str, V: int, kind: str, inf: str, backend: str | int) -> None:
    x, y = torch.randn(2, 4, V)
    for at in (1, V // 2, V - 1):
        if where in ("both", "policy", "each"):
            x[:, at] = -INF
        if where in ("both", "ref"):
            y[:, at] = -INF
    if where == "each":
        y[:, 3] = -INF
    infinite = (
        inf == "propagate"
        and {
            "policy_ref": where in ("ref", "each"),
            "ref_policy": where in ("policy", "each"),
            "jsd": False,
            "renyi": False,  # at order 1/2
        }[kind]
    )
    if infinite:
        assert (run(backend, x, y, kind=kind, inf=inf)[0] == INF).all()
    else:
        check(backend, x, y, kind=kind, inf=inf)


def test_most_of_the_vocabulary_suppressed(backend: str | int) -> None:
    """A frame primed on the first 2048 entries finds no maximum there."""
    x, y = torch.randn(2, 4, 9001)
    x[:, :8000] = y[:, :8000] = -INF
    for kind in KINDS:
        check(backend, x, y, kind=kind)
        check(backend, x, y, kind=kind, inf="mask")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_is_nan_and_alone(
    dtype: torch.dtype, kind: str, bad: float, backend: str | int
) -> None:
    V = 4201  # two folds, blocks, vectors, a tail
    clean = torch.randn(2, 3, V).to(dtype)
    expected = run(backend, *clean, kind=kind)[0]
    for options in ({}, {"ref_temperature": 1.3}):
        for at in (0, 2047, 2111, V - 1):
            for side in (0, 1):
                z = clean.clone()
                z[side, 1, at] = bad
                kl = run(backend, *z, kind=kind, **options)[0]
                assert kl[1].isnan(), (at, side, kl)
                if not options:
                    assert torch.equal(kl[[0, 2]], expected[[0, 2]])


def test_a_row_of_minus_infinity_is_nan(backend: str | int) -> None:
    x, y = torch.randn(2, 2, 40)
    x[0], y[1] = -INF, -INF
    for kind in KINDS:
        assert run(backend, x, y, kind=kind)[0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_is_not_read(dtype: torch.dtype, kind: str, backend: str | int) -> None:
    x, y = torch.randn(2, 5, 70).to(dtype)
    expected = run(backend, x, y, kind=kind)
    mask = torch.tensor([True, False, True, False, False])
    x[1], y[1], x[3], y[4] = NAN, INF, -INF, NAN
    for options in ({}, {"softcap": 30.0, "ref_softcap": 30.0}, {"inf": "mask"}):
        out = run(backend, x, y, mask=mask, kind=kind, **options)
        if not options:
            for o, e in zip(out, expected, strict=True):
                assert torch.equal(o[mask], e[mask])
        for o in out:
            assert torch.equal(o[~mask], torch.zeros_like(o[~mask]))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True, False, True], [False, False, True]]),
        torch.tensor([[1, 0, 3], [0, 0, 2]]),  # packed documents, numbered
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        torch.tensor([True, False, True]),  # broadcast over sequences
        torch.tensor([[True], [False]]),  # a whole sequence out
        torch.tensor(False),
        torch.ones(3, 2, dtype=torch.bool).t(),  # strided
    ],
    ids=["bool", "int", "float", "row", "column", "scalar", "strided"],
)
def test_mask_weight_and_reductions(mask: Tensor) -> None:
    x, y, weight = (
        torch.randn(2, 3, 11, requires_grad=True),
        torch.randn(2, 3, 11),
        torch.rand(2, 3, requires_grad=True),
    )
    live = (mask != 0).expand(2, 3)
    kl = torch.where(live, oracle(x.double(), y.double()), 0.0)
    for w in (None, weight):
        tokens = kl if w is None else kl * w.double()
        for reduction, truth in {
            "none": tokens,
            "sum": tokens.sum(),
            "mean": tokens.sum() / max(1, int(live.sum())),
        }.items():
            out = fasttax.token_kl(x, y, mask=mask, weight=w, reduction=reduction)
            torch.testing.assert_close(out.double(), truth, rtol=2e-6, atol=1e-9)
            inputs = (x,) if w is None else (x, w)
            for d, t in zip(
                torch.autograd.grad(out.sum(), inputs),
                torch.autograd.grad(truth.sum(), inputs, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(d, t, rtol=1e-5, atol=1e-8)


def test_mean_of_nothing_is_zero_with_a_graph() -> None:
    for shape, mask in (
        ((2, 3, 7), torch.zeros(2, 3, dtype=torch.bool)),
        ((0, 7), None),
        ((2, 0, 7), None),
    ):
        x = torch.full(shape, NAN, requires_grad=True)
        loss = fasttax.token_kl(x, torch.randn(shape), mask=mask, reduction="mean")
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(x.grad, torch.zeros(shape))


def test_a_bad_weight_under_the_mask_does_not_count() -> None:
    weight = torch.tensor([1.0, NAN, INF])
    out = fasttax.token_kl(
        torch.randn(3, 5),
        torch.randn(3, 5),
        mask=torch.tensor([1, 0, 0]),
        weight=weight,
        reduction="mean",
    )
    assert out.isfinite()


# layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str | int) -> None:
    """A view gives what its contiguous copy gives, and the gradient goes back through the view."""
    view = LAYOUTS[layout]
    x, y = torch.randn(2, 2, 3, 4, 37).to(dtype)
    for kind in KINDS:
        strided, copied = (
            run(backend, view(x), view(y), kind=kind),
            run(backend, view(x).contiguous(), view(y).contiguous(), kind=kind),
        )
        assert strided[0].shape == view(x).shape[:-1]
        for s, c in zip(
            strided, copied, strict=True
        ):  # torch's log_softmax itself may take another path for another layout
            torch.testing.assert_close(
                s,
                c,
                **(
                    {"rtol": 2e-2, "atol": 1e-4}
                    if backend == "reference"
                    else {"rtol": 0, "atol": 0}
                ),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_views(layout: str) -> None:
    view = LAYOUTS[layout]
    x, y = torch.randn(2, 2, 3, 4, 37, dtype=torch.float64).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()
    got = torch.autograd.grad(fasttax.token_kl(view(x), view(y)).sum(), (x, y))
    expected = torch.autograd.grad(oracle(view(x), view(y)).sum(), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_one_reference_for_many_rollouts() -> None:
    x, y = torch.randn(4, 3, 65, requires_grad=True), torch.randn(1, 3, 65, requires_grad=True)
    fasttax.token_kl(x, y.expand_as(x)).sum().backward()
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    oracle(a, b.expand_as(a)).sum().backward()
    torch.testing.assert_close(
        (x.grad.double(), y.grad.double()), (a.grad, b.grad), rtol=1e-5, atol=1e-7
    )


def test_mixed_dtypes() -> None:
    x, y = torch.randn(3, 65).bfloat16().requires_grad_(), torch.randn(3, 65).requires_grad_()
    kl = fasttax.token_kl(x, y)
    assert torch.equal(kl, fasttax.token_kl(x.float(), y))
    kl.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.bfloat16, torch.float32)
    assert fasttax.token_kl(x, y.double()).dtype == torch.float64
    assert fasttax.token_kl(x, y.half()).dtype == torch.float32


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")], ids=str)
def test_own_dtypes(monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str]) -> None:
    """Where a device's kernels read each row in its own dtype, none is widened into a copy."""
    x, y = (torch.randn(3, 65).to(getattr(torch, dtype)) for dtype in dtypes)
    monkeypatch.setattr(library, "own_dtypes", {"cpu"})
    kept = check_logits("token_kl", x, y, shards=False)
    assert kept[0] is x
    assert kept[1] is y
    for one in (
        check_logits("token_kl", x, y, shards=True),
        check_logits("token_kl", x, y.double(), shards=False),
        check_logits("token_kl", x.half(), y.bfloat16(), shards=False),
    ):
        assert one[0].dtype == one[1].dtype
    monkeypatch.setattr(library, "own_dtypes", {"cuda"})
    assert {t.dtype for t in check_logits("token_kl", x, y, shards=False)} == {torch.float32}


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")], ids=str)
def test_ops_of_own_dtypes(dtypes: tuple[str, str]) -> None:
    """Reference and shape functions: values are of widened rows, gradients in their dtypes."""
    ops = torch.ops.fasttax
    x, y = (torch.randn(3, 65).to(getattr(torch, dtype)) for dtype in dtypes)
    t = tempering("token_kl")
    kl_inputs = (None, *t.args())
    stats_inputs = (None, None, *t.sides())
    calls = [
        ("token_kl", "", (), kl_inputs, ()),
        ("token_kl_grad", "", (torch.rand(3),), kl_inputs, (True, True)),
        ("token_stats", "", (), stats_inputs, ()),
        ("token_kl", "_backward", (torch.rand(3),), kl_inputs, (True, True)),
        ("token_stats", "_backward", (torch.rand(6, 3),), stats_inputs, (True, True)),
    ]
    for name, suffix, first, inputs, last in calls:
        n = 1 if name == "token_kl" else 2  # mask; ids and mask
        saved: tuple[torch.Tensor, ...] = ()
        if suffix:
            saved = (getattr(ops, f"_reference_{name}")(x, y, *inputs)[1],)
        others = (*inputs[:n], *saved, *inputs[n:], *last)
        own = getattr(ops, f"_reference_{name}{suffix}")(*first, x, y, *others)
        one = getattr(ops, f"_reference_{name}{suffix}")(*first, x.float(), y.float(), *others)
        meta = getattr(ops, f"{name}{suffix}")(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in (*first, x, y, *others))
        )
        for a, b, shape in zip(own, one, meta, strict=True):
            assert torch.equal(a, b.to(a.dtype)), name
            assert (a.dtype, a.shape) == (shape.dtype, shape.shape), name
        if last:
            assert [t.dtype for t in own[-2:]] == [x.dtype, y.dtype]


# invariance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(
    dtype: torch.dtype, kind: str, kernel: str | int, threads: Callable[[int], None]
) -> None:
    """A row's bits depend on nothing but the row: not on its neighbours, its place, its alignment
    or the threads.
    """
    x, y = (2 * torch.randn(2, 70, 2201)).to(dtype)  # 70 rows of 2201 make five tasks of 14
    x[1, 2150] += 60  # a neighbour that is run twice
    threads(1)
    one = run(kernel, x, y, kind=kind)
    threads(2)
    for other in (run(kernel, x, y, kind=kind), run(kernel, x, y, kind=kind)):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    back = run(kernel, x.flip(0), y.flip(0), kind=kind)
    for n in (0, 1, 69):
        for alone, whole, moved in zip(
            run(kernel, x[n : n + 1], y[n : n + 1], kind=kind), one, back, strict=True
        ):
            assert torch.equal(alone[0], whole[n])
            assert torch.equal(moved[69 - n], whole[n])


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"ref_temperature": 2.0}, {"softcap": 9.0}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone_is_the_same(
    kind: str, options: dict[str, Any], backend: str | int
) -> None:
    """One side, the other and both are compiled apart."""
    x, y = torch.randn(2, 3, 2201)
    args = tempering("test", kind=kind, **options).args()
    ops, upstream, x, y = (
        functions(backend),
        *(z.to(device_of(backend)) for z in (torch.ones(3), x, y)),
    )
    _, stats = ops.token_kl(x, y, None, *args)
    both = ops.token_kl_backward(upstream, x, y, None, stats, *args, True, True)
    policy = ops.token_kl_backward(upstream, x, y, None, stats, *args, True, False)
    ref = ops.token_kl_backward(upstream, x, y, None, stats, *args, False, True)
    assert (policy[1].numel(), ref[0].numel()) == (0, 0)
    scale = max(float(both[0].abs().max()), float(both[1].abs().max()))
    torch.testing.assert_close((policy[0], ref[1]), both, rtol=1e-5, atol=2e-7 * scale)


def test_nothing_is_left_uninitialised(backend: str | int) -> None:
    """torch fills new memory with NaN: whatever the kernel does not write shows."""
    x, y = torch.randn(2, 5, 2051)
    mask = torch.tensor([True, False, True, True, False])
    plain = run(backend, x, y, mask=mask)
    deterministic: Any = torch.utils.deterministic
    before = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all(), "no poison here, nothing tested"
        poisoned = run(backend, x, y, mask=mask)
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before
    for a, b in zip(plain, poisoned, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone(backend: str | int) -> None:
    x, y = torch.randn(2, 5, 70)
    before = x.clone(), y.clone()
    run(backend, x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# size


@pytest.mark.parametrize(("rows", "stride"), [(2, 2**31 + 8), (3, 2**30 + 8)])
def test_more_than_2_31_cells(kernel: str | int, rows: int, stride: int) -> None:
    """Rows so far apart in 4 GiB that are never touched between them: an offset of 32 bits, or its
    product with a row's number, would fault or miss.
    """
    V, device = 3001, device_of(kernel)
    size = (rows - 1) * stride + V
    space = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(
        (rows, V), (stride, 1)
    )
    space.copy_(torch.randn(rows, V))
    ref = torch.randn(rows, V).bfloat16().to(device)
    near = space.contiguous()
    for a, b in zip(run(kernel, space, ref), run(kernel, near, ref), strict=True):
        assert torch.equal(a, b)
    args = tempering("test").args()
    ops = functions(kernel)
    _, stats = ops.token_kl(near, ref, None, *args)
    for logits in (space, near):
        one = torch.ones(rows, device=device)
        ops.token_kl_backward_(one, logits, ref, None, stats, *args, False)
    assert torch.equal(space, near)


MEMORY = """
import torch, fasttax
def status(key):
    lines = open('/proc/self/status')
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
def step(x, y, inplace):
    logits = x if not inplace else x.requires_grad_().view_as(x)
    fasttax.token_kl(x.requires_grad_(), y, reduction='mean', kind={kind!r}).backward()
step(torch.randn(2, 100), torch.randn(2, 100), False)
x, y = torch.randn(2, 256, 65536).unbind()
x = x.clone()
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
step(x, y, False)
print(status('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_the_gradient() -> None:
    """64 MiB of gradient and at most 4 MiB beside it (stats of 256 tokens, threads' stacks)."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY.format(kind="policy_ref")],
        capture_output=True,
        text=True,
        check=True,
    )
    extra = float(out.stdout)
    assert 60 <= extra <= 68, f"{extra} MiB"


def test_a_gap_that_underflows_ends(backend: str | int) -> None:
    """The mean gap is 0 in float32 and not in float64: a frame moved by it is where it was."""
    x = torch.zeros(1, 1024)
    x[0, 7] = -87.0
    y = x.clone()
    y[0, 7] = torch.nextafter(x[0, 7], torch.tensor(-1e9))
    for kind in KINDS:
        assert 0 <= run(backend, x, y, kind=kind)[0].item() <= 1e-12


@pytest.mark.parametrize("value", [-100, 0.5, 1.5, NAN])
def test_masks_of_other_values_are_refused(value: float) -> None:
    """Labels and weights do not say which tokens count."""
    x, y, mask = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.ones(2, 3)
    mask[1, 2], ids = value, torch.zeros(2, 3, dtype=torch.int64)
    head = torch.randn(5, 7)
    calls = {
        "token_kl": lambda: fasttax.token_kl(x, y, mask=mask),
        "token_stats": lambda: fasttax.token_stats(x, y, ids, mask=mask),
        "linear_token_kl": lambda: fasttax.linear_token_kl(x, head, y, head, mask=mask),
        "linear_token_logprobs": lambda: fasttax.linear_token_logprobs(x, head, ids, mask=mask),
        "topk_kl": lambda: fasttax.topk_kl(x, *fasttax.topk_logprobs(y, 3), mask=mask),
        "kl_estimate": lambda: fasttax.kl_estimate(x[..., 0], y[..., 0], mask=mask),
    }
    for op, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"{op}: mask: expected bool, or 0 and 1, got .*labels"
        ):
            call()
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float16):
        fasttax.token_kl(x, y, mask=torch.tensor([0, 1, 1]).to(dtype))
