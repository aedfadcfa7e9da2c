"""token_kl in autograd, in place, under torch.library and torch.compile, and called wrongly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax.kl.call import tempering
from tests.tools.kl_cases import INF, KINDS, NAN, oracle, run_oracle

# autograd


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "ref_softcap": 2.0},
        {"temperature": 0.7, "ref_temperature": 1.4, "logit_scale": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, options: dict[str, Any]) -> None:
    x, y = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for masked in (None, mask):
        assert torch.autograd.gradcheck(
            lambda a, b, m=masked: fasttax.token_kl(a, b, kind=kind, beta=0.3, mask=m, **options),
            (x.requires_grad_(), y.requires_grad_()),
        )


def test_second_derivatives_are_refused() -> None:
    x, y = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    (d,) = torch.autograd.grad(fasttax.token_kl(x, y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="token_kl: second derivatives are not available"):
        d.sum().backward()


def test_two_losses_and_retained_graphs() -> None:
    x, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    first, second = fasttax.token_kl(x, y), fasttax.token_kl(x, y, kind="ref_policy")
    (both,) = torch.autograd.grad((first + second).sum(), x, retain_graph=True)
    apart = sum(
        torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (first, second)
    )
    torch.testing.assert_close(both, apart)
    again = torch.autograd.grad(first.sum(), x, retain_graph=True)[0]
    assert torch.equal(again, torch.autograd.grad(first.sum(), x)[0])


def test_only_what_requires_grad_gets_one() -> None:
    x, y = torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)
    fasttax.token_kl(x, y).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(
        y.grad.double(), run_oracle(x, y, torch.ones(3), torch.float64)[2], rtol=1e-5, atol=1e-7
    )
    assert not fasttax.token_kl(x, y.detach()).requires_grad


def test_autocast() -> None:
    h, w, y = torch.randn(4, 8), torch.randn(70, 8, requires_grad=True), torch.randn(4, 70)
    with torch.autocast("cpu", torch.bfloat16):
        logits = h @ w.T
        kl = fasttax.token_kl(logits, y, reduction="mean")
    assert logits.dtype == torch.bfloat16
    assert kl.dtype == torch.float32
    torch.testing.assert_close(
        kl.double(), oracle(logits.double(), y.double()).mean(), rtol=1e-5, atol=0
    )
    kl.backward()
    assert w.grad.isfinite().all()


# inplace_backward

Program = Callable[[Tensor, Tensor, bool], None]


def kl_sum(logits: Tensor, ref: Tensor, inplace: bool) -> Tensor:
    return fasttax.token_kl(logits, ref, inplace_backward=inplace, reduction="sum")


def saved_before(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    (logits.square().sum() + kl_sum(logits, y, inplace)).backward()


def saved_by_the_model(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w.tanh(), y, inplace).backward()  # tanh keeps its output for its own backward


def two_heads(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    (kl_sum(logits, y, inplace) + kl_sum(logits, 2 * y, inplace)).backward()


def twice(w: Tensor, y: Tensor, inplace: bool) -> None:
    loss = kl_sum(w * 1, y, inplace)
    loss.backward(retain_graph=True)
    loss.backward()


def expanded(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum((w[:1] * 1).expand(6, -1), y, inplace).backward()


def overlapping_ref(w: Tensor, y: Tensor, inplace: bool) -> None:
    logits = w * 1
    kl_sum(
        logits[1:], logits[:-1].detach(), inplace
    ).backward()  # a row's reference is the row before, already overwritten


def leaf(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w, y, inplace).backward()


def view_of_a_leaf(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(w[1:], y[1:], inplace).backward()


def linear(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum(torch.eye(6) @ w, y, inplace).backward()


def shifted(w: Tensor, y: Tensor, inplace: bool) -> None:
    kl_sum((w * 1)[:-1], y[1:], inplace).backward()


def outcome(program: Program, inplace: bool) -> Tensor:
    torch.manual_seed(0)
    w, y = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    before = w.detach().clone()
    program(w, y, inplace)
    assert torch.equal(w.detach(), before), "a parameter was overwritten"
    return w.grad


@pytest.mark.parametrize("program", [linear, shifted])
def test_inplace_backward(program: Program, simd: int) -> None:
    assert torch.equal(outcome(program, True), outcome(program, False))


@pytest.mark.parametrize(
    "program",
    [
        saved_before,
        saved_by_the_model,
        two_heads,
        twice,
        leaf,
        view_of_a_leaf,
        expanded,
        overlapping_ref,
    ],
)
def test_inplace_backward_refuses(program: Program) -> None:
    """Where the logits' values are needed again, an error; never a wrong gradient or a lost
    parameter.
    """
    with pytest.raises(
        (RuntimeError, ValueError),
        match=r"modified by an inplace operation|token_kl: inplace_backward: expected",
    ):
        outcome(program, True)


def test_inplace_backward_saves_the_buffer_and_serves_the_reference() -> None:
    w, y = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70, requires_grad=True)
    logits = w * 1
    kl_sum(logits, y, True).backward()
    assert torch.equal(logits.detach(), w.grad)
    torch.testing.assert_close(
        y.grad.double(), run_oracle(w, y, torch.ones(3), torch.float64)[2], rtol=1e-5, atol=1e-7
    )


# torch.library, torch.compile

ARGS = tempering("test", kind="jsd", temperature=0.7, softcap=9.0).args()
SAMPLES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor | None]]] = {
    "plain": lambda: (torch.randn(2, 3, 9), torch.randn(2, 3, 9), None),
    "grad": lambda: (
        torch.randn(3, 9, requires_grad=True),
        torch.randn(3, 9, requires_grad=True),
        torch.tensor([True, False, True]),
    ),
    "policy": lambda: (torch.randn(3, 9, requires_grad=True), torch.randn(3, 9), None),
    "bfloat16": lambda: (
        torch.randn(3, 9).bfloat16().requires_grad_(),
        torch.randn(3, 9).bfloat16(),
        None,
    ),
    "float64": lambda: (
        torch.randn(3, 9, dtype=torch.float64),
        torch.randn(3, 9, dtype=torch.float64),
        None,
    ),
    "strided": lambda: (
        torch.randn(4, 3, 9).transpose(0, 1)[:, 1:],
        torch.randn(3, 4, 9)[:, :-1],
        None,
    ),
    "empty": lambda: (torch.randn(0, 9, requires_grad=True), torch.randn(0, 9), None),
    "vector": lambda: (torch.randn(9), torch.randn(9), torch.tensor(True)),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    x, y, mask = SAMPLES[sample]()
    torch.library.opcheck(torch.ops.fasttax.token_kl.default, (x, y, mask, *ARGS))


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample: str, sides: tuple[bool, bool]) -> None:
    x, y, mask = SAMPLES[sample]()
    x, y = x.detach(), y.detach()
    kl, stats = torch.ops.fasttax.token_kl(x, y, mask, *ARGS)
    torch.library.opcheck(
        torch.ops.fasttax.token_kl_backward.default,
        (torch.randn_like(kl), x, y, mask, stats, *ARGS, *sides),
    )


@pytest.mark.parametrize("sample", ["plain", "strided", "empty"])
def test_opcheck_backward_in_place(sample: str) -> None:
    x, y, mask = SAMPLES[sample]()
    x, y = x.detach(), y.detach()
    kl, stats = torch.ops.fasttax.token_kl(x, y, mask, *ARGS)
    torch.library.opcheck(
        torch.ops.fasttax.token_kl_backward_.default,
        (torch.randn_like(kl), x, y, mask, stats, *ARGS, True),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    def step(hidden: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        return fasttax.token_kl(
            hidden * 2, ref, mask=mask, kind="ref_policy", temperature=0.9, reduction="mean"
        )

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for N in (3, 5, 8):
        x, y, mask = (
            torch.randn(N, 70, requires_grad=True),
            torch.randn(N, 70),
            torch.arange(N) % 3 != 1,
        )
        loss = compiled(x, y, mask)
        (d,) = torch.autograd.grad(loss, x)
        eager = step(x, y, mask)
        torch.testing.assert_close(
            (loss, d), (eager, *torch.autograd.grad(eager, x)), rtol=1e-6, atol=1e-8
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (
        "compiled again for another N"
    )


# wrong calls

X = torch.zeros(2, 5)
WRONG: dict[str, tuple[tuple[Any, Any], dict[str, Any], type[Exception], list[str]]] = {
    "not_a_tensor": (([1.0], X), {}, TypeError, ["logits", "torch.Tensor", "[1.0]"]),
    "ref_not_a_tensor": ((X, None), {}, TypeError, ["ref_logits", "torch.Tensor", "None"]),
    "what_a_model_returns": (
        (SimpleNamespace(logits=X), X),
        {},
        TypeError,
        ["logits", "torch.Tensor", "pass its .logits"],
    ),
    "integers": ((X.long(), X), {}, TypeError, ["logits", "float32", "int64"]),
    "no_dimension": ((X[0, 0], X[0, 0]), {}, ValueError, ["logits", "(..., V)", "()"]),
    "empty_vocabulary": ((X[:, :0], X[:, :0]), {}, ValueError, ["logits", "V >= 1", "(2, 0)"]),
    "other_vocabulary": (
        (X, X[:, :4]),
        {},
        ValueError,
        ["ref_logits", "vocabulary of 5", "(2, 4)", "tokenizer"],
    ),
    "other_shape": ((X, X[:1]), {}, ValueError, ["ref_logits", "(2, 5)", "(1, 5)"]),
    "other_device": ((X, X.to("meta")), {}, ValueError, ["ref_logits", "cpu", "meta", ".to("]),
    "kind": (
        (X, X),
        {"kind": "forward"},
        ValueError,
        ["kind", "'policy_ref'", "'ref_policy'", "'jsd'", "'forward'"],
    ),
    "reduction": (
        (X, X),
        {"reduction": "batchmean"},
        ValueError,
        ["reduction", "'mean'", "'batchmean'"],
    ),
    "inf": ((X, X), {"inf": "drop"}, ValueError, ["inf", "'propagate'", "'mask'", "'drop'"]),
    "beta": ((X, X), {"kind": "jsd", "beta": 1.5}, ValueError, ["beta", ">= 0", "<= 1", "1.5"]),
    "beta_nan": ((X, X), {"beta": NAN}, ValueError, ["beta", "finite", "nan"]),
    "temperature": ((X, X), {"temperature": 0}, ValueError, ["temperature", "> 0", "0.0"]),
    "ref_temperature": (
        (X, X),
        {"ref_temperature": -1.0},
        ValueError,
        ["ref_temperature", "> 0", "-1.0"],
    ),
    "temperature_tensor": (
        (X, X),
        {"temperature": torch.ones(())},
        TypeError,
        ["temperature", ".item()"],
    ),
    "temperature_text": (
        (X, X),
        {"temperature": "hot"},
        TypeError,
        ["temperature", "number", "hot"],
    ),
    "softcap": ((X, X), {"softcap": 0.0}, ValueError, ["softcap", "> 0", "0.0"]),
    "ref_softcap": ((X, X), {"ref_softcap": INF}, ValueError, ["ref_softcap", "finite", "inf"]),
    "logit_scale": ((X, X), {"logit_scale": -2}, ValueError, ["logit_scale", "> 0", "-2.0"]),
    "ref_logit_scale": (
        (X, X),
        {"ref_logit_scale": NAN},
        ValueError,
        ["ref_logit_scale", "finite", "nan"],
    ),
    "mask_shape": ((X, X), {"mask": torch.ones(3)}, ValueError, ["mask", "(2,)", "(3,)"]),
    "mask_list": ((X, X), {"mask": [1, 0]}, TypeError, ["mask", "torch.Tensor", "[1, 0]"]),
    "mask_device": (
        (X, X),
        {"mask": torch.ones(2, device="meta")},
        ValueError,
        ["mask", "cpu", "meta"],
    ),
    "weight_shape": (
        (X, X),
        {"weight": torch.ones(2, 5)},
        ValueError,
        ["weight", "(2,)", "(2, 5)"],
    ),
    "weight_number": ((X, X), {"weight": 2.0}, TypeError, ["weight", "torch.Tensor", "2.0"]),
    "inplace_strided": (
        (torch.zeros(5, 2).T, X),
        {"inplace_backward": True},
        ValueError,
        ["inplace_backward", "contiguous"],
    ),
    "inplace_mixed": (
        (X, X.double()),
        {"inplace_backward": True},
        ValueError,
        ["inplace_backward", "dtype"],
    ),
    "inplace_leaf": (
        (X.clone().requires_grad_(), X),
        {"inplace_backward": True},
        ValueError,
        ["inplace_backward", "leaf"],
    ),
    "tp_group": ((X, X), {"tp_group": object()}, ValueError, ["tp_group", "init_process_group"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    tensors, options, error, texts = WRONG[case]
    with pytest.raises(error) as raised:
        fasttax.token_kl(*tensors, **options)
    for text in ("token_kl: ", "expected", "got", *texts):
        assert text in str(raised.value), str(raised.value)


def test_the_op_itself_checks() -> None:
    """Behind the public function the kernels trust nothing either."""
    args = tempering("test").args()
    for x, y, mask in (
        (X, X[:, :4], None),
        (X.T, X.T, None),
        (X, X.double(), None),
        (X, X, torch.ones(3).bool()),
        (X[:, :0], X[:, :0], None),
    ):
        with pytest.raises(RuntimeError, match="token_kl: "):
            torch.ops.fasttax.token_kl(x, y, mask, *args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_never_waits_for_the_device() -> None:
    x, y, ids, mask = (
        torch.randn(8, 1003),
        torch.randn(8, 1003),
        torch.randint(1003, (8,)),
        torch.arange(8) > 2,
    )
    hidden, head = torch.randn(8, 32), torch.randn(1003, 32)
    x, y, ids, mask, hidden, head = (z.cuda() for z in (x, y, ids, mask, hidden, head))
    x, hidden, head = (z.requires_grad_() for z in (x, hidden, head))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in ("policy_ref", "ref_policy", "jsd"):
            fasttax.token_kl(x, y, kind=kind, mask=mask, reduction="mean").backward()
            fasttax.token_kl(x, y, kind=kind, mask=mask).sum().backward()
        stats = fasttax.token_stats(
            x, y, ids, outputs=("logp", "entropy", "kl_policy_ref", "k3"), mask=mask
        )
        (stats.logp + stats.entropy + stats.kl_policy_ref + stats.k3).sum().backward()
        fasttax.linear_token_kl(
            hidden, head, hidden.detach(), head.detach(), mask=mask, reduction="mean"
        ).backward()
        fasttax.linear_token_logprobs(hidden, head, ids, mask=mask).logp.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
