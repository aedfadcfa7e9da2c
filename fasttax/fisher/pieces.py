"""What taps leave for a parameter, and how it becomes squares.

The sum over a unit's rows first, over all uses of the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fasttax._base.gemm import gemm
from fasttax.fisher import ops
from fasttax.fisher.passes import WAY_OUT

_CHUNK = 256  # tokens of the head's closed form at a time


@dataclass
class Rows:
    """One use of a parameter: gradient rows `d` (R, O), what the parameter met there, and the
    units' boundaries over the rows.

    kind: "linear" (x (R, I): G = d^T x), "embedding" (x ids (R,): rows of d by id), "scale" (x (R,
        O): sum of d * x), "bias"
    (sum of d), or "head": "linear" or "bias" whose square is taken over all labels, `score` (R, V)
    being softmax - onehot.
    """

    kind: str
    bounds: Tensor
    d: Tensor
    x: Tensor | None = None
    score: Tensor | None = None
    parallel: bool = False  # d and x are this rank's features of a tensor-parallel layer


@dataclass
class HeadRows:
    """The head's gradient in the rows that each unit's own tokens touch.

    `whole`: their squares are not in the sum yet.
    """

    keys: Tensor  # (2, U): unit, id
    rows: Tensor  # (U, H)
    whole: bool


def _fit(x: Tensor, out: Tensor) -> Tensor:
    """In out's class: float64 for float64 sums, at most float32 for others."""
    return x.to(out.dtype) if torch.float64 in (x.dtype, out.dtype) and x.dtype != out.dtype else x


