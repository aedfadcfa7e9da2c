"""Whether a checkpoint of sums is of the estimation that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COUNTS = ("examples", "tokens", "batches")
SUMS = ("sum", "left", "right", "tokens")  # what names of sums in a file begin with


def differing(
    facts: Mapping[str, Any],
    sums: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """A line for each fact and each sum that differs in a file; versions may.

    A fact that an earlier version did not write down is taken to be the same.

    Args:
        facts: of the estimation.
        sums: its own, by the names that a file has for them.
        metadata: the file's.
        tensors: the file's.
    """
    found = [
        f"{k}: {metadata[k]!r} in the file, {v!r} here"
        for k, v in facts.items()
        if k not in ("fasttax", "torch") and metadata.get(k, v) != v
    ]
    here = {n: tuple(t.shape) for n, t in sums.items()}
    stored = {n: tuple(t.shape) for n, t in tensors.items() if n.partition(".")[0] in SUMS}
    for n in sorted({*stored, *here}):
        there, mine = stored.get(n, "missing"), here.get(n, "missing")
        if there != mine:
            found.append(f"{n.removeprefix('sum.')}: {there} in the file, {mine} here")
    return found


def lacking(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], error: Mapping[str, Tensor]
) -> str:
    """What of a checkpoint's state is missing or no such thing, "" for nothing.

    Args:
        metadata: the file's.
        tensors: the file's.
        error: the running sums of the sampling error, as the estimation has them.
    """
    for name in COUNTS:
        count = metadata.get(name)
        if type(count) is not int or count < 0:
            return name
    for name, mine in error.items():
        found = tensors.get(f"error.{name}")
        if found is None or found.shape != mine.shape or found.dtype != mine.dtype:
            return f"error.{name}"
    generator = tensors.get("generator")
    if generator is None or generator.dtype != torch.uint8 or generator.dim() != 1:
        return "generator"
    return ""
