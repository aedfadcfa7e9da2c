"""The linear ops' grad modes: gradients made in the forward, recomputed in the backward, refused
where they would be wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax._base import gemm as base_gemm
from fasttax._base import library
from fasttax.kl import linear_sweep
from tests.tools.linear_cases import NAMES, OPTIONS, H, N, V, tensors, upstream
from tests.tools.utils import assert_within, own_result, peak_bytes


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
def test_gradients_in_the_forward(
    chunk: int | None, dtype: torch.dtype, option: str, reduction: str
) -> None:
    t, mask, token_weight = tensors(dtype), torch.arange(N) % 4 != 2, torch.linspace(-1.0, 2.0, N)

    def whole(to: torch.dtype) -> tuple[Tensor, ...]:
        w = {name: value.detach().to(to).requires_grad_() for name, value in t.items()}
        x, y = (
            w["hidden"] @ w["weight"].T + w["bias"],
            w["ref_hidden"] @ w["ref_weight"].T + w["ref_bias"],
        )
        kl = fasttax.token_kl(x, y, **OPTIONS[option]) * mask * token_weight.to(to)
        loss = kl.sum() / (int(mask.sum()) if reduction == "mean" else 1)
        return loss.detach(), *torch.autograd.grad(-3 * loss, list(w.values()))

    out = fasttax.linear_token_kl(
        *(t[name] for name in NAMES[:4]),
        bias=t["bias"],
        ref_bias=t["ref_bias"],
        mask=mask,
        token_weight=token_weight,
        reduction=reduction,
        grad_mode="forward",
        token_chunk=chunk,
        **OPTIONS[option],
    )
    got = torch.autograd.grad(-3 * out, [t[name] for name in NAMES])
    for o, w, d, name in zip(
        (out.detach(), *got),
        whole(torch.float32),
        whole(torch.float64),
        ("value", *NAMES),
        strict=True,
    ):
        assert_within(o, own_result(w, d, o.dtype), d, name=name)


@pytest.mark.parametrize("chunk", [None, 5])
def test_frozen_heads_take_an_upstream_per_token(chunk: int | None) -> None:
    """The hidden states' gradient is linear in what comes from above, token by token: it can be
    made before that is known.
    """
    t, mask, token_weight = tensors(), torch.arange(N) % 4 != 2, torch.linspace(0.5, 2.0, N)
    hidden, ref_hidden = t["hidden"], t["ref_hidden"]
    frozen = {name: t[name].detach() for name in ("weight", "ref_weight", "bias", "ref_bias")}
    results = []
    for mode in ("forward", "recompute"):
        kl = fasttax.linear_token_kl(
            hidden,
            frozen["weight"],
            ref_hidden,
            frozen["ref_weight"],
            bias=frozen["bias"],
            ref_bias=frozen["ref_bias"],
            mask=mask,
            token_weight=token_weight,
            token_chunk=chunk,
            grad_mode=mode,
        )
        results.append(
            (kl.detach(), *torch.autograd.grad((kl * upstream()).sum(), (hidden, ref_hidden)))
        )
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][1][~mask], torch.zeros_like(hidden[~mask]))


@pytest.fixture
def gemms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the result of every GEMM, logits' among them, as they come."""
    sizes: list[int] = []
    gemm, project = base_gemm.gemm, base_gemm.project

    def counted(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        sizes.append(out.numel())
        gemm(a, b, out, add)

    def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        before = len(sizes)
        project(hidden, weight, bias, out)
        sizes[before:] = [out.numel()]  # its own kernel, or GEMMs of blocks
        return out

    monkeypatch.setattr(linear_sweep, "gemm", counted)
    monkeypatch.setattr(linear_sweep, "project", projected)
    return sizes


GEMMS: dict[str, tuple[tuple[str, ...], bool, str, int]] = {
    "policy": (("hidden", "weight"), False, "forward", 4),
    "hidden": (("hidden",), False, "forward", 3),
    "both": (("hidden", "weight", "ref_hidden", "ref_weight"), False, "forward", 6),
    "shared": (("hidden", "weight"), True, "forward", 3),  # both logits in one
    "recompute": (("hidden", "weight"), False, "recompute", 6),
    "recompute_shared": (("hidden", "weight"), True, "recompute", 4),
}


@pytest.mark.parametrize("case", GEMMS)
@pytest.mark.parametrize("token_chunk", [N, 4])
def test_gemms(token_chunk: int, case: str, gemms: list[int]) -> None:
    requires, shared, mode, per_chunk = GEMMS[case]
    w = {name: value.detach().requires_grad_(name in requires) for name, value in tensors().items()}
    refs = (
        (w["hidden"].detach(), w["weight"].detach())
        if shared
        else (w["ref_hidden"], w["ref_weight"])
    )
    fasttax.linear_token_kl(
        w["hidden"], w["weight"], *refs, reduction="mean", grad_mode=mode, token_chunk=token_chunk
    ).backward()
    assert len(gemms) == per_chunk * -(-N // token_chunk)
    assert max(gemms) <= max(2 * token_chunk * V, V * H), "something of the size of all logits"


LOGPROB_GEMMS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "mean": (("hidden", "weight"), {"reduction": "mean"}, 3),
    "frozen": (("hidden",), {"reduction": "mean"}, 2),
    "frozen_per_token": (("hidden",), {}, 2),
    "per_token": (("hidden", "weight"), {}, 4),
    "frozen_two_outputs": (("hidden",), {"outputs": ("logp", "entropy")}, 3),
    "no_grad": ((), {"reduction": "sum"}, 1),
}


@pytest.mark.parametrize("case", LOGPROB_GEMMS)
def test_gemms_of_logprobs(case: str, gemms: list[int]) -> None:
    requires, options, per_chunk = LOGPROB_GEMMS[case]
    h, w = (
        tensors()[name].detach().requires_grad_(name in requires) for name in ("hidden", "weight")
    )
    stats = fasttax.linear_token_logprobs(h, w, torch.arange(N), token_chunk=5, **options)
    if requires:
        sum(getattr(stats, name).sum() for name in options.get("outputs", ("logp",))).backward()
    assert len(gemms) == per_chunk * 3


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_masked_tokens_cost_no_gemm(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    gemm, project = base_gemm.gemm, base_gemm.project

    def counted(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        # the tokens are what a head's gradient sums over
        rows.append(a.shape[1] if out.shape[0] == V else a.shape[0])
        gemm(a, b, out, add)

    def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        return project(hidden, weight, bias, out)

    monkeypatch.setattr(linear_sweep, "gemm", counted)
    monkeypatch.setattr(linear_sweep, "project", projected)
    t, mask = tensors(), torch.arange(N) % 3 == 1
    for keep in (mask, torch.zeros_like(mask)):
        rows.clear()
        loss = fasttax.linear_token_kl(
            *(t[name] for name in NAMES[:4]), mask=keep, reduction="sum", grad_mode=mode
        )
        grads = torch.autograd.grad(loss, [t[name] for name in NAMES[:4]])
        assert set(rows) == ({4} if keep.any() else set())  # of the 13 tokens
        assert not grads[0][~keep].any()
        assert keep.any() or not any(d.any() for d in grads)


@pytest.mark.parametrize("output", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("case", ["sum", "mean", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logprobs_gradients_in_the_forward(dtype: torch.dtype, case: str, output: str) -> None:
    t, ids, mask, token_weight = (
        tensors(dtype),
        torch.arange(N) * 2,
        torch.arange(N) % 4 != 2,
        torch.linspace(-1.0, 2.0, N),
    )
    leaves = ("hidden",) if case == "frozen" else ("hidden", "weight", "bias")
    options: dict[str, Any] = {
        "temperature": 0.7,
        "softcap": 9.0,
        "mask": mask,
        "reduction": "none" if case == "frozen" else case,
    }

    def grads(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        above = (
            upstream().to(value.dtype)
            if case == "frozen"
            else torch.tensor(-3.0, dtype=value.dtype)
        )
        return value.detach(), *torch.autograd.grad(value, inputs, above)

    def whole(to: torch.dtype) -> tuple[Tensor, ...]:
        w = {
            name: t[name].detach().to(to).requires_grad_(name in leaves)
            for name in ("hidden", "weight", "bias")
        }
        stats = fasttax.token_stats(
            w["hidden"] @ w["weight"].T + w["bias"],
            None,
            ids,
            outputs=(output,),
            weight=token_weight,
            **options,
        )
        return grads(getattr(stats, output), [w[name] for name in leaves])

    w = {
        name: t[name].detach().requires_grad_(name in leaves)
        for name in ("hidden", "weight", "bias")
    }
    stats = fasttax.linear_token_logprobs(
        w["hidden"],
        w["weight"],
        ids,
        bias=w["bias"],
        outputs=(output,),
        token_weight=token_weight,
        grad_mode="forward",
        token_chunk=4,
        **options,
    )
    assert getattr(stats, output).grad_fn.name() in ("_GradientInForwardBackward", "ViewBackward0")
    for o, b, d, name in zip(
        grads(getattr(stats, output), [w[name] for name in leaves]),
        whole(torch.float32),
        whole(torch.float64),
        ("value", *leaves),
        strict=True,
    ):
        assert_within(o, own_result(b, d, o.dtype), d, name=name)


@pytest.mark.skipif(
    "_C" in library.problems, reason="the reference has temporaries of a chunk's size"
)
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_peak_memory_is_a_chunk_and_the_gradients(mode: str) -> None:
    """Four times the tokens, and the same memory but for what is of the hidden states' size."""
    V, H = 4096, 16
    w, rw = torch.randn(V, H), torch.randn(V, H)
    peaks = []
    for n in (256, 1024):
        h, rh = torch.randn(n, H), torch.randn(n, H)

        def call(h: Tensor = h, rh: Tensor = rh) -> None:
            leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
            fasttax.linear_token_kl(
                *leaves, rh, rw, reduction="mean", grad_mode=mode, token_chunk=128
            ).backward()

        peaks.append(peak_bytes(call))
    chunk, gradients = 4 * V * (128 + 64), 4 * V * H
    # hidden states and their gradient; rows, what is kept of them and their gradient
    per_token = 4 * (2 * H + 100)
    assert peaks[0] <= chunk + gradients + 256 * per_token, peaks
    assert peaks[1] <= chunk + gradients + 1024 * per_token, peaks


def test_a_shared_head_is_the_same_kl() -> None:
    t = {name: value.detach() for name, value in tensors().items()}
    ref_hidden = torch.randn(N, H)
    results = []
    for ref_weight, ref_bias in (
        (t["weight"], t["bias"]),
        (t["weight"].clone(), t["bias"].clone()),
    ):
        h, w, b = (
            t[name].clone().requires_grad_()
            if ref_weight is not t["weight"]
            else t[name].requires_grad_()
            for name in ("hidden", "weight", "bias")
        )
        loss = fasttax.linear_token_kl(
            h,
            w,
            ref_hidden,
            ref_weight.detach(),
            bias=b,
            ref_bias=ref_bias.detach(),
            reduction="mean",
            token_chunk=5,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w, b))))
    torch.testing.assert_close(*results)


def test_graphs_kept_freed_and_differentiated() -> None:
    t = tensors()
    loss = fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), reduction="mean")
    first = torch.autograd.grad(loss, t["weight"], retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(2 * loss, t["weight"], retain_graph=True)[0] / 2)
    (d,) = torch.autograd.grad(loss, t["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_kl: second derivatives are not available"):
        d.sum().backward()
    loss = fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), reduction="mean")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_auto_recomputes_where_the_forward_cannot() -> None:
    half = {name: value.detach().half().requires_grad_() for name, value in tensors().items()}
    fasttax.linear_token_kl(*(half[name] for name in NAMES[:4]), reduction="mean").backward()
    assert half["weight"].grad.isfinite().all()
    t, token_weight = tensors(), torch.rand(N, requires_grad=True)
    fasttax.linear_token_kl(
        *(t[name] for name in NAMES[:4]), token_weight=token_weight, reduction="mean"
    ).backward()
    assert token_weight.grad.abs().min() > 0
    assert fasttax.linear_token_kl(
        *(t[name].detach() for name in NAMES[:4]), grad_mode="forward"
    ).shape == (N,)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_mixed_dtypes(mode: str) -> None:
    """A bfloat16 model against a float32 reference, and anything with float64."""
    t = {name: value.detach() for name, value in tensors().items()}
    for change, dtype in (
        ({"hidden": torch.bfloat16, "weight": torch.bfloat16}, torch.float32),
        ({"ref_weight": torch.float64}, torch.float64),
        ({"bias": torch.float64}, torch.float64),
    ):
        w = {
            name: value.to(change.get(name, torch.float32)).requires_grad_()
            for name, value in t.items()
        }
        loss = fasttax.linear_token_kl(
            *(w[name] for name in NAMES[:4]),
            bias=w["bias"],
            ref_bias=w["ref_bias"],
            reduction="mean",
            grad_mode=mode,
        )
        assert loss.dtype == dtype

        def materialised(leaves: dict[str, Tensor]) -> Tensor:
            x, y = (
                product(leaves[f"{model}hidden"], leaves[f"{model}weight"])
                + leaves[f"{model}bias"].to(leaves["bias"].dtype)
                for model in ("", "ref_")
            )
            return fasttax.token_kl(x, y, reduction="mean")

        wide = {name: value.detach().double().requires_grad_() for name, value in w.items()}
        truth = materialised(wide)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        own = torch.autograd.grad(materialised(w), list(w.values()))
        for name, d, e, other in zip(
            NAMES,
            torch.autograd.grad(loss, list(w.values())),
            torch.autograd.grad(truth, list(wide.values())),
            own,
            strict=True,
        ):
            assert d.dtype == change.get(name, torch.float32)
            assert_within(d, other, e, name=name)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight^T, of mixed dtypes in the wider one."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(wide) @ weight.to(wide).T


def refused() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "vocab_chunk": ({"reduction": "mean", "vocab_chunk": 10}, "vocab_chunk < V"),
        "per_token": ({"reduction": "none"}, "weights are not known"),
        "entropy": ({"reduction": "mean", "return_entropy": True}, "return_entropy"),
        "token_weight": (
            {"reduction": "mean", "token_weight": torch.rand(N, requires_grad=True)},
            "weights require grad",
        ),
    }


