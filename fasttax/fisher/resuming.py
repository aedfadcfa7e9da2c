"""Whether a checkpoint of sums is of the estimation that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
