"""The KL family on every kind of data (bench/logits.py), forward and backward.

A case's contenders are the kinds, and what they are held against, "fasttax", is the same op on
equal rows: a ratio is how many times longer a kind takes. The last case is token_kl itself beside
its costlier siblings, on a real model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fasttax
from bench import logits
from bench.bench_kl import fused_stats
from bench.timing import Case
from fasttax.cli.bench import fused_kl, step

SHAPE, N, V = "128 x 49152", 128, 49152
EQUAL = "equal"


def _kl(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    value: Tensor = fasttax.token_kl(x, y, reduction="mean", **options)
    return value


def _stats(x: Tensor, y: Tensor) -> Tensor:
    return fused_stats(x, y, torch.arange(x.shape[0]))


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_kl": fused_kl,
    "token_kl of kind ref_policy": partial(_kl, kind="ref_policy"),
    "token_kl of kind jsd": partial(_kl, kind="jsd"),
    "token_kl, softcap 30": partial(_kl, softcap=30.0, ref_softcap=30.0),
    "token_stats": _stats,
}


def _pair(kind: str, dtype: torch.dtype) -> logits.Pair:
    """In memory of its own, whose pages are alike for every kind."""
    own = []
    for rows in logits.pair(kind, N, V, dtype):
        like = torch.empty(N, V, dtype=dtype)
        torch.ops.fasttax._prefer_huge_pages(like)
        own.append(like.copy_(rows))
    return own[0], own[1]


def cases() -> Iterator[Case]:
    """Floor: both logits read, one gradient written."""
    for dtype in (torch.float32, torch.bfloat16):
        pairs = {kind: _pair(kind, dtype) for kind in logits.KINDS}
        width = str(dtype).removeprefix("torch.")
        floor = 3 * N * V * dtype.itemsize
        for name, op in OPS.items():
            calls: dict[str, Callable[[], Any]] = {
                kind: step(op, (x,), (y,)) for kind, (x, y) in pairs.items() if kind != EQUAL
            }
            x, y = pairs[EQUAL]
            calls["fasttax"] = step(op, (x,), (y,))
            yield Case(
                f"{name} by kind of data, {width}",
                SHAPE,
                calls,
                floor_bytes=floor,
                rounds=15,
                headline=False,
            )
        x, y = pairs[logits.TRAINED]
        calls = {name: step(op, (x,), (y,)) for name, op in OPS.items() if op is not fused_kl}
        calls["fasttax"] = step(fused_kl, (x,), (y,))
        yield Case(
            f"token_kl and its siblings on {logits.TRAINED}, {width}",
            SHAPE,
            calls,
            floor_bytes=floor,
            rounds=15,
            headline=False,
        )
