"""linear_token_kl and linear_token_logprobs against token_kl's formula on materialised logits; the
vocabulary over two processes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasttax
from tests.tools.linear_cases import (
    NAMES,
    OPTIONS,
    H,
    N,
    R,
    V,
    fused,
    materialised,
    tensors,
    upstream,
)
from tests.tools.processes import on_ranks
from tests.tools.quantised import Int8Weight
from tests.tools.utils import assert_within, named, own_result, relative_error

NAN = math.nan


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
# default, one token, an uneven rest, exactly all, more than all
@pytest.mark.parametrize("chunk", [None, 1, 5, 13, 100])
def test_against_materialised_logits(chunk: int | None, dtype: torch.dtype, option: str) -> None:
    t = tensors(dtype)
    out, got = fused(t, token_chunk=chunk, **OPTIONS[option])
    truth, d_truth = materialised(t, torch.float64, **OPTIONS[option])
    own, d_own = materialised(t, torch.float32, **OPTIONS[option])
    for o, w, d, name in zip(
        (out, *got), (own, *d_own), (truth, *d_truth), ("value", *NAMES), strict=True
    ):
        assert_within(o, own_result(w, d, o.dtype), d, name=name)


def test_chunks_of_bfloat16_heads_are_summed_in_float32() -> None:
    """512 chunks of one token: a weight gradient summed in bfloat16 would lose eight times what its
    last rounding costs.
    """
    t = {
        name: torch.randn(shape).bfloat16()
        for name, shape in {"h": (512, 16), "w": (64, 16), "rh": (512, 16), "rw": (64, 16)}.items()
    }
    w = t["w"].double().requires_grad_()
    fasttax.token_kl(
        t["h"].double() @ w.T, t["rh"].double() @ t["rw"].double().T, reduction="sum"
    ).backward()
    errors = []
    for chunk in (512, 1):
        head = t["w"].clone().requires_grad_()
        fasttax.linear_token_kl(
            t["h"], head, t["rh"], t["rw"], token_chunk=chunk, reduction="sum"
        ).backward()
        errors.append(relative_error(head.grad, w.grad))
    assert errors[1] <= 1.5 * errors[0], errors


def test_leading_dimensions_reductions_and_entropy() -> None:
    h, rh, w, rw = torch.randn(2, 3, H), torch.randn(2, 3, R), torch.randn(V, H), torch.randn(V, R)
    mask, token_weight = torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.rand(2, 3)
    x, y = h @ w.T, rh @ rw.T
    for reduction in ("none", "sum", "mean"):
        kl, entropy = fasttax.linear_token_kl(
            h,
            w,
            rh,
            rw,
            mask=mask,
            token_weight=token_weight,
            reduction=reduction,
            return_entropy=True,
            token_chunk=2,
        )
        stats = fasttax.token_stats(
            x, y, outputs=("kl", "entropy"), mask=mask, weight=token_weight, reduction=reduction
        )
        torch.testing.assert_close((kl, entropy), (stats.kl, stats.entropy), rtol=1e-5, atol=1e-6)
    assert fasttax.linear_token_kl(h[0, 0], w, rh[0, 0], rw).shape == ()
    empty = fasttax.linear_token_kl(h[:0].requires_grad_(), w, rh[:0], rw, reduction="mean")
    empty.backward()
    assert empty.item() == 0


@pytest.mark.parametrize(("kind", "vocab_chunk"), [("policy_ref", None), ("jsd", 7)])
@pytest.mark.parametrize("trains", [("rh", "rw"), ("h",)])
def test_entropy_beside_a_kl_of_which_one_side_trains(
    trains: tuple[str, ...], kind: str, vocab_chunk: int | None
) -> None:
    t = {"h": torch.randn(5, H), "w": torch.randn(V, H), "rh": torch.randn(5, R)}
    t["rw"] = torch.randn(V, R)
    t = {name: x.double().requires_grad_(name in trains) for name, x in t.items()}
    kl, entropy = fasttax.linear_token_kl(
        *t.values(), kind=kind, return_entropy=True, token_chunk=2, vocab_chunk=vocab_chunk
    )
    stats = fasttax.token_stats(
        t["h"] @ t["w"].T, t["rh"] @ t["rw"].T, outputs=("kl", "entropy"), kind=kind
    )
    inputs = [t[name] for name in trains]
    torch.testing.assert_close(
        torch.autograd.grad((kl + 0.5 * entropy).sum(), inputs),
        torch.autograd.grad((stats.kl + 0.5 * stats.entropy).sum(), inputs),
    )


MODES: dict[str, dict[str, Any]] = {
    "forward": {"grad_mode": "forward"},
    "recompute": {"grad_mode": "recompute"},
    "tiles": {"vocab_chunk": 10},
}


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fn", ["linear_token_kl", "linear_token_logprobs"])
def test_masked_hidden_states_are_not_read(fn: str, mode: str, bad: float) -> None:
    """0 * NaN in the head's GEMM is NaN: the masked rows must be left out before it."""
    t = tensors()
    mask = torch.arange(N) % 3 != 1
    spoilt = {**t, "hidden": t["hidden"].detach().masked_fill(~mask[:, None], bad).requires_grad_()}

    def grads(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if fn == "linear_token_kl":
            loss = fasttax.linear_token_kl(
                *(t[n] for n in NAMES[:4]),
                mask=mask,
                reduction="mean",
                token_chunk=4,
                **MODES[mode],
            )
        else:
            ids = torch.arange(N).where(mask, -100)  # as labels are masked; not read either
            loss = fasttax.linear_token_logprobs(
                t["hidden"],
                t["weight"],
                ids,
                mask=mask,
                reduction="mean",
                token_chunk=4,
                **MODES[mode],
            ).logp
        return loss.detach(), *torch.autograd.grad(loss, [t["hidden"], t["weight"]])

    torch.testing.assert_close(grads(spoilt), grads(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logprobs(dtype: torch.dtype) -> None:
    t, ids = tensors(dtype), torch.randint(V, (N,))
    outputs = ("logp", "entropy", "lse")
    options = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.2}

    def grads(stats: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        values = [getattr(stats, name) for name in outputs]
        return *(v.detach() for v in values), *torch.autograd.grad(
            sum((v * upstream().to(v.dtype)).sum() for v in values), inputs
        )

    def whole(to: torch.dtype) -> tuple[Tensor, ...]:
        h, w, b = (t[n].detach().to(to).requires_grad_() for n in ("hidden", "weight", "bias"))
        return grads(
            fasttax.token_stats(h @ w.T + b, None, ids, outputs=outputs, **options), [h, w, b]
        )

    stats = fasttax.linear_token_logprobs(
        t["hidden"], t["weight"], ids, bias=t["bias"], outputs=outputs, token_chunk=4, **options
    )
    for o, w, d in zip(
        grads(stats, [t["hidden"], t["weight"], t["bias"]]),
        whole(torch.float32),
        whole(torch.float64),
        strict=True,
    ):
        assert_within(o, own_result(w, d, o.dtype), d)
    assert stats.kl is None


# vocabulary over three processes

CUTS = (0, 22, 22, V)  # uneven shards, one empty


def shard(rank: int, folder: Path) -> None:
    part, group, t, ids = (
        slice(CUTS[rank], CUTS[rank + 1]),
        dist.group.WORLD,
        tensors(torch.float64),
        torch.arange(N) * 2,
    )
    x, y = (t["hidden"] @ t["weight"].T).detach(), (t["ref_hidden"] @ t["ref_weight"].T).detach()
    a, b = x[:, part].clone().requires_grad_(), y[:, part].clone().requires_grad_()
    kl = fasttax.token_kl(a, b, kind="jsd", tp_group=group)
    stats = fasttax.token_stats(a, b, ids, outputs=("logp", "entropy", "k3"), tp_group=group)
    (kl + stats.logp + stats.entropy + stats.k3).mul(upstream()).sum().backward()
    local = {
        name: (t[name][part] if name in ("weight", "ref_weight", "bias", "ref_bias") else t[name])
        .detach()
        .clone()
        .requires_grad_()
        for name in NAMES
    }
    linear, d_linear = fused(local, token_chunk=5, tp_group=group)
    torch.save(
        {
            "kl": kl.detach(),
            "logp": stats.logp.detach(),
            "da": a.grad,
            "db": b.grad,
            "linear": linear,
            "d_linear": d_linear,
        },
        folder / f"{rank}.pt",
    )


def test_tensor_parallel(tmp_path: Path) -> None:
    """All ranks have the single process's values; a shard's gradient is its slice, not the slice
    times the world size.
    """
    on_ranks(shard, tmp_path, 3)
    t, ids = tensors(torch.float64), torch.arange(N) * 2
    x = (t["hidden"] @ t["weight"].T).detach().requires_grad_()
    y = (t["ref_hidden"] @ t["ref_weight"].T).detach().requires_grad_()
    kl = fasttax.token_kl(x, y, kind="jsd")
    stats = fasttax.token_stats(x, y, ids, outputs=("logp", "entropy", "k3"))
    (kl + stats.logp + stats.entropy + stats.k3).mul(upstream()).sum().backward()
    linear, d_linear = materialised(t, torch.float64)
    for rank in range(3):
        part, got = slice(CUTS[rank], CUTS[rank + 1]), torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(
            (got["kl"], got["logp"], got["da"], got["db"]),
            (kl, stats.logp, x.grad[:, part], y.grad[:, part]),
            check_stride=False,
        )
        torch.testing.assert_close(got["linear"], linear)
        for name, g, d in zip(NAMES, got["d_linear"], d_linear, strict=True):
            torch.testing.assert_close(
                g,
                d if name in ("hidden", "ref_hidden") else d[part],
                msg=named(name),
            )


# wrong calls

HID, W, IDS = torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(2, dtype=torch.long)
WRONG: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "quantised": (
        "linear_token_kl",
        (HID, W, HID, Int8Weight(W.to(torch.int8), W[:, :1])),
        {},
        TypeError,
        ["ref_weight", "class Int8Weight", "token_kl"],
    ),
    "width": (
        "linear_token_kl",
        (HID[:, :0], W[:, :0], HID, W),
        {},
        ValueError,
        ["hidden", "(..., H) with H >= 1", "(2, 0)"],
    ),
    "head": ("linear_token_kl", (HID, W.T, HID, W), {}, ValueError, ["weight", "(V, 4)", "(4, 7)"]),
    "ref_head": (
        "linear_token_kl",
        (HID, W, HID, W[:, :3]),
        {},
        ValueError,
        ["ref_weight", "(V, 4)", "(7, 3)"],
    ),
    "vocabulary": (
        "linear_token_kl",
        (HID, W, HID, W[:6]),
        {},
        ValueError,
        ["ref_weight", "vocabulary of 7", "(6, 4)"],
    ),
    "tokens": (
        "linear_token_kl",
        (HID, W, HID[:1], W),
        {},
        ValueError,
        ["ref_hidden", "(2,)", "(1, 4)"],
    ),
    "bias": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"bias": torch.zeros(6)},
        ValueError,
        ["bias", "(7,)", "(6,)"],
    ),
    "device": (
        "linear_token_kl",
        (HID, W.to("meta"), HID, W),
        {},
        ValueError,
        ["weight", "cpu", "meta"],
    ),
    "not_a_tensor": (
        "linear_token_kl",
        ([[0.0]], W, HID, W),
        {},
        TypeError,
        ["hidden", "torch.Tensor"],
    ),
    "chunk": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"token_chunk": 0},
        ValueError,
        ["token_chunk", ">= 1", "0"],
    ),
    "vocab_chunk": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"vocab_chunk": 1.5},
        ValueError,
        ["vocab_chunk", "integer", "1.5"],
    ),
    "ref_bias": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"ref_bias": torch.zeros(7, dtype=torch.long)},
        TypeError,
        ["ref_bias", "float32", "int64"],
    ),
    "bias_device": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"bias": torch.zeros(7, device="meta")},
        ValueError,
        ["bias", "cpu", "meta"],
    ),
    "tp_vocab_chunk": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"vocab_chunk": 3, "tp_group": object()},
        ValueError,
        ["vocab_chunk", "tp_group", "3"],
    ),
    "logprobs_mode": (
        "linear_token_logprobs",
        (HID, W, IDS),
        {"grad_mode": "fast"},
        ValueError,
        ["grad_mode", "'auto'", "'fast'"],
    ),
    "logprobs_reduction": (
        "linear_token_logprobs",
        (HID, W, IDS),
        {"reduction": "avg"},
        ValueError,
        ["reduction", "'mean'", "'avg'"],
    ),
    "grad_mode": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"grad_mode": "fast"},
        ValueError,
        ["grad_mode", "'auto'", "'fast'"],
    ),
    "kind": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"kind": "fkl"},
        ValueError,
        ["kind", "'jsd'", "'fkl'"],
    ),
    "token_weight": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"token_weight": torch.ones(3), "grad_mode": "recompute"},
        ValueError,
        ["linear_token_kl: token_weight:", "(2,)", "(3,)"],
    ),
    "token_weight_in_the_forward": (
        "linear_token_kl",
        (HID, W, HID, W),
        {"token_weight": torch.ones(3), "reduction": "sum"},
        ValueError,
        ["linear_token_kl: token_weight:", "(2,)", "(3,)"],
    ),
    "empty_vocabulary": (
        "linear_token_kl",
        (HID, W[:0], HID, W[:0]),
        {},
        ValueError,
        ["weight", "(0, 4)"],
    ),
    "ids_shape": (
        "linear_token_logprobs",
        (HID, W, IDS[:1]),
        {},
        ValueError,
        ["ids", "(2,)", "(1,)"],
    ),
    "ids_range": (
        "linear_token_logprobs",
        (HID, W, IDS + 7),
        {},
        IndexError,
        ["ids", "[0, 7)", "7 to 7"],
    ),
    "output": ("linear_token_logprobs", (HID, W, IDS), {"outputs": ("kl",)}, ValueError, ["'kl'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    op, tensors, options, error, texts = WRONG[case]
    with pytest.raises(error) as raised:
        getattr(fasttax, op)(*tensors, **options)
    for text in ("expected", "got", *texts):
        assert text in str(raised.value), str(raised.value)
