"""Derivatives that fasttax does not have are errors, of every op and in every mode; never 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

import fasttax
from fasttax import functional, reference
from fasttax.kl.call import tempering

X, Y, D = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)).unbind(0)
IDS = torch.tensor([1, 0, 5, 8])
HEAD = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
TOP = fasttax.topk_logprobs(Y, 3)
A, B, FISHER = torch.randn(2, 9), torch.randn(4, 2), torch.rand(4, 9)


def _add_grad(t: Tensor) -> Tensor:
    return functional.ewc_add_grad_([t], [torch.zeros_like(t)], [Y], [FISHER], 1.0)


# of a (4, 9) or, of hidden states, a (4, 6) tensor
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "token_kl": lambda t: fasttax.token_kl(t, Y),
    "token_kl_of_the_reference": lambda t: fasttax.token_kl(X, t),
    "token_kl_mean": lambda t: fasttax.token_kl(t, Y, reduction="mean"),
    "token_kl_in_place": lambda t: fasttax.token_kl(t * 1, Y, inplace_backward=True),
    "token_stats": lambda t: _logp(fasttax.token_stats(t, Y, IDS)),
    "token_stats_alone": lambda t: _logp(fasttax.token_stats(t, None, IDS)),
    "topk_kl": lambda t: fasttax.topk_kl(t, *TOP),
    "linear_token_kl": lambda t: fasttax.linear_token_kl(t[:, :6], HEAD, HIDDEN, HEAD),
    "linear_sum": lambda t: fasttax.linear_token_kl(t[:, :6], HEAD, HIDDEN, HEAD, reduction="sum"),
    "linear_token_logprobs": lambda t: _logp(fasttax.linear_token_logprobs(t[:, :6], HEAD, IDS)),
    "ewc_penalty": lambda t: functional.ewc_penalty([t], [Y], [FISHER], 2.0),
    "ewc_add_grad_": _add_grad,
    "lora_ewc_penalty": lambda t: functional.lora_ewc_penalty(t[:2], B, FISHER, 1.0, 1.0),
    "linear_sqgrad": lambda t: functional.linear_sqgrad(t, Y),
    "bias_sqgrad": functional.bias_sqgrad,
    "norm_sqgrad": lambda t: functional.norm_sqgrad(t, Y),
    "embedding_sqgrad": lambda t: functional.embedding_sqgrad(IDS, t, 9),
    "lm_head_fisher": lambda t: functional.lm_head_fisher(t[:, :6], HEAD),
}


def _logp(stats: fasttax.kl.TokenStats) -> Tensor:
    assert stats.logp is not None
    return stats.logp


SAYS = "forward-mode|forward mode|jvp"


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    with pytest.raises(NotImplementedError, match=SAYS), fw.dual_level():
        OPS[op](fw.make_dual(X.clone(), D))
    with pytest.raises(NotImplementedError, match=SAYS), fw.dual_level():
        OPS[op](fw.make_dual(X.clone().requires_grad_(), D))
    with pytest.raises(NotImplementedError, match=SAYS):
        torch.func.jvp(lambda t: OPS[op](t).sum(), (X.clone(),), (D,))
    OPS[op](X.clone())  # without a tangent it works, and beside one that is another's
    with fw.dual_level():
        fw.make_dual(X.clone(), D)
        OPS[op](X.clone())


@pytest.mark.parametrize("argument", ["weight", "scale"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode_of_a_factor_is_refused(reduction: str, argument: str) -> None:
    def value(factor: Tensor) -> Tensor:
        return fasttax.token_kl(x, Y, reduction=reduction, **{argument: factor}).sum()

    x, factor = X.clone().requires_grad_(), torch.tensor(0.3)
    with pytest.raises(NotImplementedError, match=f"{argument}: .*{SAYS}"), fw.dual_level():
        value(fw.make_dual(factor, torch.ones(())))
    with pytest.raises(NotImplementedError, match=SAYS):
        torch.func.jvp(value, (factor,), (torch.ones(()),))
    value(factor)


COMPILED = [op for op in OPS if op != "ewc_add_grad_"]  # which no trace takes


REFUSED = (NotImplementedError, torch._dynamo.exc.TorchDynamoException)


@pytest.mark.parametrize("op", COMPILED)
def test_forward_mode_inside_torch_compile_is_refused(op: str) -> None:
    def along(t: Tensor, d: Tensor) -> Tensor:
        return torch.func.jvp(lambda t: OPS[op](t).sum(), (t,), (d,))[1]

    def dual(t: Tensor, d: Tensor) -> Tensor | None:
        with fw.dual_level():
            return fw.unpack_dual(OPS[op](fw.make_dual(t, d))).tangent

    for derivative in (along, dual):
        torch.compiler.reset()
        with pytest.raises(NotImplementedError, match=SAYS):
            torch.compile(derivative, backend="eager")(X.clone(), D)


def test_inside_a_level_a_compiled_call_is_refused_whatever_its_tensors() -> None:
    """Its trace does not show which of them has a tangent."""
    torch.compiler.reset()
    value = torch.compile(OPS["token_kl"], backend="eager", fullgraph=True)
    expected = OPS["token_kl"](X)
    torch.testing.assert_close(value(X), expected)
    with fw.dual_level():
        with pytest.raises(REFUSED, match=f"(?s){SAYS}.*outside torch.compile"):
            value(X)
        torch.testing.assert_close(OPS["token_kl"](X), expected)  # "outside torch.compile"
    torch.testing.assert_close(value(X), expected)
    with pytest.raises(NotImplementedError, match=SAYS):
        torch.func.jvp(torch.compile(OPS["token_kl"], backend="eager"), (X.clone(),), (D,))


@pytest.mark.parametrize("op", ["token_kl", "token_stats", "linear_token_kl", "ewc_penalty"])
def test_nested_transforms_are_refused(op: str) -> None:
    def value(t: Tensor) -> Tensor:
        return OPS[op](t).sum()

    for transform in (
        torch.func.jacfwd(value),
        torch.func.hessian(value),
        torch.func.jacfwd(torch.func.grad(value)),
        lambda t: torch.func.jvp(torch.func.grad(value), (t,), (D,)),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            transform(X.clone())


@pytest.mark.parametrize(
    "op", ["token_kl", "token_kl_mean", "token_stats", "linear_token_kl", "ewc_penalty"]
)
def test_a_tangent_of_the_upstream_gradient_is_refused(op: str) -> None:
    x = X.clone().requires_grad_()
    value = OPS[op](x)
    with pytest.raises((NotImplementedError, RuntimeError), match=SAYS), fw.dual_level():
        torch.autograd.grad(value, x, fw.make_dual(torch.ones_like(value), torch.ones_like(value)))


def test_what_is_made_of_torchs_ops_has_forward_mode() -> None:
    def lists(t: Tensor) -> Tensor:
        return fasttax.topk_logprobs(t, 3)[0].sum()

    def estimate(t: Tensor) -> Tensor:
        return fasttax.kl_estimate(t.log_softmax(-1), Y.log_softmax(-1)).sum()

    for value in (lists, estimate):
        x = X.clone().requires_grad_()
        (d,) = torch.autograd.grad(value(x), x)
        along = torch.func.jvp(value, (X,), (D,))[1]
        torch.testing.assert_close(along, (d * D).sum())


def test_the_way_out_works() -> None:
    """fasttax.reference has forward mode and second derivatives."""

    def kl(t: Tensor) -> Tensor:
        return reference.token_kl(t, Y, None, *tempering("test").args())[0].sum()

    x = X.clone().requires_grad_()
    (d,) = torch.autograd.grad(fasttax.token_kl(x, Y).sum(), x)
    along = torch.func.jvp(kl, (X,), (D,))[1]
    torch.testing.assert_close(along, (d * D).sum())
    (d,) = torch.autograd.grad(kl(x), x, create_graph=True)
    (second,) = torch.autograd.grad(d.square().sum(), x)
    assert second.abs().sum() > 0


SECOND = "second derivatives are not available"


@pytest.mark.parametrize(
    "op",
    [
        "token_kl",
        "token_kl_of_the_reference",
        "token_kl_mean",
        "token_kl_in_place",
        "token_stats",
        "topk_kl",
        "linear_token_kl",
        "linear_sum",
        "linear_token_logprobs",
        "ewc_penalty",
        "lora_ewc_penalty",
    ],
)
def test_second_derivatives_are_refused(op: str) -> None:
    x = X.clone().requires_grad_()
    (d,) = torch.autograd.grad(OPS[op](x * 2).sum(), x, create_graph=True)
    assert d.requires_grad
    with pytest.raises(RuntimeError, match=SECOND):
        (x.square().sum() + d.square().sum()).backward()


def test_second_derivatives_of_an_offloaded_ewc_are_refused() -> None:
    model = torch.nn.Linear(9, 4, bias=False)
    ewc = fasttax.EWC(model, {"weight": FISHER}, strength=1.0, offload="cpu")
    with torch.no_grad():
        model.weight += 1
    (d,) = torch.autograd.grad(ewc.penalty(), model.weight, create_graph=True)
    torch.testing.assert_close(d.detach(), FISHER)
    with pytest.raises(RuntimeError, match=SECOND):
        d.square().sum().backward()


# in place


def test_overlapping_rows_are_not_overwritten() -> None:
    base = torch.randn(40, requires_grad=True)
    for view in (
        lambda b: b.unfold(0, 9, 1)[:4],
        lambda b: b.as_strided((4, 9), (8, 1)),
        lambda b: b.as_strided((4, 2, 9), (9, 3, 1)),
        lambda b: b[:9].expand(4, 9),
    ):
        logits = view(base * 1)
        with pytest.raises(ValueError, match=r"inplace_backward.*overlap.*False"):
            fasttax.token_kl(logits, torch.randn(logits.shape), inplace_backward=True)
    for view in (
        lambda b: b[:36].view(4, 9),
        lambda b: b[:36].view(2, 2, 9).transpose(0, 1),
        lambda b: b.view(4, 10)[:, :9],
    ):
        other = torch.randn(view(base).shape)
        ours, plain = (
            torch.autograd.grad(
                fasttax.token_kl(view(base * 1), other, inplace_backward=way).sum(), base
            )[0]
            for way in (True, False)
        )
        assert torch.equal(ours, plain)
