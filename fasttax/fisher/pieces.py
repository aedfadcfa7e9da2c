"""What taps leave for a parameter, and how it becomes squares.

A unit's gradient is summed over the unit's tokens and over all uses of the parameter first, and
squared then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fasttax._base import waits
from fasttax._base.gemm import gemm
from fasttax.fisher import ops
from fasttax.fisher.layout import WAY_OUT

_CHUNK = 256  # tokens of the head's closed form at a time


@dataclass
class Piece:
    """One use of a parameter: gradients at R outputs, what the parameter met there, and the units.

    Attributes:
        kind: how d and x make the gradient G of a unit:
            "linear" G = d^T x, x (R, I); "embedding" rows of d added by id, x (R,) ids;
            "scale" the sum of d * x, x (R, O); "bias" the sum of d;
            "head" that of "linear" (with x) or "bias" (without), squared over all labels.
        bounds: (units + 1,) int64 on the CPU over the R outputs.
        d: (R, O).
        score: (R, V), softmax - onehot at the logits, for "head".
        parallel: d and x are this rank's features of a tensor-parallel layer.
    """

    kind: str
    bounds: Tensor
    d: Tensor
    x: Tensor | None = None
    score: Tensor | None = None
    parallel: bool = False

    def met(self) -> Tensor:
        """What the parameter met, x."""
        assert self.x is not None, self.kind
        return self.x

    def units(self) -> Tensor:
        """(R,) on the CPU: the unit of each output."""
        return torch.arange(self.bounds.numel() - 1, device="cpu").repeat_interleave(
            self.bounds.diff()
        )


@dataclass
class TiedHead:
    """A tied head's gradient in the rows of the ids that each unit's own tokens touch.

    Elsewhere the embedding has no gradient to meet, and the head's square stands alone.

    Attributes:
        keys: (2, U), unit and id.
        rows: (U, H).
        whole: the squares of these rows are not in the sum yet.
    """

    keys: Tensor
    rows: Tensor
    whole: bool


def _fit(x: Tensor, out: Tensor) -> Tensor:
    """`x` as kernels take it beside `out`: float64 for float64 sums, at most float32 for others."""
    if torch.float64 in (x.dtype, out.dtype):
        return x.to(out.dtype)
    return x


def add_squares(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """`sums` += weight * grads^2, in a call for each device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for total, grad in zip(sums, grads, strict=True):
        totals, gradients = by_device.setdefault(total.device, ([], []))
        totals.append(total)
        gradients.append(_fit(grad, total))
    for totals, gradients in by_device.values():
        ops.accumulate_sqgrad_(totals, gradients, weight)


def gradient_of(p: Piece, shape: torch.Size) -> Tensor:
    """What the piece adds to the parameter's gradient over all units, float32 (float64).

    Args:
        p: of any kind; of "head" for the label that was drawn.
        shape: the parameter's.
    """
    dtype = torch.float64 if p.d.dtype == torch.float64 else torch.float32
    d = p.d.to(dtype)
    if p.kind == "bias" or p.x is None:
        return d.sum(0).view(shape)
    if p.kind == "scale":
        return (d * p.met().to(dtype)).sum(0).view(shape)
    if p.kind == "embedding":
        return d.new_zeros(shape).index_add_(0, p.met(), d)
    return (d.T @ p.met().to(dtype)).view(shape)


def combine(pieces: list[Piece], name: str) -> Piece:
    """Several uses of one parameter as one: outputs of the same unit side by side.

    Raises:
        ValueError: the uses have different numbers of units.
    """
    if len(pieces) == 1:
        return pieces[0]
    if len({p.bounds.numel() for p in pieces}) > 1:
        raise ValueError(
            f"DiagonalFisher: {name} is used on different numbers of units (tokens), whose squares "
            f"do not add up; {WAY_OUT}"
        )
    first = pieces[0]
    units = torch.cat([p.units() for p in pieces])
    counts = torch.bincount(units, minlength=first.bounds.numel() - 1)
    order = waits.over(units.argsort(stable=True), first.d.device)
    joined = Piece(
        first.kind,
        _bounds(counts),
        torch.cat([p.d for p in pieces])[order],
        parallel=first.parallel,
    )
    if first.x is not None:
        joined.x = torch.cat([p.met() for p in pieces])[order]
    return joined


