"""The linear ops under autocast and of half-width tensors: what their GEMMs multiply, how close
that is to PyTorch's own, and what a GPU's path does to a chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import fasttax
from fasttax._base import gemm as base_gemm
from fasttax.kl import linear_chunks, linear_sweep
from tests.tools.linear_cases import NAMES, H, N, R, V, tensors, upstream
from tests.tools.processes import on_ranks
from tests.tools.utils import assert_within, relative_error

HALVES = [torch.bfloat16, torch.float16]
WAYS: dict[str, dict[str, Any]] = {
    "forward": {"reduction": "sum"},
    "recompute": {"grad_mode": "recompute"},
    "chunks": {"reduction": "sum", "token_chunk": 5},
    "tiles": {"vocab_chunk": 10},
    "entropy": {"return_entropy": True},
}


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def truly(t: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """In float64, hidden states and heads as autocast rounds them."""
    rounded = {n: v if "bias" in n else v.to(dtype) for n, v in t.items()}
    return {name: value.detach().double().requires_grad_() for name, value in rounded.items()}


def fused(t: dict[str, Tensor], **options: Any) -> Tensor:
    kl = fasttax.linear_token_kl(
        *(t[n] for n in NAMES[:4]),
        bias=t["bias"],
        ref_bias=t["ref_bias"],
        token_weight=upstream(),
        **options,
    )
    return sum(value.sum() for value in kl) if isinstance(kl, tuple) else kl.sum()


def materialised(t: dict[str, Tensor], entropy: bool) -> Tensor:
    """The same of whole logits, as autocast has torch's own multiply."""
    x = linear(t["hidden"], t["weight"], t["bias"])
    y = linear(t["ref_hidden"], t["ref_weight"], t["ref_bias"])
    weight = upstream().to(t["hidden"].dtype)
    stats = fasttax.token_stats(x, y, outputs=("kl", "entropy"), weight=weight, reduction="sum")
    return stats.kl + stats.entropy if entropy else stats.kl


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_as_close_as_pytorch_under_autocast(dtype: torch.dtype, way: str) -> None:
    """float32 leaves and results; the backward runs outside of autocast, as a trainer's does."""
    t = tensors()
    with autocast(dtype):
        got, own = fused(t, **WAYS[way]), materialised(t, way == "entropy")
    wide = truly(t, dtype)
    truth = materialised(wide, way == "entropy")
    assert got.dtype == torch.float32
    assert_within(got, own, truth)
    for name, d, e, o in zip(
        NAMES,
        torch.autograd.grad(got, [t[n] for n in NAMES]),
        torch.autograd.grad(truth, [wide[n] for n in NAMES]),
        torch.autograd.grad(own, [t[n] for n in NAMES]),
        strict=True,
    ):
        assert d.dtype == torch.float32
        assert_within(d, o, e, name=name)


@pytest.mark.parametrize("way", WAYS)
def test_is_the_call_on_rounded_operands(way: str) -> None:
    t = tensors()
    with autocast():
        got = fused(t, **WAYS[way])
    rounded = {n: v.detach() if "bias" in n else v.detach().bfloat16() for n, v in t.items()}
    assert torch.equal(got, fused(rounded, **WAYS[way]))
    assert not torch.equal(got, fused(t, **WAYS[way]))


@pytest.mark.parametrize("grad_mode", ["forward", "recompute"])
@pytest.mark.parametrize("output", ["logp", "entropy", "lse"])
def test_logprobs_under_autocast(output: str, grad_mode: str) -> None:
    t, ids = tensors(), torch.arange(N)

    def whole(t: dict[str, Tensor]) -> Tensor:
        x = linear(t["hidden"], t["weight"], t["bias"])
        return getattr(fasttax.token_stats(x, None, ids, outputs=(output,)), output).sum()

    with autocast():
        stats = fasttax.linear_token_logprobs(
            t["hidden"],
            t["weight"],
            ids,
            bias=t["bias"],
            outputs=(output,),
            reduction="sum",
            grad_mode=grad_mode,
            token_chunk=4,
        )
        own = whole(t)
    got, wide = getattr(stats, output), truly(t)
    leaves = ("hidden", "weight", "bias")
    truth = whole(wide)
    assert got.dtype == torch.float32
    assert_within(got, own, truth)
    for name, d, e, o in zip(
        leaves,
        torch.autograd.grad(got, [t[n] for n in leaves]),
        torch.autograd.grad(truth, [wide[n] for n in leaves]),
        torch.autograd.grad(own, [t[n] for n in leaves]),
        strict=True,
    ):
        assert d.dtype == torch.float32
        assert_within(d, o, e, name=name)


