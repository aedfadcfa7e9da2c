"""The sums of a Kronecker estimate: factors of linear layers' weights, squares of all others."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttax._base import checks, waits
from fasttax.fisher.factor import completed, diagonal, gram_, shape_of
from fasttax.fisher.passes import Pass
from fasttax.fisher.pieces import Piece, TiedHead, head_slopes
from fasttax.fisher.sums import Slot, Sums

ROUNDINGS = 32  # of float32 or float64: gradients of tokens below them, times the largest, are none


@dataclass
class FactorSum:
    """Sums over the tokens, of one weight.

    Attributes:
        left: of the weight's rows, right: of its columns.
        turned: rows are inputs, columns outputs; else the other way round.
        tokens: how many outer products the inputs' side has, weighed as they are; 0-d float64.
    """

    left: Tensor
    right: Tensor
    turned: bool
    tokens: Tensor

    def parts(self) -> dict[str, Tensor]:
        """By what a file calls them."""
        return {"left": self.left, "right": self.right, "tokens": self.tokens}

    def estimate(self, count: int) -> tuple[Tensor, Tensor]:
        """(A, G), G over `count` examples."""
        left, right = completed(self.left), completed(self.right)
        a, g = (left, right) if self.turned else (right, left)
        return (a / self.tokens.clamp_min(1e-30)).to(a.dtype), g / count


class FactoredSums(Sums):
    """As Sums; of the weights that only linear layers use, factors in place of squares.

    Attributes:
        max_dim: rows of a factor, or of a block of it.
        factors: the sums so far, by parameter.
    """

    def __init__(self, slots: Mapping[str, Slot], tied: str, weight: float, max_dim: int) -> None:
        super().__init__(slots, tied, weight)
        self.max_dim = max_dim
        self.factors: dict[str, FactorSum] = {}
        self._squaring = False
        self._met: tuple[Tensor, Tensor, Tensor] | None = None
        self._groups: list[Any] = []

    def settle(self) -> None:
        """Makes the factors, once the taps are known.

        Raises:
            ValueError: no parameter is a linear layer's weight.
        """
        self._groups = super().data_groups
        for name, slot in self.slots.items():
            taps = self.taps[name]
            one_way = len({tap.turned for tap in taps}) == 1
            if not one_way or not all(tap.factors(name) for tap in taps):
                continue
            rows, columns = slot.shape[0], slot.shape[1:].numel()
            left, right = (
                torch.zeros(shape_of(n, self.max_dim), dtype=slot.dtype, device=slot.device)
                for n in (rows, columns)
            )
            tokens = torch.zeros((), dtype=torch.float64, device=slot.device)
            self.factors[name] = FactorSum(left, right, taps[0].turned, tokens)
            self.shards.pop(name, None)
        if not self.factors:
            raise checks.fail(
                "estimate_fisher",
                "params",
                "the weight of at least one linear layer with structure='kron'",
                "none",
                "use structure='diagonal'",
            )

    @property
    def data_groups(self) -> list[Any]:
        """As of Sums, also where FSDP2 has sharded weights with factors alone."""
        return self._groups

    # --- one parameter's pieces -------------------------------------------------------------------

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Mapping[str, Tensor]]:
        """As of Sums: squares of every parameter, which is what taps are proven by.

        Yields:
            The sums.
        """
        self._squaring = True
        try:
            with super().scratch() as found:
                yield found
        finally:
            self._squaring = False

    def _add(self, name: str, pieces: Sequence[Piece | TiedHead]) -> None:
        if name not in self.factors or self._squaring:
            super()._add(name, pieces)
            return
        for piece in pieces:
            assert isinstance(piece, Piece), name
            if piece.parallel:
                raise ValueError(
                    f"DiagonalFisher: {name}: its features are split over ranks (tensor parallel), "
                    "and so would be its factors; use structure='diagonal'"
                )
            self._add_piece(self.factors[name], piece)

    def _add_piece(self, f: FactorSum, p: Piece) -> None:
        x, d = p.met(), p.d
        if f.turned:
            x, d = d, x
        met, given = (f.left, f.right) if f.turned else (f.right, f.left)
        reached = _reached(d)
        f.tokens += self.weight * reached.sum().double()
        met.add_(self._inputs(x, reached, met), alpha=self.weight)
        if p.kind == "head":
            _add_closed(given, p, self.weight)
        else:
            gram_(given, d.to(given.dtype), self.weight)

    def _inputs(self, x: Tensor, reached: Tensor, like: Tensor) -> Tensor:
        """The sum of x x^T over the tokens; what q, k and v, say, have met together is summed once.

        The tensors are kept until the next one, so that an address is of one tensor.
        """
        if self._met is not None:
            before, tokens, summed = self._met
            same = (x.data_ptr(), x.shape, x.stride()) == (
                before.data_ptr(),
                before.shape,
                before.stride(),
            )
            alike = summed.shape == like.shape and summed.dtype == like.dtype
            if same and alike and _same(tokens, reached):
                return summed
        rows = x.to(like.dtype).masked_fill(~reached[:, None], 0.0)
        summed = torch.zeros_like(like)
        gram_(summed, rows, 1.0)
        self._met = x, reached, summed
        return summed

    def finish(self, current: Pass) -> None:
        """As of Sums."""
        super().finish(current)
        self._met = None

    # --- the whole --------------------------------------------------------------------------------

    def watched(self, name: str) -> Tensor:
        """Of factors the diagonal of the rows'."""
        if name in self.factors:
            return diagonal(self.factors[name].left)
        return super().watched(name)

    def watched_numel(self, name: str) -> int:
        """How many numbers `watched` has."""
        if name in self.factors:
            return self.slots[name].shape[0]
        return super().watched_numel(name)

    def tensors(self) -> dict[str, Tensor]:
        """As of Sums, with three tensors for each pair of factors."""
        out = super().tensors()
        for name, f in self.factors.items():
            out |= {f"{part}.{name}": t for part, t in f.parts().items()}
        return out

    def squared(self) -> list[str]:
        """The parameters without factors."""
        return [n for n in self.slots if n not in self.factors]

    def reduce(self, groups: Sequence[Any]) -> None:
        """Sums over the ranks of all `groups`."""
        super().reduce(groups)
        for f, group in itertools.product(self.factors.values(), groups):
            for t in f.parts().values():
                dist.all_reduce(t, group=group)

    def estimates(self, count: int, groups: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, G) by parameter, summed over `groups` first; the sums stay as they are."""
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for name, f in self.factors.items():
            if groups:
                f = FactorSum(f.left.clone(), f.right.clone(), f.turned, f.tokens.clone())
                for group, t in itertools.product(groups, f.parts().values()):
                    dist.all_reduce(t, group=group)
            out[name] = f.estimate(count)
        return out


def _reached(d: Tensor) -> Tensor:
    """(R,), which tokens the loss reaches: padding and what follows all labels has no gradient.

    Nor has a query that attends to one key alone, as a row's first, but for the rounding of its
    attention: in float32 1e-8 to 2e-7 of the largest token's. What is below ROUNDINGS is none.
    """
    if not d.numel():
        return torch.zeros(d.shape[0], dtype=torch.bool, device=d.device)
    size = torch.linalg.vector_norm(d, math.inf, dim=1)
    eps = torch.finfo(torch.float64 if d.dtype == torch.float64 else torch.float32).eps
    return size > ROUNDINGS * eps * size.max()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the same tokens are reached; of a GPU, where asking would wait, not known."""
    return not waits.waits(one) and torch.equal(one, other)


def _add_closed(out: Tensor, p: Piece, weight: float) -> None:
    """Adds the mean over all labels of the head's g g^T: r (diag(p) - p p^T) r a token.

    The score is p - onehot(label), so that p is 1 + score at the label, the one negative entry; r =
    d / score is the slope between the head's output and the logits.
    """
    for _, s, slope in head_slopes(p):
        mass = torch.where(s < 0, 1 + s, s)
        pulled = (slope * mass).to(out.dtype)
        gram_(out, pulled, -weight)
        own = (slope.to(out.dtype) * pulled).sum(0).mul_(weight)
        if out.dim() == 1:
            out += own
        else:
            diagonals = out.diagonal(dim1=-2, dim2=-1)
            diagonals += own.view(diagonals.shape)
