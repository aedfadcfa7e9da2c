"""Batches without tokens, and results that do not depend on who stands beside a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasttax
from tests.tools.kl_cases import KINDS
from tests.tools.processes import on_ranks


def _views() -> list[Tensor]:
    return [
        torch.randn(0, 130)[:, ::2],
        torch.randn(4, 130)[:0, ::2],
        torch.randn(65, 0).T,
        torch.randn(2, 0, 130)[..., ::2],
        torch.randn(0, 65),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str, dtype: torch.dtype) -> None:
    for view in _views():
        x, y = view.to(dtype).requires_grad_(), view.to(dtype).requires_grad_()
        options: dict[str, Any] = {"kind": kind}
        for reduction in ("none", "sum", "mean"):
            kl = fasttax.token_kl(x, y, reduction=reduction, **options)
            assert kl.shape == (view.shape[:-1] if reduction == "none" else ())
            for d in torch.autograd.grad(kl.sum(), (x, y)):
                assert d.shape == view.shape
        ids = torch.zeros(view.shape[:-1], dtype=torch.int64)
        stats = fasttax.token_stats(x, y, ids, outputs=("logp", "entropy", "kl_policy_ref", "k3"))
        assert stats.logp is not None
        assert stats.logp.shape == view.shape[:-1]
        logp, top = fasttax.topk_logprobs(y.detach(), 3)
        if kind != "renyi":
            assert fasttax.topk_kl(x, logp, top, kind=kind).shape == view.shape[:-1]


def _over_ranks(tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Every op that takes a tp_group, with shards of 7 of a vocabulary of 14 on each of 2 ranks."""
    group, x, y = (
        dist.group.WORLD,
        torch.randn(tokens, 7, requires_grad=True),
        torch.randn(tokens, 7),
    )
    h, w, ids = x[:, :4], torch.randn(7, 4), torch.zeros(tokens, dtype=torch.int64)

    def stats() -> Tensor:
        found = fasttax.token_stats(x, y, ids, outputs=("logp", "entropy", "kl"), tp_group=group)
        return torch.stack([t for t in (found.logp, found.entropy, found.kl) if t is not None])

    def logprobs() -> Tensor:
        found = fasttax.linear_token_logprobs(h, w, ids, tp_group=group).logp
        assert found is not None
        return found

    ops: dict[str, Callable[[], Tensor]] = {"stats": stats, "logprobs": logprobs}
    for kind in ("policy_ref", "ref_policy", "jsd"):
        for reduction in ("none", "sum", "mean"):
            options: dict[str, Any] = {"kind": kind, "reduction": reduction, "tp_group": group}
            ops[f"token_kl {kind} {reduction}"] = partial(fasttax.token_kl, x, y, **options)
            linear: Callable[..., Tensor] = fasttax.linear_token_kl
            ops[f"linear {kind} {reduction}"] = partial(
                linear, h, w, h.detach() + 0.1, w, **options
            )
    return ops


def _empty_micro_batches(rank: int, folder: Path) -> None:
    for mine in ((0, 5), (5, 0), (300, 256)):
        for op in _over_ranks(mine[rank]).values():
            with pytest.raises(
                ValueError, match=rf"tp_group: .*same tokens.*got {mine[0]}, {mine[1]} tokens"
            ):
                op()
    for name, op in _over_ranks(0).items():
        value = op()
        assert not value.numel() or float(value) == 0, name
        value.sum().backward()
    for name, op in _over_ranks(3).items():  # the group is as it was
        assert bool(op().isfinite().all()), name


def test_an_empty_micro_batch_over_ranks(tmp_path: Path) -> None:
    """On every rank an empty result; on one alone an error of all, where collectives would hang."""
    on_ranks(_empty_micro_batches, tmp_path)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocab_chunk", [128, 333, 999])
@pytest.mark.parametrize("kind", ["policy_ref", "ref_policy", "jsd"])
def test_tiles_of_the_vocabulary_are_batch_invariant(
    kind: str, vocab_chunk: int, entropy: bool
) -> None:
    V, H, N = 1000, 24, 21
    w, h = torch.randn(V, H) * 0.3, torch.randn(N, H)
    ref_w, ref_h = w + 0.02 * torch.randn(V, H), h + 0.05 * torch.randn(N, H)

    def of(rows: slice) -> list[Tensor]:
        a, b = h[rows].clone().requires_grad_(), ref_h[rows].clone().requires_grad_()
        out = fasttax.linear_token_kl(
            a, w, b, ref_w, kind=kind, vocab_chunk=vocab_chunk, return_entropy=entropy
        )
        values = torch.stack(out) if entropy else out[None]
        return [*values.detach(), *torch.autograd.grad(values.sum(), (a, b))]

    whole = of(slice(None))
    for rows in (slice(0, 1), slice(3, 8), slice(1, N), slice(N - 1, N), slice(7, 16)):
        for part, all_rows in zip(of(rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows]), rows
