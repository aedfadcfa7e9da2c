"""linear_token_kl and linear_token_logprobs against token_kl's formula on materialised logits; the vocabulary over two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from utils import assert_within, own_result, relative_error

import fasttax

NAN = math.nan
N, H, R, V = 13, 8, 6, 37  # no multiple of any chunk below; the reference's head has another width
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ref_policy": {"kind": "ref_policy", "temperature": 0.7},
    "jsd": {"kind": "jsd", "beta": 0.3, "softcap": 9.0, "ref_softcap": 8.0},
}
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias")


def tensors(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, Tensor]:
    shapes = {"hidden": (N, H), "weight": (V, H), "ref_hidden": (N, R), "ref_weight": (V, R), "bias": (V,), "ref_bias": (V,)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for name, shape in shapes.items()}


def materialised(t: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Per-token KL of whole logits in `dtype`, and the gradients of its weighted sum."""
    w = {name: value.detach().to(dtype).requires_grad_() for name, value in t.items()}
    x, y = w["hidden"] @ w["weight"].T + w["bias"], w["ref_hidden"] @ w["ref_weight"].T + w["ref_bias"]
    kl = fasttax.token_kl(x, y, **options)
    return kl.detach(), torch.autograd.grad((kl * upstream().to(dtype)).sum(), list(w.values()))


def upstream() -> Tensor:
    return torch.linspace(-1.0, 2.0, N)


def fused(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    kl = fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), bias=t["bias"], ref_bias=t["ref_bias"], **options)
    return kl.detach(), torch.autograd.grad((kl * upstream().to(kl.dtype)).sum(), [t[name] for name in NAMES])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, 13, 100])  # default, one token, an uneven rest, exactly all, more than all
def test_against_materialised_logits(chunk: int | None, dtype: torch.dtype, option: str) -> None:
    t = tensors(dtype)
    out, got = fused(t, token_chunk=chunk, **OPTIONS[option])
    truth, d_truth = materialised(t, torch.float64, **OPTIONS[option])
    own, d_own = materialised(t, torch.float32, **OPTIONS[option])
    for o, w, d, name in zip((out, *got), (own, *d_own), (truth, *d_truth), ("value", *NAMES), strict=True):
        assert_within(o, own_result(w, d, o.dtype), d, name=name)


def test_chunks_of_bfloat16_heads_are_summed_in_float32() -> None:
    """512 chunks of one token: a weight gradient summed in bfloat16 would lose eight times what its last rounding costs."""
    t = {name: torch.randn(shape).bfloat16() for name, shape in {"h": (512, 16), "w": (64, 16), "rh": (512, 16), "rw": (64, 16)}.items()}
    w = t["w"].double().requires_grad_()
    fasttax.token_kl(t["h"].double() @ w.T, t["rh"].double() @ t["rw"].double().T, reduction="sum").backward()
    errors = []
    for chunk in (512, 1):
        head = t["w"].clone().requires_grad_()
        fasttax.linear_token_kl(t["h"], head, t["rh"], t["rw"], token_chunk=chunk, reduction="sum").backward()
        errors.append(relative_error(head.grad, w.grad))
    assert errors[1] <= 1.5 * errors[0], errors