def test_equal_models_and_small_differences_under_autocast() -> None:
    """On a CPU the logits are not rounded: a small KL of rounded operands keeps its digits."""
    h, w = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    near = (w + 2e-2 * torch.randn(V, H)).detach()
    with autocast():
        same = fasttax.linear_token_kl(h, w, h.detach(), w.detach().clone())
        kl = fasttax.linear_token_kl(h, w, h.detach(), near)
    assert same.tolist() == [0.0] * N
    assert all(not d.any() for d in torch.autograd.grad(same.sum(), (h, w)))
    x, y = (h.bfloat16().double() @ head.bfloat16().double().T for head in (w, near))
    torch.testing.assert_close(kl.double(), fasttax.token_kl(x, y), rtol=1e-3, atol=2e-10)


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """The operands' dtypes of every product."""
    seen: list[tuple[torch.dtype, ...]] = []
    gemm, project = base_gemm.gemm, base_gemm.project

    def watched(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        seen.append((a.dtype, b.dtype))
        gemm(a, b, out, add)

    def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        seen.append((hidden.dtype, weight.dtype))
        return project(hidden, weight, bias, out)

    monkeypatch.setattr(linear_sweep, "gemm", watched)
    monkeypatch.setattr(linear_sweep, "project", projected)
    return seen


@pytest.mark.parametrize(("grad_mode", "products"), [("forward", 4), ("recompute", 6)])
@pytest.mark.parametrize("given", ["float32 under autocast", "bfloat16"])
def test_products_of_bfloat16(
    given: str,
    grad_mode: str,
    products: int,
    operands: list[tuple[torch.dtype, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those back take a rounded gradient where the CPU multiplies bfloat16 faster."""
    t = {name: value.detach() for name, value in tensors().items()}
    if given == "bfloat16":
        t = {name: value.bfloat16() for name, value in t.items()}
    t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    for fast in (False, True):
        monkeypatch.setattr(linear_sweep, "bf16_gemm", lambda device, fast=fast: fast)
        operands.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=given != "bfloat16"):
            loss = fused(t, reduction="mean", grad_mode=grad_mode)
        loss.backward()
        assert len(operands) == products
        bf16, rounded = torch.bfloat16, torch.bfloat16 if fast else torch.float32
        assert operands.count((rounded, bf16)) == (products if fast else 2)
        assert set(operands) == {(bf16, bf16), (rounded, bf16)}


def test_autocast_leaves_float64_alone(operands: list[tuple[torch.dtype, ...]]) -> None:
    t = tensors(torch.float64)
    with autocast():
        got = fasttax.linear_token_kl(*(t[n] for n in NAMES[:4]))
    assert set(operands) == {(torch.float64, torch.float64)}
    assert got.dtype == torch.float64
    assert torch.equal(got, fasttax.linear_token_kl(*(t[n] for n in NAMES[:4])))


def test_float16_gradients_wait_for_the_scale() -> None:
    t = tensors()
    with autocast(torch.float16):
        loss = fasttax.linear_token_kl(*(t[n] for n in NAMES[:4]), reduction="mean")
        with pytest.raises(ValueError, match="float16 gradient would underflow"):
            fasttax.linear_token_kl(
                *(t[n] for n in NAMES[:4]), reduction="mean", grad_mode="forward"
            )
    for d in torch.autograd.grad(loss, [t[n] for n in NAMES[:4]], torch.tensor(1e-6)):
        assert d.dtype == torch.float32
        assert d.abs().max() > 0


def test_chunks_meet_in_float32() -> None:
    """A float32 head under autocast: 512 chunks of one token lose no more than one chunk."""
    h, w, rh, rw = (torch.randn(n, 16) for n in (512, 64, 512, 64))
    wide = w.bfloat16().double().requires_grad_()
    fasttax.token_kl(
        h.bfloat16().double() @ wide.T,
        rh.bfloat16().double() @ rw.bfloat16().double().T,
        reduction="sum",
    ).backward()
    errors = []
    for chunk in (512, 1):
        head = w.clone().requires_grad_()
        with autocast():
            loss = fasttax.linear_token_kl(h, head, rh, rw, token_chunk=chunk, reduction="sum")
        loss.backward()
        errors.append(relative_error(head.grad, wide.grad))
    assert errors[1] <= 1.5 * errors[0], errors


def test_one_chunk_rounds_a_bfloat16_head_once() -> None:
    """By products that round, or of float32 sums that are rounded after."""
    t = {name: value.detach().bfloat16() for name, value in tensors().items()}
    results = []
    for chunk in (None, 5):
        leaves = {name: value.clone().requires_grad_() for name, value in t.items()}
        fused(leaves, reduction="sum", token_chunk=chunk).backward()
        results.append([leaves[n].grad for n in NAMES])
    for name, one, other in zip(NAMES, *results, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-8 * float(one.abs().max()))
        assert relative_error(one, other) < 2**-8, name


# other ways to call it


def test_torch_compile_under_autocast() -> None:
    t = tensors()

    def loss(*t: Tensor) -> Tensor:
        with autocast():
            return fasttax.linear_token_kl(*t, reduction="mean") + fasttax.linear_token_kl(*t).sum()

    leaves = [t[n] for n in NAMES[:4]]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_eager)(*leaves)
    eager = loss(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)
    )


CUTS = (0, 22, V)


def shard(rank: int, folder: Path) -> None:
    part, t = slice(CUTS[rank], CUTS[rank + 1]), tensors()
    heads = ("weight", "ref_weight", "bias", "ref_bias")
    local = {n: (v[part] if n in heads else v).detach().requires_grad_() for n, v in t.items()}
    with autocast():
        kl = fused(local, tp_group=dist.group.WORLD, token_chunk=5)
    grads = torch.autograd.grad(kl, [local[n] for n in NAMES])
    torch.save((kl.detach(), grads), folder / f"{rank}.pt")


def test_tensor_parallel_under_autocast(tmp_path: Path) -> None:
    """As one process: rounded operands, gradients in float32."""
    on_ranks(shard, tmp_path)
    t = tensors()
    with autocast():
        whole = fused(t)
    grads = dict(zip(NAMES, torch.autograd.grad(whole, [t[n] for n in NAMES]), strict=True))
    for rank in (0, 1):
        kl, got = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(kl, whole.detach(), rtol=1e-5, atol=0)
        for name, d in zip(NAMES, got, strict=True):
            want = grads[name]
            if name not in ("hidden", "ref_hidden"):
                want = want[CUTS[rank] : CUTS[rank + 1]]
            assert d.dtype == torch.float32
            # both round the gradients of the logits, which differ in the last bit of float32
            assert relative_error(d, want) < 2**-8, name


# the path of NVIDIA GPUs, by the CPU


class Ops(TorchDispatchMode):
    """Every op, with the numbers of entries that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, torch.dtype | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[-1] if isinstance(result, tuple) else result
        size = first.numel() if isinstance(first, Tensor) else 0
        dtype = first.dtype if isinstance(first, Tensor) else None
        self.seen.append((str(func), size, dtype))
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_sweep, "narrow_gemm", lambda device: True)
    monkeypatch.setattr(linear_sweep, "mixed_gemm", lambda device: False)


def swept(t: dict[str, Tensor], grad_mode: str) -> list[tuple[str, int, torch.dtype | None]]:
    """The ops of a sweep with gradients of the policy's tensors, as no op hides them."""
    inputs = linear_sweep.Tensors(*(t[n].detach() for n in NAMES[:4]))
    asked = linear_chunks.Asked(kl=True, token_chunk=N)
    options = fasttax.kl.call.tempering("test")
    call = linear_sweep.Inputs(inputs, None, None, options, asked)
    needs = (True, True, False, False, False, False)
    with Ops() as ops:
        sweep = linear_sweep.Sweep(call, needs)
        d_rows = torch.zeros(8, 1, N)
        d_rows[6] = 1.0
        if grad_mode == "recompute":
            first = linear_sweep.Sweep(call)
            first.run(None)
            sweep.resume(first.results()[1:]).run(d_rows, fresh=False)
        else:
            sweep.run(d_rows)
        sweep.gradients()
    return ops.seen


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("grad_mode", ["forward", "recompute"])
def test_a_gpus_chunk_is_passed_over_by_its_ops_alone(
    grad_mode: str, dtype: torch.dtype, gpu: None
) -> None:
    """Logits in the operands' dtype, and no copy, cast or sum of a chunk's size."""
    t = {name: value.detach().to(dtype) for name, value in tensors().items()}
    seen = swept(t, grad_mode)
    assert not [name for name, size, kind in seen if size == N * V and kind == torch.float32]
    views = ("view", "slice", "select", "permute", "as_strided", "detach", "alias")
    own = [
        name
        for name, size, _ in seen
        if size == N * V and not any(view in name for view in (*views, "empty"))
    ]
    products = [name for name in own if "mm" in name]
    assert len(products) == (2 if grad_mode == "forward" else 4)
    assert all("fasttax" in name for name in own if name not in products), own


def test_a_gpus_chunks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """8192 tokens of Qwen's vocabulary on 80 GB; one piece of a chunk for each op."""
    monkeypatch.setattr(linear_chunks, "budget", lambda device: (80 << 30) // 32)
    for asked in (linear_chunks.Asked(kl=True), linear_chunks.Asked(stats=True)):
        for d_dtype in (None, torch.bfloat16):
            layout = linear_chunks.Layout(
                torch.device("cuda"), torch.bfloat16, False, d_dtype, False
            )
            size = linear_chunks.chunk_size(asked, layout, 8192, 151936)
            assert len(set(size)) == 1
            assert -(-8192 // size.tokens) <= 3


@pytest.mark.parametrize("reference", ["bfloat16", "float32"])
def test_a_gpus_path_is_as_close_as_pytorch(reference: str, gpu: None) -> None:
    """Of one dtype its logits are rounded, of mixed ones neither model's are."""
    t = {name: value.detach().bfloat16() for name, value in tensors().items()}
    if reference == "float32":
        t.update(ref_hidden=torch.randn(N, R), ref_weight=torch.randn(V, R))
    leaves = {name: value.requires_grad_("ref" not in name) for name, value in t.items()}
    names = ("hidden", "weight", "bias")

    def whole(t: dict[str, Tensor]) -> Tensor:
        x = linear(t["hidden"], t["weight"], t["bias"])
        y = linear(t["ref_hidden"], t["ref_weight"], t["ref_bias"].to(t["ref_weight"].dtype))
        return (fasttax.token_kl(x, y) * upstream().to(x.dtype)).sum()

    wide = {n: v.detach().double().requires_grad_("ref" not in n) for n, v in t.items()}
    truth, own = whole(wide), whole(leaves)
    for way in ("forward", "recompute", "chunks"):
        got = fused(leaves, **WAYS[way])
        assert_within(got, own, truth, name=way)
        for name, d, e, o in zip(
            names,
            torch.autograd.grad(got, [leaves[n] for n in names]),
            torch.autograd.grad(truth, [wide[n] for n in names], retain_graph=True),
            torch.autograd.grad(own, [leaves[n] for n in names], retain_graph=True),
            strict=True,
        ):
            assert_within(d, o, e, name=f"{way} {name}")
