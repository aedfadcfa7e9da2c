"""token_kl and token_stats: forward and backward to a fresh gradient, and forward alone.

On a real model's logits (bench/logits.py); bench_kinds.py has the other kinds of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fasttax
from bench import baselines, logits, workloads
from bench.timing import Case
from fasttax.cli.bench import fused_kl, step

STATS = ("logp", "entropy", "kl_policy_ref", "kl_ref_policy")
SIMD = {1: "AVX2", 0: "portable"}


def tokens(x: Tensor, y: Tensor) -> Tensor:
    """A KL for every token, whose gradient comes in the backward."""
    return fasttax.token_kl(x, y).sum()


def fused_stats(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """Everything that one sweep over both rows gives."""
    stats = fasttax.token_stats(x, y, ids, outputs=STATS)
    return torch.stack([getattr(stats, name) for name in STATS]).sum()


def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], None]:
    """A call without a graph."""

    def call() -> None:
        with torch.no_grad():
            function(*tensors)

    return call


def at_level(level: int, function: Callable[[], None]) -> Callable[[], None]:
    """A call on another instruction set than the best."""

    def call() -> None:
        best = torch.ops.fasttax._simd_level(-1)
        torch.ops.fasttax._simd_level(level)
        function()
        torch.ops.fasttax._simd_level(best)

    return call


def cases() -> Iterator[Case]:
    """Floor: both logits read, and in the backward one gradient written."""
    compiled, compiled_stats = (
        baselines.compiled(baselines.eager_kl),
        baselines.compiled(baselines.eager_stats),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for shape, n, v in workloads.KL:
            x, y = logits.pair(logits.TRAINED, n, v, dtype)
            ids = torch.randint(v, (n,))
            size, name = x.numel() * x.element_size(), str(dtype).removeprefix("torch.")
            eager = step(baselines.eager_kl, (x,), (y,))
            # read both logits and write one gradient, once each
            contenders = {
                "eager": eager,
                "torch.compile": step(compiled, (x,), (y,)),
                "fasttax": step(fused_kl, (x,), (y,)),
            }
            yield Case(
                f"token_kl forward+backward, {name}", shape, contenders, floor_bytes=3 * size
            )
            contenders = {
                "eager": forward(baselines.eager_kl, x, y),
                "torch.compile": forward(compiled, x, y),
                "fasttax": forward(fused_kl, x, y),
            }
            yield Case(
                f"token_kl forward only, {name}",
                shape,
                contenders,
                floor_bytes=2 * size,
                headline=False,
            )
            contenders = {
                "eager": step(baselines.eager_stats, (x,), (y, ids)),
                "torch.compile": step(compiled_stats, (x,), (y, ids)),
                "token_kl alone": step(tokens, (x,), (y,)),
                "fasttax": step(fused_stats, (x,), (y, ids)),
            }
            first = v == workloads.KL[0][2]
            yield Case(
                f"token_stats (logp, entropy, both KLs) forward+backward, {name}",
                shape,
                contenders,
                floor_bytes=5 * size,
                headline=first,
            )
            for level in SIMD if first else ():
                if level < torch.ops.fasttax._simd_level(-1):
                    contenders = {
                        "eager": eager,
                        "fasttax": at_level(level, step(fused_kl, (x,), (y,))),
                    }
                    yield Case(
                        f"token_kl forward+backward, {name}, {SIMD[level]}",
                        shape,
                        contenders,
                        floor_bytes=3 * size,
                        headline=False,
                    )
