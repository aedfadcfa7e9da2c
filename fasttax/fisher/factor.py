"""Factors of a Kronecker product: symmetric positive semi-definite matrices, whole or cut down.

A factor of n rows is a tensor of shape (n, n); (k, n/k, n/k), k blocks on its diagonal; or (n,),
its diagonal. A weight's block of the Fisher is left (x) right, `left` of the weight's rows and
`right` of its columns: the quadratic form of a change D of the weight is <D, left D right>.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PANELS = 8  # of a symmetric product: 36 of its 64 blocks are computed
SMALL = 512  # rows of a factor that is one product, whose panels would cost more than they save


def shape_of(n: int, max_dim: int) -> tuple[int, ...]:
    """Of a factor of n rows no block of which has more than `max_dim`.

    Whole, or in the fewest blocks of one size; a diagonal where those would be less than a quarter
    of what is allowed (a prime n has none).
    """
    if n <= max_dim:
        return (n, n)
    fewest = -(-n // max_dim)
    for k in range(fewest, 4 * fewest + 1):
        if n % k == 0:
            return (k, n // k, n // k)
    return (n,)


def rows_of(factor: Tensor) -> int:
    """How many rows of a weight it is for."""
    return factor.shape[0] if factor.dim() < 3 else factor.shape[0] * factor.shape[1]


def problem_of(factor: Tensor) -> str:
    """What makes it no factor, "" for nothing. Eigenvalues below 0 are not looked for."""
    if factor.dtype not in (torch.float32, torch.float64):
        return f"dtype {factor.dtype}, not float32 or float64"
    square = factor.dim() == 1 or factor.shape[-1] == factor.shape[-2:][0]
    if not 1 <= factor.dim() <= 3 or not square:
        return f"shape {tuple(factor.shape)}, not (n, n), (k, n/k, n/k) or (n,)"
    if not bool(torch.isfinite(factor).all()) or bool((diagonal(factor) < 0).any()):
        return "values that are not finite, or a diagonal below 0"
    if factor.dim() > 1 and not torch.equal(factor, factor.mT):
        return "not symmetric"
    return ""


def times(factor: Tensor, m: Tensor) -> Tensor:
    """The product factor @ m, m (n, c)."""
    if factor.dim() == 1:
        return factor[:, None] * m
    if factor.dim() == 2:
        return factor @ m
    return (factor @ m.view(factor.shape[0], factor.shape[1], -1)).view(m.shape)


def between(left: Tensor, m: Tensor, right: Tensor) -> Tensor:
    """The product left @ m @ right."""
    return times(right, times(left, m).T.contiguous()).T


def diagonal(factor: Tensor) -> Tensor:
    """(n,)."""
    return factor if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).reshape(-1)


def inner(one: Tensor, other: Tensor) -> float:
    """The sum of the products of their entries; both are cut down alike."""
    return float((one.double() * other.double()).sum())


def gram_(out: Tensor, rows: Tensor, weight: float) -> None:
    """Adds to a factor weight * rows^T rows, of rows (R, n) in its dtype.

    Of a large matrix only what lies on and below the diagonal's panels; `completed` fills the rest.
    """
    if out.dim() == 1:
        out.add_(rows.square().sum(0), alpha=weight)
    elif out.dim() == 3:
        for block, columns in zip(out, rows.split(out.shape[1], 1), strict=True):
            gram_(block, columns, weight)
    elif out.shape[0] <= SMALL:
        out.addmm_(rows.T, rows, alpha=weight)
    else:
        step = -(-out.shape[0] // PANELS)
        for begin in range(0, out.shape[0], step):
            end = min(begin + step, out.shape[0])
            out[begin:end, :end].addmm_(rows[:, begin:end].T, rows[:, :end], alpha=weight)


def completed(factor: Tensor) -> Tensor:
    """A copy, symmetric to the bit, of what `gram_` has added up."""
    if factor.dim() == 1:
        return factor.clone()
    lower = factor.tril()
    return lower + factor.tril(-1).mT


def eigen(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Its eigenvalues (n,) >= 0 and eigenvectors, cut down as it is; None: the coordinates.

    In float64, whatever its dtype. Eigenvalues that the rounding of its entries cannot tell from 0
    (n eps times the largest) are 0, so that a direction that no example uses stays free under any
    strength.
    """
    if factor.dim() == 1:
        return factor.double(), None
    values, vectors = torch.linalg.eigh(factor.double())
    noise = factor.shape[-1] * torch.finfo(factor.dtype).eps * values.max()
    return torch.where(values > noise, values, 0.0).reshape(-1), vectors


def turned(vectors: Tensor | None, m: Tensor, *, back: bool = False) -> Tensor:
    """The coordinates of m's rows (n, c) in the basis of eigenvectors; `back` from there."""
    if vectors is None:
        return m
    return times(vectors if back else vectors.mT, m)


def nearest(
    terms: Sequence[tuple[float, tuple[Tensor, Tensor]]],
) -> tuple[tuple[Tensor, Tensor], float]:
    """(left, right) nearest in Frobenius' norm to sum w_k left_k (x) right_k, and how near it is.

    Van Loan and Pitsianis 1993, "Approximation with Kronecker products": the best rank 1 of a
    matrix of the factors' entries, which lies in the span of the terms. All weights are >= 0, so
    that the two are positive semi-definite as the terms are.

    Returns:
        The pair, and the norm of what is left out over the norm of the sum.
    """
    lefts = [left for _, (left, _) in terms]
    rights = [right for _, (_, right) in terms]
    weights = torch.tensor([w for w, _ in terms], dtype=torch.float64, device="cpu").diag()
    gram_left, gram_right = _inners(lefts), weights @ _inners(rights) @ weights
    square = float((gram_left * gram_right).sum())
    if square == 0:
        return (torch.zeros_like(lefts[0]), rights[0].clone()), 0.0
    # with M = sum w_k vec(left_k) vec(right_k)^T: u = sum a_k left_k of norm 1 maximises |M^T u|
    values, vectors = torch.linalg.eigh(gram_left)
    root = values.clamp_min(0).sqrt()
    half = vectors * root @ vectors.mT
    found, candidates = torch.linalg.eigh(half @ gram_right @ half)
    inverse = torch.where(root > 1e-12 * root.max(), 1 / root, 0.0)
    a = vectors * inverse @ vectors.mT @ candidates[:, -1]
    if float((gram_left @ a).sum()) < 0:
        a = -a
    left, right = _mixed(a, lefts), _mixed(weights @ gram_left @ a, rights)
    return (left, right), max(0.0, 1 - float(found[-1]) / square) ** 0.5


def _inners(factors: Sequence[Tensor]) -> Tensor:
    """(K, K) float64 on the CPU: every inner product."""
    rows = [[inner(one, other) for other in factors] for one in factors]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _mixed(shares: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Their sum by shares, in the first one's dtype."""
    parts = [s * f.double() for s, f in zip(shares.tolist(), factors, strict=True)]
    return torch.stack(parts).sum(0).to(factors[0].dtype)