def add_squares(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """Sums += weight * grads^2, in a call for each device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for total, grad in zip(sums, grads, strict=True):
        totals, gradients = by_device.setdefault(total.device, ([], []))
        totals.append(total)
        gradients.append(_fit(grad, total))
    for totals, gradients in by_device.values():
        ops.accumulate_sqgrad_(totals, gradients, weight)


def merged(pieces: list[Rows], name: str) -> Rows:
    """Several uses of one parameter as one: rows of the same unit side by side."""
    if len(pieces) == 1:
        return pieces[0]
    if len({p.bounds.numel() for p in pieces}) > 1:
        raise ValueError(
            f"DiagonalFisher: {name} is used on different numbers of units (tokens), whose squares "
            f"do not add up; {WAY_OUT}"
        )
    first = pieces[0]
    units = torch.cat(
        [
            torch.repeat_interleave(torch.arange(p.bounds.numel() - 1), p.bounds.diff())
            for p in pieces
        ]
    )
    order = units.argsort(stable=True)
    bounds = torch.cat(
        (
            torch.zeros(1, dtype=torch.int64),
            torch.bincount(units, minlength=first.bounds.numel() - 1).cumsum(0),
        )
    )
    order = order.to(first.d.device)
    x = None if first.x is None else torch.cat([p.x for p in pieces if p.x is not None])[order]
    return Rows(
        first.kind, bounds, torch.cat([p.d for p in pieces])[order], x, parallel=first.parallel
    )


def accumulate(
    out: Tensor, name: str, pieces: list[Rows | HeadRows], weight: float | None, tied: str
) -> None:
    """Adds to `out` the squares of the parameter's whole gradient, summed over its uses, unit by
    unit.
    """
    waiting = [p for p in pieces if isinstance(p, HeadRows)]
    by_kind: dict[str, list[Rows]] = {}
    for p in pieces:
        if isinstance(p, Rows):
            by_kind.setdefault(p.kind, []).append(p)
    kinds = {*by_kind}
    if tied == "sum_of_squares" and len(kinds) > 1:
        for one in by_kind.values():
            accumulate(out, name, [*one], weight, tied)
        return
    if waiting:
        embedding = merged(by_kind["embedding"], name) if "embedding" in kinds else None
        _finish_tied(out, name, waiting[0], embedding, weight)
    elif kinds == {"linear", "embedding"}:
        linear, embedding = merged(by_kind["linear"], name), merged(by_kind["embedding"], name)
        _add(out, linear, weight)
        assert embedding.x is not None
        _finish_tied(
            out, name, head_rows(linear, embedding.x, embedding.bounds, out), embedding, weight
        )
    elif len(kinds) == 1:
        _add(out, merged(by_kind[kinds.pop()], name), weight)
    else:
        raise ValueError(
            f"DiagonalFisher: {name} is used in ways that have no common rule "
            f"({', '.join(sorted(kinds))}); {WAY_OUT}"
        )


def _example_weight(weight: float | None, bounds: Tensor, out: Tensor) -> Tensor | None:
    return (
        None
        if weight is None
        else torch.full((bounds.numel() - 1,), weight, dtype=out.dtype, device=out.device)
    )


def _add(out: Tensor, p: Rows, weight: float | None) -> None:
    each = _example_weight(weight, p.bounds, out)
    d, x = _fit(p.d, out), p.x
    if p.kind == "bias":
        ops.bias_sqgrad(d, cu_seqlens=p.bounds, example_weight=each, out=out)
    elif p.kind == "head":
        closed_form(out, p, weight, None)
    elif p.kind == "embedding":
        assert x is not None
        ops.embedding_sqgrad(x, d, out.shape[0], cu_seqlens=p.bounds, example_weight=each, out=out)
    else:
        assert x is not None
        if p.kind == "scale":
            ops.norm_sqgrad(_fit(x, out), d, cu_seqlens=p.bounds, example_weight=each, out=out)
        else:
            ops.linear_sqgrad(
                _fit(x, out),
                d,
                cu_seqlens=p.bounds,
                example_weight=each,
                out=out.view(d.shape[1], x.shape[1]),
            )


def closed_form(out: Tensor, p: Rows, weight: float | None, skip: Tensor | None) -> None:
    """E over labels of the head's square, tokens summed.

    (p (1 - p) r^2)^T (x * x), r = d / score the slope between head and logits.

    |score| (1 - |score|) is p (1 - p) whichever the label was. `skip` (2, U): (unit, id) pairs that
    are left out.
    """
    score = p.score
    assert score is not None
    factor = 1.0 if weight is None else weight
    same = p.d.shape == score.shape and torch.allclose(
        p.d.float(), score.to(p.d.dtype).float(), rtol=4 * torch.finfo(p.d.dtype).eps, atol=1e-30
    )
    unit = torch.repeat_interleave(torch.arange(p.bounds.numel() - 1), p.bounds.diff()).to(
        p.d.device
    )
    for start in range(0, score.shape[0], _CHUNK):
        s = score[start : start + _CHUNK]
        q = s.abs().mul_(1 - s.abs())
        if not same:
            ratio = p.d[start : start + _CHUNK].to(s.dtype) / s
            q *= torch.where(s == 0, 0.0, ratio).square_()
        if skip is not None:
            units, counts = unit[start : start + _CHUNK].unique_consecutive(return_counts=True)
            stops = counts.cumsum(0).tolist()
            for n, begin, end in zip(units.tolist(), [0, *stops], stops, strict=False):
                q[begin:end].index_fill_(1, skip[1, skip[0] == n], 0.0)
        q = q.to(out.dtype)
        if p.x is None:
            out += factor * q.sum(0)
        else:
            gemm(
                q.mul_(factor).T, p.x[start : start + _CHUNK].to(out.dtype).square(), out, add=True
            )


def head_rows(
    p: Rows, ids: Tensor, bounds: Tensor, out: Tensor, *, whole: bool = False
) -> HeadRows:
    """G_h in the rows that each unit's tokens touch.

    U x H numbers a unit, where a whole gradient has V x H.
    """
    assert p.x is not None
    flat = ids.flatten()
    keys, _ = ops.embedding_rows(
        "DiagonalFisher",
        flat,
        torch.zeros(flat.numel(), 1, device=flat.device),
        bounds,
        out.shape[0],
    )
    rows = torch.zeros(keys.shape[1], out.shape[1], dtype=out.dtype, device=out.device)
    of_unit = torch.bincount(keys[0].cpu(), minlength=p.bounds.numel() - 1).cumsum(0).tolist()
    a, d = _fit(p.x, out), _fit(p.d, out)
    for n, (begin, end) in enumerate(pairwise(p.bounds.tolist())):
        mine = slice(of_unit[n - 1] if n else 0, of_unit[n])
        if end > begin and mine.stop > mine.start:
            rows[mine] = d[begin:end].index_select(1, keys[1, mine]).T.to(out.dtype) @ a[
                begin:end
            ].to(out.dtype)
    return HeadRows(keys, rows, whole)


def _finish_tied(
    out: Tensor, name: str, head: HeadRows, embedding: Rows | None, weight: float | None
) -> None:
    """(G_e + G_h)^2 = G_h^2 (in the sum already, unless `whole`) + G_e^2 + 2 G_e G_h, which is 0
    but in the tokens' own rows.
    """
    if embedding is None:
        rows = torch.zeros_like(head.rows)
    else:
        assert embedding.x is not None
        keys, rows = ops.embedding_rows(
            "DiagonalFisher", embedding.x, _fit(embedding.d, out), embedding.bounds, out.shape[0]
        )
        if not torch.equal(keys, head.keys):
            raise RuntimeError(
                f"DiagonalFisher: {name}: the tied head and the embedding saw different tokens; "
                "pass tied='sum_of_squares'"
            )
    square = (rows + head.rows).square_() if head.whole else rows * (rows + 2 * head.rows)
    out.index_add_(0, head.keys[1], square.to(out.dtype), alpha=1.0 if weight is None else weight)
