"""token_kl summed or averaged: its forward writes the gradient, which must be the one that forward
and then backward give.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl.call import tempering
from tests.tools.kl_cases import KINDS, run_oracle

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.7, "ref_temperature": 1.2, "softcap": 9.0},
    # logits within tanh's polynomial; in and beyond it
    "softcap": {"softcap": 30.0, "ref_softcap": 30.0},
    "low softcap": {"softcap": 2.0, "ref_softcap": 2.0},
    "inf mask": {"inf": "mask"},
}
WEIGHT, MASK = torch.tensor([0.5, -1.25, 0.0, 3.0]), torch.tensor([True, True, True, False])


def gradients(loss: Tensor, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
# float16 takes the two-step way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits(dtype: torch.dtype, kind: str, options: dict[str, Any], simd: int) -> None:
    """Whether both gradients are wanted, or one: what the sweeps keep is not the same."""
    rows = torch.randn(2, 4, 2203).to(dtype)
    rows[0, 3] = float("nan")  # under the mask
    rows[0, 1] *= 12  # shares of the mass beyond every series' reach
    weight = WEIGHT.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for needs in ((True, True), (True, False), (False, True)):
        x, y = (z.clone().requires_grad_(need) for z, need in zip(rows, needs, strict=True))
        leaves = [z for z in (x, y) if z.requires_grad]
        apart = fasttax.token_kl(x, y, kind=kind, mask=MASK, **options)
        for reduction, weights in (("sum", weight * MASK), ("mean", weight * MASK / 3)):
            fused = fasttax.token_kl(
                x, y, kind=kind, mask=MASK, weight=weight, reduction=reduction, **options
            )
            assert torch.equal(fused, (apart * weight).sum() / (3 if reduction == "mean" else 1))
            for a, b in zip(
                gradients(fused, *leaves),
                gradients(apart, *leaves, grad_outputs=weights, retain_graph=True),
                strict=True,
            ):
                if policy_alone_capped(kind, options, needs):
                    close_by_rounding(a, b)
                else:
                    assert torch.equal(a, b)


def policy_alone_capped(kind: str, options: dict[str, Any], needs: tuple[bool, bool]) -> bool:
    """Where the gradient is a product of what the forward kept in its chunks' frames."""
    return kind == "policy_ref" and needs == (True, False) and "softcap" in options


def close_by_rounding(a: Tensor, b: Tensor) -> None:
    """To a few roundings of the entry, and of the largest that its row has."""
    eps = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, rtol=16 * eps, atol=4 * eps * float(b.abs().max()))


@pytest.mark.parametrize("sides", [(True, False), (False, True)])
def test_only_what_requires_grad_gets_one(sides: tuple[bool, bool]) -> None:
    x, y = torch.randn(2, 3, 70)
    x, y = x.requires_grad_(sides[0]), y.requires_grad_(sides[1])
    fasttax.token_kl(x, y, reduction="sum").backward()
    truth = run_oracle(x, y, torch.ones(3), torch.float64)[1:]
    for z, d, needed in zip((x, y), truth, sides, strict=True):
        assert (z.grad is not None) == needed
        if needed:
            torch.testing.assert_close(z.grad.double(), d, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_an_upstream_factor_and_a_kept_graph(factor: float) -> None:
    x, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70, requires_grad=True)
    loss = factor * fasttax.token_kl(x, y, reduction="mean")
    expected = [factor * d for d in gradients(fasttax.token_kl(x, y).mean(), x, y)]
    first = gradients(loss, x, y, retain_graph=True)
    first_again = [d.clone() for d in first]
    second = gradients(loss, x, y)
    for a, b, c, e in zip(first, first_again, second, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)
        assert torch.equal(a, b), "a later backward changed a gradient that was handed out"
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, x, y)


def test_gradients_add_up_over_steps_and_losses() -> None:
    x, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    (once,) = gradients(fasttax.token_kl(x, y, reduction="mean"), x)
    for _ in range(2):
        loss = fasttax.token_kl(x, y, reduction="mean")
        (loss + 2 * loss).backward()
    torch.testing.assert_close(x.grad, 6 * once)