@pytest.mark.parametrize("case", refused())
def test_wrong_combinations_are_refused(case: str) -> None:
    options, reason = refused()[case]
    with pytest.raises(
        ValueError,
        match=f"linear_token_kl: grad_mode: expected 'auto' or 'recompute', "
        f"got 'forward'.*{reason}",
    ):
        fasttax.linear_token_kl(
            *(tensors()[name] for name in NAMES[:4]), grad_mode="forward", **options
        )


def test_wrong_combinations_of_logprobs_are_refused() -> None:
    t, ids = tensors(), torch.arange(N)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "weights are not known"),
        ({"reduction": "mean", "outputs": ("logp", "entropy")}, "several outputs"),
        ({"reduction": "mean", "vocab_chunk": 10}, "vocab_chunk < V"),
        (
            {"reduction": "mean", "token_weight": torch.rand(N, requires_grad=True)},
            "weights require grad",
        ),
    )
    for options, reason in cases:
        with pytest.raises(
            ValueError,
            match=f"linear_token_logprobs: grad_mode: expected 'auto' or 'recompute', "
            f"got 'forward'.*{reason}",
        ):
            fasttax.linear_token_logprobs(
                t["hidden"], t["weight"], ids, grad_mode="forward", **options
            )
        # "auto" recomputes
        stats = fasttax.linear_token_logprobs(t["hidden"], t["weight"], ids, **options)
        (d,) = torch.autograd.grad(stats.logp.sum(), t["weight"])
        others = {
            "weight": options.get("token_weight"),
            "reduction": options.get("reduction", "none"),
            "outputs": options.get("outputs", ("logp",)),
        }
        whole = fasttax.token_stats(t["hidden"] @ t["weight"].T, None, ids, **others)
        torch.testing.assert_close(
            d, torch.autograd.grad(whole.logp.sum(), t["weight"])[0], rtol=1e-4, atol=1e-6
        )


def test_two_losses_on_the_same_tensors() -> None:
    """A loss each from both ops, one tensor under both, one backward: the gradients add up."""
    t, ids = tensors(torch.float64), torch.arange(N)
    x, y = t["hidden"] @ t["weight"].T, t["ref_hidden"] @ t["ref_weight"].T
    whole = (
        fasttax.token_kl(x, y, reduction="mean")
        - 0.3 * fasttax.token_stats(x, None, ids, reduction="sum").logp
    )
    truth = torch.autograd.grad(whole, [t[name] for name in NAMES[:4]])
    for mode in ("forward", "recompute"):
        loss = fasttax.linear_token_kl(
            *(t[name] for name in NAMES[:4]), reduction="mean", grad_mode=mode
        )
        loss = (
            loss
            - 0.3
            * fasttax.linear_token_logprobs(
                t["hidden"], t["weight"], ids, reduction="sum", grad_mode=mode
            ).logp
        )
        torch.testing.assert_close(
            torch.autograd.grad(loss, [t[name] for name in NAMES[:4]], retain_graph=True), truth
        )
        torch.testing.assert_close(
            torch.autograd.grad(loss, [t[name] for name in NAMES[:4]]), truth
        )
