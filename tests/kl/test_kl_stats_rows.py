"""The op token_stats against a float64 oracle on every backend: the reference and C++ at each
instruction set, a row pair or the policy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl.call import tempering
from fasttax.reference.rows import STATS as ROWS
from tests.tools.kl_cases import DTYPES, INF, NAN, device_of, functions, oracle
from tests.tools.kl_inputs import LAYOUTS, OPTIONS, VOCABULARIES, peaked, rows
from tests.tools.utils import assert_within, own_result

LOGP, REF_LOGP, ENTROPY, LSE, POLICY_REF, REF_POLICY = range(6)
PAIRED = {
    option: values for option, values in OPTIONS.items() if not {"inf", "beta"} & values.keys()
}
Result = tuple[Tensor, Tensor, Tensor]


def numbers(options: dict[str, Any]) -> tuple[float, ...]:
    return tempering("test", **options).sides()


def run(
    backend: str | int,
    x: Tensor,
    y: Tensor | None,
    ids: Tensor | None,
    coefficients: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> Result:
    """Values (6, ...) and both gradients of sum coefficients * values; the reference's is empty
    where there is none.
    """
    ops, device = functions(backend), device_of(backend)
    coefficients = coefficients.to(
        device, torch.float64 if x.dtype == torch.float64 else torch.float32
    ).contiguous()
    x, y, ids, mask = (None if z is None else z.to(device) for z in (x, y, ids, mask))
    values, stats = ops.token_stats(x, y, ids, mask, *numbers(options))
    d = ops.token_stats_backward(
        coefficients, x, y, ids, mask, stats, *numbers(options), True, y is not None
    )
    return values.cpu(), d[0].cpu(), d[1].cpu()


def textbook(x: Tensor, y: Tensor | None, ids: Tensor | None, **options: Any) -> list[Tensor]:
    def log_softmax(
        z: Tensor, scale: float, cap: float | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        z = z * scale
        z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
        return z.logsumexp(-1), z.log_softmax(-1)

    temperature = options.get("temperature", 1.0)
    lse, lp = log_softmax(x, options.get("logit_scale", 1.0), options.get("softcap"), temperature)
    values = [torch.zeros_like(lse.detach()) for _ in range(6)]
    values[ENTROPY], values[LSE] = -(lp.exp() * lp.masked_fill(lp == -INF, 0.0)).sum(-1), lse
    if ids is not None:
        values[LOGP] = lp.gather(-1, ids[..., None])[..., 0]
    if y is not None:
        ref = log_softmax(
            y,
            options.get("ref_logit_scale", 1.0),
            options.get("ref_softcap"),
            options.get("ref_temperature", temperature),
        )[1]
        values[POLICY_REF], values[REF_POLICY] = (
            oracle(x, y, kind="policy_ref", **options),
            oracle(x, y, kind="ref_policy", **options),
        )
        if ids is not None:
            values[REF_LOGP] = ref.gather(-1, ids[..., None])[..., 0]
    return values


def run_textbook(
    x: Tensor,
    y: Tensor | None,
    ids: Tensor | None,
    coefficients: Tensor,
    dtype: torch.dtype,
    **options: Any,
) -> Result:
    a = x.detach().to(dtype).requires_grad_()
    b = None if y is None else y.detach().to(dtype).requires_grad_()
    values = textbook(a, b, ids, **options)
    # 0 * the gradient of inf is NaN
    used = [row for row in range(6) if values[row].requires_grad and bool(coefficients[row].any())]
    total = sum((values[row] * coefficients[row].to(dtype)).sum() for row in used)
    d = torch.autograd.grad(total, (a,) if b is None else (a, b), materialize_grads=True)
    return torch.stack(values).detach(), d[0], d[1] if b is not None else torch.empty(0)


def check(
    backend: str | int,
    x: Tensor,
    y: Tensor | None,
    ids: Tensor | None = None,
    coefficients: Tensor | None = None,
    **options: Any,
) -> None:
    """Each row of values and both gradients within twice PyTorch's own error; one scale fits the
    rows of a case.
    """
    ids = torch.randint(x.shape[-1], x.shape[:-1]) if ids is None else ids
    coefficients = (
        torch.linspace(-1.5, 2.0, 6 * x.shape[0]).reshape(x.shape[0], 6).T
        if coefficients is None
        else coefficients
    )
    values, *d = run(backend, x, y, ids, coefficients, **options)
    truth, *d_truth = run_textbook(x, y, ids, coefficients, torch.float64, **options)
    own, *d_own = run_textbook(x, y, ids, coefficients, torch.float32, **options)
    assert values.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert d[0].dtype == x.dtype
    cases = [
        *zip(values, own, truth, ROWS, strict=True),
        *zip(d, d_own, d_truth, ("d_logits", "d_ref_logits"), strict=True),
    ]
    size = max(
        1.0,
        float(x.float().nan_to_num(0, 0, 0).abs().max()),
        1.0 if y is None else float(y.float().nan_to_num(0, 0, 0).abs().max()),
    )
    size = min(
        size
        * max(1.0, options.get("logit_scale", 1.0))
        / min(1.0, options.get("temperature", 1.0)),
        64.0,
    )
    for o, w, t, name in cases:
        # as in kl_cases.check
        assert_within(o, own_result(w, t, o.dtype), t, ulps=4 * size, name=name)


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabularies(V: int, dtype: torch.dtype, alone: bool, backend: str | int) -> None:
    for x, y in rows(V, dtype).values():
        check(backend, x, None if alone else y)


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", PAIRED)
def test_options(option: str, dtype: torch.dtype, alone: bool, backend: str | int) -> None:
    for sort, (x, y) in rows(147, dtype).items():
        if sort != "low" or not {"softcap", "ref_softcap"} & PAIRED[option].keys():
            check(backend, x, None if alone else y, **PAIRED[option])


@pytest.mark.parametrize("output", range(6), ids=ROWS)
def test_each_coefficient_by_itself(output: int, backend: str | int) -> None:
    """A mix may hide one output's error behind another's size; each mix is a path of its own."""
    coefficients = torch.zeros(6, 4)
    coefficients[output] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    for x, y in rows(147, torch.float32).values():
        for options in ({}, PAIRED["temperatures"], PAIRED["softcaps"] if x.max() > -100 else {}):
            check(backend, x, y, coefficients=coefficients, **options)


@pytest.mark.parametrize("who", ["policy", "ref", "both", "apart"])
@pytest.mark.parametrize("where", [100, 3000, 9000])
@pytest.mark.parametrize("height", [12, 39, 60])
def test_peaks(height: float, where: int, who: str, backend: str | int) -> None:
    x, y = peaked(height, who, where, 9001)
    for ids in (
        torch.full((4,), where),
        torch.full((4,), 5),
    ):  # the peak itself: logp near 0, and an entry beside it
        for options in ({}, {"ref_temperature": 1.1}):
            check(backend, x, y, ids, **options)
        check(backend, x, None, ids)


def test_flat_against_peaked(backend: str | int) -> None:
    flat, peak = torch.randn(2, 2, 30001) * 0.3
    peak[:, 77] = 30
    for x, y in ((flat, peak), (peak, flat)):
        for options in ({}, {"ref_temperature": 1.1}):
            check(backend, x, y, **options)


def test_a_collapsed_row_keeps_the_gradient_of_its_peak(backend: str | int) -> None:
    """1 - p of the sampled token, 1e-4 and below: float32's p would leave a few bits of it."""
    x = torch.randn(4, 203)
    x[:, 9] += torch.tensor([9.0, 14.0, 18.0, 22.0])
    ids = torch.full((4,), 9)
    coefficients = torch.zeros(6, 4)
    coefficients[LOGP] = 1
    d = run(backend, x, None, ids, coefficients)[1][:, 9]
    truth = run_textbook(x, None, ids, coefficients, torch.float64)[1][:, 9]
    # the log-prob itself is good to a few eps, not to eps of its own size
    bound = 8 * torch.finfo(torch.float32).eps / truth
    assert ((d - truth).abs() / truth <= bound).all()


