"""The linear ops chunk by chunk: tiles of the vocabulary, as ops under torch.compile, checkpointing
and torch.func, half-width GEMMs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fasttax
from fasttax._base import gemm as base_gemm
from fasttax.kl import linear_sweep
from fasttax.kl.call import tempering
from fasttax.kl.linear_chunks import Asked
from fasttax.kl.linear_sweep import Inputs, Tensors
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
from tests.tools.utils import assert_within, own_result, peak_bytes, relative_error

INF = math.inf

# tiles of the vocabulary


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
# one column a tile, a tile of one column
@pytest.mark.parametrize("chunks", [(None, 10), (5, 1), (4, 36), (1, 7)])
def test_tiles_against_materialised_logits(
    chunks: tuple[int | None, int], dtype: torch.dtype, option: str
) -> None:
    t = tensors(dtype)
    out, got = fused(t, token_chunk=chunks[0], vocab_chunk=chunks[1], **OPTIONS[option])
    truth, d_truth = materialised(t, torch.float64, **OPTIONS[option])
    own, d_own = materialised(t, torch.float32, **OPTIONS[option])
    for o, w, d, name in zip(
        (out, *got), (own, *d_own), (truth, *d_truth), ("value", *NAMES), strict=True
    ):
        assert_within(o, own_result(w, d, o.dtype), d, name=name)


@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy"])
def test_tiles_keep_what_whole_rows_promise(kind: str) -> None:
    """Equal logits are exactly 0 with exactly zero gradients; a small KL keeps its digits; entries
    of -inf in both models are nothing.
    """
    h, w = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    kl = fasttax.linear_token_kl(h, w, h.detach(), w.detach().clone(), kind=kind, vocab_chunk=10)
    assert kl.tolist() == [0.0] * N
    assert all(not d.any() for d in torch.autograd.grad(kl.sum(), (h, w)))
    near = (w * (1 + 5e-4 * torch.randn(V, H))).detach()
    kl = fasttax.linear_token_kl(h, w, h.detach(), near, kind=kind, vocab_chunk=10)
    truth = fasttax.token_kl(h.double() @ w.double().T, h.double() @ near.double().T, kind=kind)
    assert 1e-8 < truth.median() < 1e-5
    torch.testing.assert_close(kl.double(), truth, rtol=1e-3, atol=2e-10)
    bias = torch.randn(V).masked_fill(torch.arange(V) % 3 == 0, -INF)
    bias[10:20] = -INF  # a whole tile
    got = fasttax.linear_token_kl(
        h, w, h.detach() + 0.1, near, bias=bias, ref_bias=bias, kind=kind, vocab_chunk=10
    )
    whole = fasttax.linear_token_kl(
        h, w, h.detach() + 0.1, near, bias=bias, ref_bias=bias, kind=kind
    )
    torch.testing.assert_close(
        (got, *torch.autograd.grad(got.sum(), (h, w))),
        (whole, *torch.autograd.grad(whole.sum(), (h, w))),
        rtol=1e-4,
        atol=1e-5,
    )


def test_tiles_of_logprobs_and_entropy() -> None:
    t, ids, mask = (
        tensors(torch.float64),
        torch.tensor([0, 9, 10, 19, 20, 29, 30, 36, 5, 15, 25, 35, 36]),
        torch.arange(N) % 5 != 3,
    )
    outputs, options = (
        ("logp", "entropy", "lse"),
        {"temperature": 0.7, "softcap": 9.0, "mask": mask},
    )
    stats = fasttax.linear_token_logprobs(
        t["hidden"],
        t["weight"],
        ids,
        bias=t["bias"],
        outputs=outputs,
        token_chunk=4,
        vocab_chunk=10,
        **options,
    )
    kl, entropy = fasttax.linear_token_kl(
        *(t[n] for n in NAMES[:4]), return_entropy=True, vocab_chunk=10, mask=mask
    )
    x, y = t["hidden"] @ t["weight"].T, t["ref_hidden"] @ t["ref_weight"].T
    whole = fasttax.token_stats(x + t["bias"], None, ids, outputs=outputs, **options)
    pair = fasttax.token_stats(x, y, outputs=("kl", "entropy"), mask=mask)
    for got, truth in (
        (stats.logp, whole.logp),
        (stats.entropy, whole.entropy),
        (stats.lse, whole.lse),
        (kl, pair.kl),
        (entropy, pair.entropy),
    ):
        torch.testing.assert_close(got, truth)
        inputs = [t["hidden"], t["weight"]]
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs, upstream().double(), retain_graph=True),
            torch.autograd.grad(truth, inputs, upstream().double(), retain_graph=True),
        )


@pytest.mark.parametrize(
    ("option", "inf"), [("plain", "propagate"), ("jsd", "propagate"), ("plain", "mask")]
)
def test_vocab_chunk_bounds_the_logits(
    option: str, inf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No logits beyond token_chunk x vocab_chunk; where whole rows are needed, fewer tokens."""
    sizes, real = [], linear_sweep.Projection.project

    def seen(self: Any, hidden: Tensor, columns: slice, buffer: Tensor) -> Tensor:
        logits = real(self, hidden, columns, buffer)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(linear_sweep.Projection, "project", seen)
    fused(tensors(), token_chunk=6, vocab_chunk=10, inf=inf, **OPTIONS[option])
    assert max(sizes) <= 6 * 10