def _bounds(counts: Tensor) -> Tensor:
    """Boundaries of runs of the given lengths: 0 and the running sums."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def accumulate(
    out: Tensor, name: str, pieces: Sequence[Piece | TiedHead], weight: float, tied: str
) -> None:
    """Adds to `out` the squares of the parameter's whole gradient, unit by unit.

    Args:
        out: the sum of `name`.
        name: the parameter, for errors.
        pieces: all of its uses in one backward.
        weight: of a square.
        tied: "exact" sums the uses before squaring, "sum_of_squares" squares kind by kind.

    Raises:
        ValueError: the uses have no common rule.
    """
    waiting = [p for p in pieces if isinstance(p, TiedHead)]
    by_kind: dict[str, list[Piece]] = {}
    for p in pieces:
        if isinstance(p, Piece):
            by_kind.setdefault(p.kind, []).append(p)
    combined = {kind: combine(uses, name) for kind, uses in by_kind.items()}
    kinds = set(combined)
    if waiting:
        _add_tied(out, name, waiting[0], combined.get("embedding"), weight)
    elif len(kinds) == 1 or tied == "sum_of_squares":
        for piece in combined.values():
            _ADD[piece.kind](out, piece, weight)
    elif kinds == {"linear", "embedding"}:
        head, embedding = combined["linear"], combined["embedding"]
        _add_linear(out, head, weight)
        touched = tied_head(head, embedding.met(), embedding.bounds, out)
        _add_tied(out, name, touched, embedding, weight)
    else:
        raise ValueError(
            f"DiagonalFisher: {name} is used in ways that have no common rule "
            f"({', '.join(sorted(kinds))}); {WAY_OUT}"
        )


# --- one kind's squares ---------------------------------------------------------------------------


def _weights(weight: float, bounds: Tensor, out: Tensor) -> Tensor | None:
    """One weight a unit, as the ops take it; None for 1."""
    if weight == 1.0:
        return None
    return torch.full((bounds.numel() - 1,), weight, dtype=out.dtype, device=out.device)


def _add_bias(out: Tensor, p: Piece, weight: float) -> None:
    each = _weights(weight, p.bounds, out)
    ops.bias_sqgrad(_fit(p.d, out), cu_seqlens=ops.runs(p.bounds), example_weight=each, out=out)


def _add_scale(out: Tensor, p: Piece, weight: float) -> None:
    x, d, each = _fit(p.met(), out), _fit(p.d, out), _weights(weight, p.bounds, out)
    ops.norm_sqgrad(x, d, cu_seqlens=ops.runs(p.bounds), example_weight=each, out=out)


def _add_embedding(out: Tensor, p: Piece, weight: float) -> None:
    d, each = _fit(p.d, out), _weights(weight, p.bounds, out)
    ops.embedding_sqgrad(
        p.met(), d, out.shape[0], cu_seqlens=ops.runs(p.bounds), example_weight=each, out=out
    )


def _add_linear(out: Tensor, p: Piece, weight: float) -> None:
    x, d, each = _fit(p.met(), out), _fit(p.d, out), _weights(weight, p.bounds, out)
    flat = out.view(d.shape[1], x.shape[1])  # a convolution's kernel has more dimensions
    ops.linear_sqgrad(x, d, cu_seqlens=ops.runs(p.bounds), example_weight=each, out=flat)


def add_head(out: Tensor, p: Piece, weight: float, skip: Tensor | None = None) -> None:
    """The mean over labels of the head's square, tokens summed.

    (p (1 - p) r^2)^T (x * x), r = d / score the slope between the head's output and the logits;
    |score| (1 - |score|) is p (1 - p) whichever the label was.

    Args:
        out: the sum, (V, H) or of a bias (V,).
        p: of kind "head".
        weight: of a square.
        skip: (2, U), pairs (unit, id) that are left out.
    """
    unit = waits.over(p.units(), p.d.device)
    for chunk, s, slope in head_slopes(p):
        q = s.abs().mul_(1 - s.abs()).mul_(slope.square_())
        if skip is not None:
            _clear(q, unit[chunk], skip)
        q = q.to(out.dtype).mul_(weight)
        if p.x is None:
            out += q.sum(0)
        else:
            gemm(q.T, p.x[chunk].to(out.dtype).square(), out, add=True)


def head_slopes(p: Piece) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A head's tokens by chunks, for the mean over labels.

    Yields:
        Which tokens, their scores, and the slopes d / score between the head's output and the
        logits: 1 where the two are one, 0 at a score of 0.
    """
    score = p.score
    assert score is not None
    as_it_is = _is_the_score(p, score)
    for start in range(0, score.shape[0], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        s = score[chunk]
        slope = torch.where(s == 0, 0.0, p.d[chunk].to(s.dtype) / s)
        yield chunk, s, torch.where(as_it_is, 1.0, slope)


def _is_the_score(p: Piece, score: Tensor) -> Tensor:
    """Whether the gradient at a head's output is the score at the logits, 0-d on its device."""
    if p.d.shape != score.shape:
        return torch.zeros((), dtype=torch.bool, device=score.device)
    same = score.to(p.d.dtype).float()
    slack = 4 * torch.finfo(p.d.dtype).eps * same.abs() + 1e-30
    return ((p.d.float() - same).abs() <= slack).all()


def _clear(q: Tensor, unit: Tensor, skip: Tensor) -> None:
    """Zeros in q (R, V) at the ids that `skip` (2, U) names for the unit of each output."""
    units, counts = unit.unique_consecutive(return_counts=True)
    begin = 0
    for n, count in zip(units.tolist(), counts.tolist(), strict=True):
        q[begin : begin + count].index_fill_(1, skip[1, skip[0] == n], 0.0)
        begin += count


_ADD: dict[str, Callable[[Tensor, Piece, float], None]] = {
    "bias": _add_bias,
    "scale": _add_scale,
    "embedding": _add_embedding,
    "linear": _add_linear,
    "head": add_head,
}


# --- an embedding and a head that share a weight --------------------------------------------------


def tied_head(
    head: Piece, ids: Tensor, bounds: Tensor, out: Tensor, *, whole: bool = False
) -> TiedHead:
    """The head's gradient in the rows that each unit's tokens touch.

    U x H numbers, where the whole gradient of every unit has V x H.

    Args:
        head: what the head left, of kind "linear" or "head".
        ids: the embedding's ids, whose `bounds` give the units.
        bounds: (units + 1,).
        out: the weight's sum (V, H).
        whole: see TiedHead.
    """
    flat = ids.flatten()
    nothing = torch.zeros(flat.numel(), 1, device=flat.device)
    keys, _ = ops.embedding_rows("DiagonalFisher", flat, nothing, bounds, out.shape[0])
    rows = torch.zeros(keys.shape[1], out.shape[1], dtype=out.dtype, device=out.device)
    touched = torch.bincount(keys[0].cpu(), minlength=head.bounds.numel() - 1)
    stops = pairwise(_bounds(touched).tolist())
    x, d = _fit(head.met(), out), _fit(head.d, out)
    for (begin, end), (first, last) in zip(pairwise(head.bounds.tolist()), stops, strict=True):
        if end > begin and last > first:
            mine = d[begin:end].index_select(1, keys[1, first:last]).T
            rows[first:last] = mine.to(out.dtype) @ x[begin:end].to(out.dtype)
    return TiedHead(keys, rows, whole)


def _add_tied(
    out: Tensor, name: str, head: TiedHead, embedding: Piece | None, weight: float
) -> None:
    """Completes a tied weight's square where its embedding and its head meet.

    (G_e + G_h)^2 = G_h^2 (in the sum already, unless `head.whole`) + G_e^2 + 2 G_e G_h, which is 0
    but in the tokens' own rows.

    Raises:
        RuntimeError: the embedding saw other tokens than the head was prepared for.
    """
    rows = torch.zeros_like(head.rows)
    if embedding is not None:
        d = _fit(embedding.d, out)
        keys, rows = ops.embedding_rows(
            "DiagonalFisher", embedding.met(), d, embedding.bounds, out.shape[0]
        )
        if not torch.equal(keys, head.keys):
            raise RuntimeError(
                f"DiagonalFisher: {name}: the tied head and the embedding saw different tokens; "
                "pass tied='sum_of_squares'"
            )
    square = (rows + head.rows).square_() if head.whole else rows * (rows + 2 * head.rows)
    out.index_add_(0, head.keys[1], square.to(out.dtype), alpha=weight)