def test_second_derivatives_are_refused() -> None:
    x, y = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    (d,) = gradients(fasttax.token_kl(x, y, reduction="sum"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="token_kl: second derivatives are not available"):
        d.sum().backward()


def test_a_weight_may_be_learned() -> None:
    x, y, w = (
        torch.randn(3, 70, requires_grad=True),
        torch.randn(3, 70),
        torch.rand(3, requires_grad=True),
    )
    d_x, d_w = gradients(fasttax.token_kl(x, y, weight=w, reduction="sum"), x, w)
    assert torch.equal(d_w, fasttax.token_kl(x, y).detach())
    assert torch.equal(
        d_x, gradients(fasttax.token_kl(x, y, weight=w.detach(), reduction="sum"), x)[0]
    )


def test_float16_gradients_do_not_underflow_before_a_scaler() -> None:
    """4096 tokens' mean: gradients of about 1e-8 are 0 in float16, 65536 times them are not."""
    x, y = torch.randn(2, 4096, 300).half()
    x.requires_grad_()
    (d,) = gradients(65536 * fasttax.token_kl(x, y, reduction="mean"), x)
    truth = run_oracle(x, y, torch.full((4096,), 65536 / 4096), torch.float64)[1]
    assert (d.double() - truth).norm() <= 1e-3 * truth.norm()  # half a rounding of float16 is 5e-4


def test_torch_func() -> None:
    x, y, mask = torch.randn(2, 3, 70), torch.randn(2, 3, 70), torch.tensor([True, False, True])
    d = torch.func.grad(lambda z: fasttax.token_kl(z, y, mask=mask, reduction="sum"))(x)
    truth = run_oracle(x, y, mask.float().expand(2, 3), torch.float64)
    torch.testing.assert_close(d.double(), truth[1], rtol=1e-5, atol=1e-8)
    kl = fasttax.token_kl(x, y, mask=mask)
    assert torch.equal(torch.func.vmap(lambda a, b: fasttax.token_kl(a, b, mask=mask))(x, y), kl)
    assert torch.equal(
        torch.func.vmap(lambda a: fasttax.token_kl(a, y[0]), in_dims=1, out_dims=1)(
            x.movedim(0, 1)
        ),
        fasttax.token_kl(x, y[:1].expand_as(x)).T,
    )
    by_row = torch.func.vmap(torch.func.grad(lambda a, b: fasttax.token_kl(a, b)), in_dims=(0, 0))(
        x[0], y[0]
    )
    torch.testing.assert_close(
        by_row.double(),
        run_oracle(x[0], y[0], torch.ones(3), torch.float64)[1],
        rtol=1e-5,
        atol=1e-8,
    )
    jacobian = torch.func.jacrev(lambda a: fasttax.token_kl(a, y[0]))(x[0])
    torch.testing.assert_close(jacobian.diagonal(dim1=0, dim2=1).T, by_row, rtol=1e-6, atol=1e-9)

    def of_one_token(a: Tensor) -> Tensor:
        return fasttax.token_kl(a, y[0, 0])

    with pytest.raises(RuntimeError, match="token_kl: second derivatives are not available"):
        torch.func.jacrev(torch.func.grad(of_one_token))(x[0, 0])


def test_without_gradients_the_forward_writes_none() -> None:
    x, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    with torch.no_grad():
        assert not fasttax.token_kl(x, y, reduction="mean").requires_grad
    assert not fasttax.token_kl(x.detach(), y, reduction="mean").requires_grad


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck(needs: tuple[bool, bool]) -> None:
    args = tempering("test", kind="jsd", temperature=0.7).args()
    for shape in ((2, 3, 9), (0, 9), (9,)):
        x, y, weight = torch.randn(shape), torch.randn(shape), torch.rand(shape[:-1])
        torch.library.opcheck(
            torch.ops.fasttax.token_kl_grad.default, (weight, x, y, weight > 0.3, *args, *needs)
        )