def test_memory_of_tiles() -> None:
    V, H, n = 8192, 8, 512
    h, w, rh, rw = torch.randn(n, H), torch.randn(V, H), torch.randn(n, H), torch.randn(V, H)
    peak = peak_bytes(
        lambda: (
            fasttax.linear_token_kl(h, w.requires_grad_(), rh, rw, token_chunk=256, vocab_chunk=512)
            .sum()
            .backward()
        )
    )
    # rows, their merge and its gradient, what is kept of them, for every tile
    per_token = 4 * (V // 512) * (8 * 6 + 2 * 30)
    assert peak <= 4 * 512 * (256 + 128) + 2 * 4 * 512 * 256 + 4 * V * H + n * per_token + (
        64 << 10
    ), peak
    assert peak < 4 * n * V


# gradients, compilers, transforms

CHUNKED: dict[str, dict[str, Any]] = {
    "rows": {"token_chunk": 2},
    "tiles": {"vocab_chunk": 3, "kind": "ref_policy"},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "entropy": {"return_entropy": True, "token_chunk": 2},
    "tiled_entropy": {"return_entropy": True, "vocab_chunk": 3},
}


def small(n: int = 3) -> list[Tensor]:
    return [
        torch.randn(shape, dtype=torch.float64).requires_grad_()
        for shape in ((n, 2), (7, 2), (n, 3), (7, 3), (7,), (7,))
    ]


def kl_of(*t: Tensor, **options: Any) -> Any:
    return fasttax.linear_token_kl(*t[:4], bias=t[4], ref_bias=t[5], **options)


@pytest.mark.parametrize("case", CHUNKED)
def test_gradcheck(case: str) -> None:
    assert torch.autograd.gradcheck(lambda *t: kl_of(*t, **CHUNKED[case]), small())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vocab_chunk", [None, 3])
def test_gradcheck_of_logprobs(vocab_chunk: int | None, reduction: str) -> None:
    h, w, _, _, b, _ = small()

    def values(*t: Tensor) -> tuple[Tensor, ...]:
        stats = fasttax.linear_token_logprobs(
            t[0],
            t[1],
            torch.tensor([6, 0, 3]),
            bias=t[2],
            outputs=("logp", "entropy", "lse"),
            vocab_chunk=vocab_chunk,
            reduction=reduction,
            softcap=3.0,
        )
        return stats.logp, stats.entropy, stats.lse

    assert torch.autograd.gradcheck(values, (h, w, b))


@pytest.mark.parametrize(
    "asked",
    [
        Asked(kl=True, token_chunk=2),
        Asked(kl=True, stats=True),
        Asked(kl=True, gemm_dtype=torch.bfloat16),
        Asked(stats=True, pair=True, token_chunk=2, vocab_chunk=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [5, 0])
def test_opcheck(n: int, asked: Asked) -> None:
    tensors = [t.detach().float().requires_grad_(i != 2) for i, t in enumerate(small(n))]
    ids, mask, t = torch.arange(n), torch.arange(n) % 2 == 0, tempering("test", temperature=0.7)
    rest = Inputs(Tensors(*tensors), ids, mask, t, asked).args()[len(tensors) :]
    torch.library.opcheck(torch.ops.fasttax.linear_token_rows, (*tensors, *rest))
    rows, *saved = torch.ops.fasttax.linear_token_rows(*(t.detach() for t in tensors), *rest)
    if not asked.pair:
        total = (
            torch.rand(n),
            *(t.requires_grad_(i != 2) for i, t in enumerate(tensors)),
            *rest,
            6 if asked.kl else 2,
            [True, True, False, True, True, True],
        )
        torch.library.opcheck(torch.ops.fasttax.linear_token_total, total)
    args = (
        torch.rand_like(rows),
        *saved,
        *(t.detach() for t in tensors),
        *rest,
        [True, True, False, True, True, False],
    )
    torch.library.opcheck(torch.ops.fasttax.linear_token_rows_backward, args)


def test_compile_once_for_every_number_of_tokens() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def loss(*t: Tensor) -> Tensor:
        ids = torch.zeros(t[0].shape[0], dtype=torch.long)
        logp = fasttax.linear_token_logprobs(t[0], t[1], ids, reduction="sum").logp
        return (
            kl_of(*t, token_chunk=4, reduction="mean", grad_mode="forward")
            + kl_of(*t, vocab_chunk=3).sum()
            + logp
        )

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    first = 0
    for n in (5, 9, 40):
        t = small(n)
        out, eager = compiled(*t), loss(*t)
        # two: the first has the options' floats as symbols, finds that an op wants numbers, and is
        # dropped
        first = first or len(graphs)
        torch.testing.assert_close(
            (out, *torch.autograd.grad(out, t)), (eager, *torch.autograd.grad(eager, t))
        )
    assert 1 <= first == len(graphs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{"reduction": "mean"}, {}, {"vocab_chunk": 3}], ids=str)
def test_activation_checkpointing_around_it(options: dict[str, Any], use_reentrant: bool) -> None:
    t = small(5)
    truth = torch.autograd.grad(kl_of(*t, **options).sum(), t)
    checkpoint(lambda *t: kl_of(*t, **options).sum(), *t, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in t), truth)


# vmap over the op is a loop
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func() -> None:
    t = small(5)
    truth = torch.autograd.grad(kl_of(*t).sum(), t)
    plain = [leaf.detach() for leaf in t]
    torch.testing.assert_close(
        torch.func.grad(lambda *t: kl_of(*t).sum(), argnums=(0, 1, 2, 3, 4, 5))(*plain), truth
    )
    torch.testing.assert_close(
        torch.func.grad(lambda *t: kl_of(*t, reduction="sum"), argnums=(0, 1, 2, 3, 4, 5))(*plain),
        truth,
    )
    h, rh = torch.randn(2, 5, 2, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    batched = torch.vmap(lambda h, rh: kl_of(h, plain[1], rh, *plain[3:]))(h, rh)
    torch.testing.assert_close(batched, kl_of(h, plain[1], rh, *plain[3:]))


def test_second_derivatives_of_a_recompute_are_refused() -> None:
    t = small()
    (d,) = torch.autograd.grad(kl_of(*t).sum(), t[0], create_graph=True)
    with pytest.raises(
        RuntimeError,
        match="linear_token_kl or linear_token_logprobs: second derivatives are not available",
    ):
        d.sum().backward()


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(n: int, mode: str) -> None:
    t = [leaf.detach().requires_grad_() for leaf in small(n)]
    loss = kl_of(*t, reduction="mean", grad_mode=mode)
    stats = fasttax.linear_token_logprobs(
        t[0], t[1], torch.zeros(n, dtype=torch.long), reduction="mean", grad_mode=mode
    )
    grads = torch.autograd.grad(loss + stats.logp, t)
    if n:
        x, y = t[0] @ t[1].T, t[2] @ t[3].T
        whole = (
            fasttax.token_kl(x + t[4], y + t[5]).sum()
            + fasttax.token_stats(x, None, torch.zeros(1, dtype=torch.long)).logp.sum()
        )
        torch.testing.assert_close(grads, torch.autograd.grad(whole, t))
    else:
        assert loss.item() == stats.logp.item() == 0
        assert all(d.shape == leaf.shape and not d.any() for d, leaf in zip(grads, t, strict=True))


# half-width GEMMs


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_gemms_of_half_width_operands(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of NVIDIA GPUs, with its GEMMs (float32 sums of bfloat16 operands) done by the CPU:
    logits and what is whole in one product are rounded once, what adds up over chunks at the end.
    """
    t = {name: value.detach().bfloat16().requires_grad_() for name, value in tensors().items()}
    monkeypatch.setattr(linear_sweep, "narrow_gemm", lambda device: True)
    monkeypatch.setattr(linear_sweep, "mixed_gemm", lambda device: False)
    operands = set()
    real = base_gemm.gemm

    def seen(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        operands.add((a.dtype, b.dtype, out.dtype))
        real(a, b, out, add)

    monkeypatch.setattr(linear_sweep, "gemm", seen)
    kl = fasttax.linear_token_kl(
        *(t[n] for n in NAMES[:4]),
        bias=t["bias"],
        ref_bias=t["ref_bias"],
        reduction="sum",
        grad_mode=mode,
        token_chunk=5,
    )
    got = torch.autograd.grad(kl, list(t.values()))
    bf16 = torch.bfloat16
    assert operands == {(bf16, bf16, bf16), (bf16, bf16, torch.float32)}

    def whole(leaves: dict[str, Tensor]) -> Tensor:
        x, y = (
            torch.nn.functional.linear(*(leaves[model + n] for n in ("hidden", "weight", "bias")))
            for model in ("", "ref_")
        )
        return fasttax.token_kl(x, y, reduction="sum")

    wide = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    truth, own = whole(wide), whole(t)
    assert_within(kl, own, truth)
    for name, d, e, o in zip(
        NAMES,
        got,
        torch.autograd.grad(truth, list(wide.values())),
        torch.autograd.grad(own, list(t.values())),
        strict=True,
    ):
        assert d.dtype == torch.bfloat16
        assert_within(d, o, e, name=name)
        # a rounding of the logits, of the operand, and one of the result: 2^-9 each
        assert relative_error(d, e) <= 2 * relative_error(o, e) + 2**-9, name


def test_a_narrow_hidden_state_before_a_wide_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 hidden states and a float32 head: the head is not rounded to meet them."""
    h, w, rh, rw = (
        torch.randn(N, H).bfloat16(),
        torch.randn(V, H),
        torch.randn(N, R).bfloat16(),
        torch.randn(V, R),
    )
    monkeypatch.setattr(linear_sweep, "narrow_gemm", lambda device: True)
    monkeypatch.setattr(linear_sweep, "mixed_gemm", lambda device: False)
    got = fasttax.linear_token_kl(h, w, rh, rw)
    torch.testing.assert_close(
        got, fasttax.token_kl(h.float() @ w.T, rh.float() @ rw.T), rtol=1e-5, atol=1e-6
    )