def test_leading_dimensions_reductions_and_entropy() -> None:
    h, rh, w, rw = torch.randn(2, 3, H), torch.randn(2, 3, R), torch.randn(V, H), torch.randn(V, R)
    mask, token_weight = torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.rand(2, 3)
    x, y = h @ w.T, rh @ rw.T
    for reduction in ("none", "sum", "mean"):
        kl, entropy = fasttax.linear_token_kl(h, w, rh, rw, mask=mask, token_weight=token_weight, reduction=reduction, return_entropy=True, token_chunk=2)
        stats = fasttax.token_stats(x, y, outputs=("kl", "entropy"), mask=mask, weight=token_weight, reduction=reduction)
        torch.testing.assert_close((kl, entropy), (stats.kl, stats.entropy), rtol=1e-5, atol=1e-6)
    assert fasttax.linear_token_kl(h[0, 0], w, rh[0, 0], rw).shape == ()
    empty = fasttax.linear_token_kl(h[:0].requires_grad_(), w, rh[:0], rw, reduction="mean")
    empty.backward()
    assert empty.item() == 0


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("fn", ["linear_token_kl", "linear_token_logprobs"])
def test_masked_hidden_states_are_not_read(fn: str, bad: float) -> None:
    """0 * NaN in the head's GEMM is NaN: the masked rows must be left out before it."""
    t = tensors()
    mask = torch.arange(N) % 3 != 1
    spoilt = {**t, "hidden": t["hidden"].detach().masked_fill(~mask[:, None], bad).requires_grad_()}

    def grads(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if fn == "linear_token_kl":
            loss = fasttax.linear_token_kl(*(t[n] for n in NAMES[:4]), mask=mask, reduction="mean", token_chunk=4)
        else:
            loss = fasttax.linear_token_logprobs(t["hidden"], t["weight"], torch.arange(N), mask=mask, reduction="mean", token_chunk=4).logp
        return loss.detach(), *torch.autograd.grad(loss, [t["hidden"], t["weight"]])

    torch.testing.assert_close(grads(spoilt), grads(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logprobs(dtype: torch.dtype) -> None:
    t, ids = tensors(dtype), torch.randint(V, (N,))
    outputs = ("logp", "entropy", "lse")
    options = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.2}

    def grads(stats: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        values = [getattr(stats, name) for name in outputs]
        return *(v.detach() for v in values), *torch.autograd.grad(sum((v * upstream().to(v.dtype)).sum() for v in values), inputs)

    def whole(to: torch.dtype) -> tuple[Tensor, ...]:
        h, w, b = (t[n].detach().to(to).requires_grad_() for n in ("hidden", "weight", "bias"))
        return grads(fasttax.token_stats(h @ w.T + b, None, ids, outputs=outputs, **options), [h, w, b])

    stats = fasttax.linear_token_logprobs(t["hidden"], t["weight"], ids, bias=t["bias"], outputs=outputs, token_chunk=4, **options)
    for o, w, d in zip(grads(stats, [t["hidden"], t["weight"], t["bias"]]), whole(torch.float32), whole(torch.float64), strict=True):
        assert_within(o, own_result(w, d, o.dtype), d)
    assert stats.kl is None


# --- gradients in the forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
def test_gradients_in_the_forward(chunk: int | None, dtype: torch.dtype, option: str, reduction: str) -> None:
    t, mask, token_weight = tensors(dtype), torch.arange(N) % 4 != 2, torch.linspace(-1.0, 2.0, N)

    def whole(to: torch.dtype) -> tuple[Tensor, ...]:
        w = {name: value.detach().to(to).requires_grad_() for name, value in t.items()}
        x, y = w["hidden"] @ w["weight"].T + w["bias"], w["ref_hidden"] @ w["ref_weight"].T + w["ref_bias"]
        kl = fasttax.token_kl(x, y, **OPTIONS[option]) * mask * token_weight.to(to)
        loss = kl.sum() / (int(mask.sum()) if reduction == "mean" else 1)
        return loss.detach(), *torch.autograd.grad(-3 * loss, list(w.values()))

    out = fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), bias=t["bias"], ref_bias=t["ref_bias"], mask=mask, token_weight=token_weight,
                                  reduction=reduction, grad_mode="forward", token_chunk=chunk, **OPTIONS[option])  # fmt: skip
    got = torch.autograd.grad(-3 * out, [t[name] for name in NAMES])
    for o, w, d, name in zip((out.detach(), *got), whole(torch.float32), whole(torch.float64), ("value", *NAMES), strict=True):
        assert_within(o, own_result(w, d, o.dtype), d, name=name)


@pytest.mark.parametrize("chunk", [None, 5])
def test_frozen_heads_take_an_upstream_per_token(chunk: int | None) -> None:
    """The hidden states' gradient is linear in what comes from above, token by token: it can be made before that is known."""
    t, mask, token_weight = tensors(), torch.arange(N) % 4 != 2, torch.linspace(0.5, 2.0, N)
    hidden, ref_hidden = t["hidden"], t["ref_hidden"]
    frozen = {name: t[name].detach() for name in ("weight", "ref_weight", "bias", "ref_bias")}
    results = []
    for mode in ("forward", "recompute"):
        kl = fasttax.linear_token_kl(hidden, frozen["weight"], ref_hidden, frozen["ref_weight"], bias=frozen["bias"], ref_bias=frozen["ref_bias"],
                                     mask=mask, token_weight=token_weight, token_chunk=chunk, grad_mode=mode)  # fmt: skip
        results.append((kl.detach(), *torch.autograd.grad((kl * upstream()).sum(), (hidden, ref_hidden))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][1][~mask], torch.zeros_like(hidden[~mask]))


class Watch(TorchDispatchMode):
    """GEMMs, and the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.gemms += name in ("mm", "addmm", "addmm_")
        self.largest = max(self.largest, *(o.numel() for o in (out if isinstance(out, tuple | list) else (out,)) if isinstance(o, Tensor)), 0)
        return out


def test_gemms_and_memory() -> None:
    t = {name: value.detach() for name, value in tensors().items()}
    for requires, shared, mode, gemms in (
        (("hidden", "weight"), False, "forward", 4),
        (("hidden",), False, "forward", 3),
        (("hidden", "weight", "ref_hidden", "ref_weight"), False, "forward", 6),
        (("hidden", "weight"), True, "forward", 3),  # both logits in one
        (("hidden", "weight"), False, "recompute", 6),
    ):
        w = {name: value.clone().requires_grad_(name in requires) for name, value in t.items()}
        refs = (w["hidden"].detach(), w["weight"].detach()) if shared else (w["ref_hidden"], w["ref_weight"])
        for chunks, token_chunk in ((1, N), (4, 4)):
            with Watch() as seen:
                fasttax.linear_token_kl(w["hidden"], w["weight"], *refs, reduction="mean", grad_mode=mode, token_chunk=token_chunk).backward()
            assert seen.gemms == gemms * chunks, (requires, shared, mode, seen.gemms)
            assert seen.largest <= max(2 * token_chunk * V, V * H), "something of the size of all logits"


def test_a_shared_head_is_the_same_kl() -> None:
    t = {name: value.detach() for name, value in tensors().items()}
    ref_hidden = torch.randn(N, H)
    results = []
    for ref_weight, ref_bias in ((t["weight"], t["bias"]), (t["weight"].clone(), t["bias"].clone())):
        h, w, b = (t[name].clone().requires_grad_() if ref_weight is not t["weight"] else t[name].requires_grad_() for name in ("hidden", "weight", "bias"))
        loss = fasttax.linear_token_kl(h, w, ref_hidden, ref_weight.detach(), bias=b, ref_bias=ref_bias.detach(), reduction="mean", token_chunk=5)
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


def test_autocast_does_not_round_the_logits() -> None:
    t = tensors()
    losses = []
    for mode in ("forward", "recompute"):
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), reduction="mean", grad_mode=mode))
    for loss in losses:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


def test_auto_recomputes_where_the_forward_cannot() -> None:
    half = {name: value.detach().half().requires_grad_() for name, value in tensors().items()}
    fasttax.linear_token_kl(*(half[name] for name in NAMES[:4]), reduction="mean").backward()
    assert half["weight"].grad.isfinite().all()
    t, token_weight = tensors(), torch.rand(N, requires_grad=True)
    fasttax.linear_token_kl(*(t[name] for name in NAMES[:4]), token_weight=token_weight, reduction="mean").backward()
    assert token_weight.grad.abs().min() > 0
    assert fasttax.linear_token_kl(*(t[name].detach() for name in NAMES[:4]), grad_mode="forward").shape == (N,)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_mixed_dtypes(mode: str) -> None:
    """A bfloat16 model against a float32 reference, and anything with float64."""
    t = {name: value.detach() for name, value in tensors().items()}
    for change, dtype in (({"hidden": torch.bfloat16, "weight": torch.bfloat16}, torch.float32), ({"ref_weight": torch.float64}, torch.float64),
                          ({"bias": torch.float64}, torch.float64)):  # fmt: skip
        w = {name: value.to(change.get(name, torch.float32)).requires_grad_() for name, value in t.items()}
        loss = fasttax.linear_token_kl(*(w[name] for name in NAMES[:4]), bias=w["bias"], ref_bias=w["ref_bias"], reduction="mean", grad_mode=mode)
        assert loss.dtype == dtype
        wide = {name: value.detach().double().requires_grad_() for name, value in w.items()}
        truth = fasttax.token_kl(
            wide["hidden"] @ wide["weight"].T + wide["bias"], wide["ref_hidden"] @ wide["ref_weight"].T + wide["ref_bias"], reduction="mean"
        )
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        for name, d, e in zip(NAMES, torch.autograd.grad(loss, list(w.values())), torch.autograd.grad(truth, list(wide.values())), strict=True):
            assert d.dtype == change.get(name, torch.float32)
            torch.testing.assert_close(d, e.to(d.dtype), rtol=2**-7 if d.dtype == torch.bfloat16 else 1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def refused() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "per_token": ({"reduction": "none"}, "weights are not known"),
        "entropy": ({"reduction": "mean", "return_entropy": True}, "return_entropy"),
        "token_weight": ({"reduction": "mean", "token_weight": torch.rand(N, requires_grad=True)}, "weights require grad"),
    }


@pytest.mark.parametrize("case", refused())
def test_wrong_combinations_are_refused(case: str) -> None:
    options, reason = refused()[case]
    with pytest.raises(ValueError, match=f"linear_token_kl: grad_mode: expected 'auto' or 'recompute', got 'forward'.*{reason}"):
        fasttax.linear_token_kl(*(tensors()[name] for name in NAMES[:4]), grad_mode="forward", **options)


# --- vocabulary over two processes -----------------------------------------------------------------------------------------

CUTS = (0, 22, V)  # uneven shards


def shard(rank: int, folder: Path) -> None:
    part, group, t, ids = slice(CUTS[rank], CUTS[rank + 1]), dist.group.WORLD, tensors(torch.float64), torch.arange(N) * 2
    x, y = (t["hidden"] @ t["weight"].T).detach(), (t["ref_hidden"] @ t["ref_weight"].T).detach()
    a, b = x[:, part].clone().requires_grad_(), y[:, part].clone().requires_grad_()
    kl = fasttax.token_kl(a, b, kind="jsd", tp_group=group)
    stats = fasttax.token_stats(a, b, ids, outputs=("logp", "entropy", "k3"), tp_group=group)
    (kl + stats.logp + stats.entropy + stats.k3).mul(upstream()).sum().backward()
    local = {name: (t[name][part] if name in ("weight", "ref_weight", "bias", "ref_bias") else t[name]).detach().clone().requires_grad_() for name in NAMES}
    linear, d_linear = fused(local, token_chunk=5, tp_group=group)
    torch.save({"kl": kl.detach(), "logp": stats.logp.detach(), "da": a.grad, "db": b.grad, "linear": linear, "d_linear": d_linear}, folder / f"{rank}.pt")


def test_tensor_parallel(tmp_path: Path) -> None:
    """Both ranks have the single process's values; a shard's gradient is its slice, not the slice times the world size."""
    on_ranks(shard, tmp_path)
    t, ids = tensors(torch.float64), torch.arange(N) * 2
    x = (t["hidden"] @ t["weight"].T).detach().requires_grad_()
    y = (t["ref_hidden"] @ t["ref_weight"].T).detach().requires_grad_()
    kl = fasttax.token_kl(x, y, kind="jsd")
    stats = fasttax.token_stats(x, y, ids, outputs=("logp", "entropy", "k3"))
    (kl + stats.logp + stats.entropy + stats.k3).mul(upstream()).sum().backward()
    linear, d_linear = materialised(t, torch.float64)
    for rank in (0, 1):
        part, got = slice(CUTS[rank], CUTS[rank + 1]), torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close((got["kl"], got["logp"], got["da"], got["db"]), (kl, stats.logp, x.grad[:, part], y.grad[:, part]), check_stride=False)
        torch.testing.assert_close(got["linear"], linear)
        for name, g, d in zip(NAMES, got["d_linear"], d_linear, strict=True):
            torch.testing.assert_close(g, d if name in ("hidden", "ref_hidden") else d[part], msg=lambda m, n=name: f"{n}: {m}")


# --- wrong calls -----------------------------------------------------------------------------------------------------------

HID, W, IDS = torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(2, dtype=torch.long)
WRONG: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "head": ("linear_token_kl", (HID, W.T, HID, W), {}, ValueError, ["weight", "(V, 4)", "(4, 7)"]),
    "ref_head": ("linear_token_kl", (HID, W, HID, W[:, :3]), {}, ValueError, ["ref_weight", "(V, 4)", "(7, 3)"]),
    "vocabulary": ("linear_token_kl", (HID, W, HID, W[:6]), {}, ValueError, ["ref_weight", "vocabulary of 7", "(6, 4)"]),
    "tokens": ("linear_token_kl", (HID, W, HID[:1], W), {}, ValueError, ["ref_hidden", "(2,)", "(1, 4)"]),
    "bias": ("linear_token_kl", (HID, W, HID, W), {"bias": torch.zeros(6)}, ValueError, ["bias", "(7,)", "(6,)"]),
    "device": ("linear_token_kl", (HID, W.to("meta"), HID, W), {}, ValueError, ["weight", "cpu", "meta"]),
    "not_a_tensor": ("linear_token_kl", ([[0.0]], W, HID, W), {}, TypeError, ["hidden", "torch.Tensor"]),
    "chunk": ("linear_token_kl", (HID, W, HID, W), {"token_chunk": 0}, ValueError, ["token_chunk", ">= 1", "0"]),
    "vocab_chunk": ("linear_token_kl", (HID, W, HID, W), {"vocab_chunk": 1.5}, ValueError, ["vocab_chunk", "integer", "1.5"]),
    "grad_mode": ("linear_token_kl", (HID, W, HID, W), {"grad_mode": "fast"}, ValueError, ["grad_mode", "'auto'", "'fast'"]),
    "kind": ("linear_token_kl", (HID, W, HID, W), {"kind": "fkl"}, ValueError, ["kind", "'jsd'", "'fkl'"]),
    "empty_vocabulary": ("linear_token_kl", (HID, W[:0], HID, W[:0]), {}, ValueError, ["weight", "(0, 4)"]),
    "ids_shape": ("linear_token_logprobs", (HID, W, IDS[:1]), {}, ValueError, ["ids", "(2,)", "(1,)"]),
    "ids_range": ("linear_token_logprobs", (HID, W, IDS + 7), {}, IndexError, ["ids", "[0, 7)", "7 to 7"]),
    "output": ("linear_token_logprobs", (HID, W, IDS), {"outputs": ("kl",)}, ValueError, ["'kl'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    op, tensors, options, error, texts = WRONG[case]
    with pytest.raises(error) as raised:
        getattr(fasttax, op)(*tensors, **options)
    for text in ("expected", "got", *texts):
        assert text in str(raised.value), str(raised.value)