@pytest.mark.parametrize(
    ("size", "offset", "bound"), [(1e-3, 0.0, 1e-3), (1e-1, 1000.0, 1e-5), (1e-1, -1000.0, 1e-5)]
)
@pytest.mark.parametrize("V", [1003, 9001])
def test_small_kl_keeps_its_digits(
    V: int, size: float, offset: float, bound: float, backend: str | int
) -> None:
    y = torch.randn(8, V)
    x = (y + size * torch.randn(8, V)) + offset
    values = run(backend, x, y, None, torch.zeros(6, 8))[0]
    for row, kind in ((POLICY_REF, "policy_ref"), (REF_POLICY, "ref_policy")):
        truth = oracle(x.double(), y.double(), kind=kind)
        assert ((values[row] - truth).abs() / truth).max() <= bound


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"softcap": 5.0, "ref_softcap": 5.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_exactly_zero(
    dtype: torch.dtype, options: dict[str, Any], backend: str | int
) -> None:
    coefficients = torch.zeros(6, 3)
    coefficients[POLICY_REF], coefficients[REF_POLICY] = 1.5, -0.5
    for V in (1, 17, 9001):
        x = (5 * torch.randn(3, V)).to(dtype)
        x[1] -= 200
        x[2, V // 2] = -INF if V > 1 else 0.0
        values, d_x, d_y = run(
            backend, x, x.clone(), torch.zeros(3, dtype=torch.long), coefficients, **options
        )
        assert torch.equal(values[POLICY_REF:], torch.zeros_like(values[POLICY_REF:]))
        assert torch.equal(values[LOGP], values[REF_LOGP])
        assert torch.equal(d_x, torch.zeros_like(x))
        assert torch.equal(d_y, torch.zeros_like(x))


@pytest.mark.parametrize("height", [0.0, 5.0, 20.0, 80.0])
def test_entropy_from_one_outcome_to_all(height: float, backend: str | int) -> None:
    """log S and the mean of ax are large and alike where one entry has nearly all the mass: the
    frame is its maximum there.
    """
    x = torch.zeros(4, 5003)
    x[:, 4000] = height
    x += torch.tensor([0.0, 1e-3, 300.0, -300.0])[:, None]
    for y in (None, torch.randn(4, 5003)):
        check(backend, x, y)
    values = run(backend, x, None, None, torch.zeros(6, 4))[0]
    assert (values[ENTROPY] >= 0).all()


# -inf, NaN, masks, layouts


@pytest.mark.parametrize("V", [5, 130, 9001])
@pytest.mark.parametrize("where", ["both", "policy", "ref"])
def test_minus_infinity(where: str, V: int, backend: str | int) -> None:
    x, y = torch.randn(2, 4, V)
    for at in (1, V // 2, V - 1):
        if where != "ref":
            x[:, at] = -INF
        if where != "policy":
            y[:, at] = -INF
    ids = torch.zeros(4, dtype=torch.long)
    coefficients = torch.linspace(-1.5, 2.0, 24).reshape(4, 6).T.clone()
    if where == "ref":
        coefficients[POLICY_REF] = 0  # inf, whose gradient is none
    if where == "policy":
        coefficients[REF_POLICY] = 0
    check(backend, x, y, ids, coefficients)
    if where != "ref":
        check(backend, x, None, ids)
        assert (run(backend, x, None, ids + 1, coefficients)[0][LOGP] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [-INF, NAN])
def test_what_nobody_asks_for_is_not_read(
    bad: float, dtype: torch.dtype, backend: str | int
) -> None:
    """A reference without mass, and gradients of what the policy has alone."""
    x, y = torch.randn(2, 3, 70).to(dtype)
    ids, y[1], coefficients = torch.full((3,), 7), bad, torch.ones(6, 3)
    coefficients[[REF_LOGP, POLICY_REF, REF_POLICY]] = 0
    (_, d_x, d_y), alone = (run(backend, x, z, ids, coefficients) for z in (y, None))
    assert_within(d_x, alone[1], alone[1].double(), ulps=8)
    assert not d_y.any()


def test_most_of_the_vocabulary_suppressed(backend: str | int) -> None:
    x, y = torch.randn(2, 4, 9001)
    x[:, :8000] = y[:, :8000] = -INF
    for ref in (y, None):
        check(backend, x, ref, torch.full((4,), 8500))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_is_nan_and_alone(dtype: torch.dtype, bad: float, backend: str | int) -> None:
    V = 4201
    clean, ids = torch.randn(2, 3, V).to(dtype), torch.full((3,), 7)
    expected = run(backend, clean[0], clean[1], ids, torch.ones(6, 3))
    for at in (0, 2047, 2111, V - 1):
        for side in (0, 1):
            z = clean.clone()
            z[side, 1, at] = bad
            values, *d = run(backend, z[0], z[1], ids, torch.ones(6, 3))
            assert values[[POLICY_REF, REF_POLICY], 1].isnan().all(), (at, side)
            own = [LOGP, ENTROPY] + ([LSE] if bad != INF else []) if side == 0 else [REF_LOGP]
            assert values[own, 1].isnan().all(), (at, side, values)
            assert d[side][1].isnan().any()
            for o, e in zip((values, *d), expected, strict=True):
                o, e = (
                    (o[:, [0, 2]], e[:, [0, 2]])
                    if o.dim() == 2 and o.shape[0] == 6
                    else (o[[0, 2]], e[[0, 2]])
                )
                assert torch.equal(o, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_is_not_read(dtype: torch.dtype, backend: str | int) -> None:
    x, y = torch.randn(2, 5, 70).to(dtype)
    ids, coefficients = torch.arange(5), torch.randn(6, 5)
    expected = run(backend, x, y, ids, coefficients)
    mask = torch.tensor([True, False, True, False, False])
    x[1], y[1], x[3], y[4], ids[1], ids[4] = NAN, INF, -INF, NAN, -100, 10**12
    values, d_x, d_y = run(backend, x, y, ids, coefficients, mask=mask)
    assert torch.equal(values[:, mask], expected[0][:, mask])
    assert torch.equal(values[:, ~mask], torch.zeros_like(values[:, ~mask]))
    for d, e in ((d_x, expected[1]), (d_y, expected[2])):
        assert torch.equal(d[mask], e[mask])
        assert torch.equal(d[~mask], torch.zeros_like(d[~mask]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Public function: it makes the vocabulary contiguous where it is not, and no other copy."""
    x, y = (LAYOUTS[layout](z) for z in torch.randn(2, 3, 4, 5, 18, dtype=torch.float64))
    ids = torch.randint(x.shape[-1], x.shape[:-1])
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    stats = fasttax.token_stats(x, y, ids, outputs=ROWS)
    total = sum((getattr(stats, name) * (i + 1)).sum() for i, name in enumerate(ROWS))
    truth = textbook(a, b, ids)
    for i, name in enumerate(ROWS):
        torch.testing.assert_close(getattr(stats, name), truth[i])
    weighted = sum((value * (i + 1)).sum() for i, value in enumerate(truth))
    for d, t in zip(
        torch.autograd.grad(total, (x, y)), torch.autograd.grad(weighted, (a, b)), strict=True
    ):
        torch.testing.assert_close(d, t)


def test_nothing_changes_a_row(backend: str | int, threads: Callable[[int], None]) -> None:
    """Neighbours, place and threads: to the bit."""
    x, y, ids, coefficients = (
        torch.randn(7, 3001),
        torch.randn(7, 3001),
        torch.randint(3001, (7,)),
        torch.randn(6, 7),
    )
    threads(2)
    whole = run(backend, x, y, ids, coefficients)
    threads(1)
    for n in (0, 3, 6):
        values, d_x, d_y = run(
            backend, x[n : n + 1], y[n : n + 1], ids[n : n + 1], coefficients[:, n : n + 1]
        )
        if backend != "reference":
            assert torch.equal(values[:, 0], whole[0][:, n])
            assert torch.equal(d_x[0], whole[1][n])
            assert torch.equal(d_y[0], whole[2][n])
        else:
            torch.testing.assert_close(values[:, 0], whole[0][:, n])


# autograd, torch.library, torch.func


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "ref_softcap": 2.0},
        {"temperature": 0.7, "ref_temperature": 1.4, "logit_scale": 1.2},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    x, y = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    ids, mask = torch.randint(7, (2, 3)), torch.tensor([[True, True, False], [True, True, True]])

    def stack(a: Tensor, b: Tensor | None) -> Tensor:
        names = ROWS if b is not None else ("logp", "entropy", "lse")
        stats = fasttax.token_stats(a, b, ids, outputs=names, mask=mask, **options)
        return torch.stack([getattr(stats, name) for name in names])

    assert torch.autograd.gradcheck(stack, (x.requires_grad_(), y.requires_grad_()))
    assert torch.autograd.gradcheck(lambda a: stack(a, None), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 4, 20).to(dtype)
    ids, mask = torch.randint(20, (4,)), torch.tensor([True, False, True, True])
    one = (1.0, 1.0, 0.0, 0.0, 1.0, 1.0)
    for tensors in (
        (x, y, ids, mask),
        (x, None, ids, None),
        (x, None, None, mask),
        (x, y, None, None),
    ):
        grad_in = tuple(
            z if z is None or i > 1 else z.clone().requires_grad_() for i, z in enumerate(tensors)
        )
        torch.library.opcheck(torch.ops.fasttax.token_stats, (*grad_in, *one))
        stats = torch.ops.fasttax.token_stats(*tensors, *one)[1]
        torch.library.opcheck(
            torch.ops.fasttax.token_stats_backward,
            (torch.randn(6, 4), *tensors, stats, *one, True, tensors[1] is not None),
        )


def test_second_derivatives_are_refused() -> None:
    x, ids = torch.randn(2, 9, requires_grad=True), torch.zeros(2, dtype=torch.long)
    (d,) = torch.autograd.grad(fasttax.token_stats(x, None, ids).logp.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="token_stats: second derivatives are not available"):
        d.sum().backward()


def test_compile_whole_and_once() -> None:
    def loss(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        stats = fasttax.token_stats(x, y, ids, outputs=("logp", "entropy", "kl", "k3"))
        return (stats.logp - stats.entropy + stats.kl + stats.k3).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (3, 5, 8):
        x, y, ids = (
            torch.randn(N, 33, requires_grad=True),
            torch.randn(N, 33),
            torch.randint(33, (N,)),
        )
        torch.testing.assert_close(compiled(x, y, ids), loss(x, y, ids))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, y, ids), x), torch.autograd.grad(loss(x, y, ids), x)
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (
        "compiled again for another N"
    )


def test_torch_func() -> None:
    x, y, ids = torch.randn(2, 3, 9), torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    names = ("logp", "entropy", "kl_ref_policy")

    def total(a: Tensor, b: Tensor | None, i: Tensor) -> Tensor:
        stats = fasttax.token_stats(a, b, i, outputs=names if b is not None else names[:2])
        return sum(getattr(stats, name) for name in (names if b is not None else names[:2]))

    for ref in (y, None):
        dims = (0, None if ref is None else 0, 0)
        assert torch.equal(torch.func.vmap(total, in_dims=dims)(x, ref, ids), total(x, ref, ids))
        one = torch.func.vmap(torch.func.vmap(torch.func.grad(total), in_dims=dims), in_dims=dims)(
            x, ref, ids
        )
        a = x.clone().requires_grad_()
        (d,) = torch.autograd.grad(total(a, ref, ids).sum(), a)
        torch.testing.assert_close(one, d)


def test_ids_out_of_range_never_reach_memory(kernel: str | int) -> None:
    """Below the public function's own look, which torch.compile skips. To look for them on a GPU
    would be a sync: their log-probs are NaN.
    """
    op, x, plain = (
        functions(kernel).token_stats,
        torch.randn(2, 9, device=device_of(kernel)),
        (1.0, 1.0, 0.0, 0.0, 1.0, 1.0),
    )
    for bad in (9, -1, 10**15):
        ids = torch.tensor([0, bad], device=x.device)
        if isinstance(kernel, str):
            assert op(x, None, ids, None, *plain)[0][LOGP].isnan().tolist() == [False, True]
        else:
            with pytest.raises(
                RuntimeError, match="token_stats: ids: expected values in \\[0, 9\\)"
            ):
                op(x, None, ids, None, *plain)
