"""EWC with Kronecker factors: one weight, or the LoRA update of one, and what pulls it back.

    penalty = strength/2 * <D, L D R>,   its gradient strength * L D R,   D = weight - anchor

L and R are the factors of the weight's rows and columns (fisher/factor.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, dtensor, packed
from fasttax._base.gradient import gradient_of
from fasttax._base.library import no_second_derivative
from fasttax._base.packed import Stored
from fasttax.ewc import ops
from fasttax.ewc.store import has_moved
from fasttax.fisher.factor import between, eigen, times, turned

Sides = tuple[Tensor, Tensor]  # (left, right)
Basis = tuple[Tensor, Tensor | None]  # eigenvalues, eigenvectors


#: the Fisher of what has factors in its place
NOTHING = Stored(torch.empty(0, dtype=torch.float32, device="cpu"))


def refuse_for_factors(op: str, clamp: Any, offload: str | None) -> None:
    """Options of a diagonal that factors have no form of."""
    if clamp is not None:
        expected, way_out = "None with Kronecker factors", "pass estimate.to_diagonal()"
        raise checks.fail(op, "clamp", expected, repr(clamp), way_out)
    if offload is not None:
        expected = "None with Kronecker factors, which each step multiplies by"
        raise checks.fail(op, "offload", expected, repr(offload), "pass estimate.to_diagonal()")


def sides_for(theta: Tensor, sides: Sides) -> Sides:
    """Factors where a weight is, in the dtype that its penalty is computed in."""
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    left, right = (t.detach().to(theta.device, dtype) for t in sides)
    return left, right


def tensors_of(name: str, sides: Sides) -> dict[str, Tensor]:
    """What a file has of a pair."""
    return {f"left.{name}": sides[0], f"right.{name}": sides[1]}


@dataclass
class KroneckerHeld:
    """One held weight: the model's own tensor, its factors, and its whole anchor as stored.

    Under FSDP2 every rank has all of both, and takes part in the whole weight's product.
    """

    name: str
    theta: Tensor
    sides: Sides
    anchor: Tensor
    basis: tuple[Basis, Basis] | None = field(default=None, repr=False)

    def over(self, theta: Tensor) -> KroneckerHeld:
        """The same over a copy of the weight."""
        return KroneckerHeld(self.name, theta, self.sides, self.anchor, self.basis)

    def take(self, sides: Sides, anchor: Tensor) -> None:
        """Takes these over."""
        self.sides, self.anchor, self.basis = sides, anchor.to(self.theta.device), None

    def decoded_anchor(self) -> Tensor:
        """The whole anchor as floats, of the weight's shape."""
        return packed.decode_anchor(self.anchor, torch.Size(self.theta.shape))

    def tensors(self) -> dict[str, Tensor]:
        """What a file has of it."""
        return {f"anchor.{self.name}": self.anchor, **tensors_of(self.name, self.sides)}

    def follow(self) -> None:
        """Goes where the weight has gone since, for good: trainers move their models."""
        if has_moved(self.anchor, self.theta.device):
            with torch.inference_mode(False):
                self.take(sides_for(self.theta, self.sides), self.anchor)

    def moved(self) -> Tensor:
        """The change D as a matrix; of an FSDP2 weight a collective."""
        self.follow()
        theta = dtensor.whole(self.theta.detach())
        dtype = self.sides[0].dtype
        return (theta.to(dtype) - self.decoded_anchor().to(dtype)).flatten(1)

    def pull(self) -> tuple[Tensor, Tensor]:
        """(<D, L D R>, L D R), the first >= 0 as it is on paper."""
        d = self.moved()
        pull = between(self.sides[0], d, self.sides[1])
        return (d * pull).sum(dtype=torch.float64).clamp_min(0), pull

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a matrix, in the weight's shape."""
        return dtensor.part_of(whole.reshape(self.theta.shape), self.theta)

    def penalty(self, strength: float) -> Tensor:
        """0-d, differentiable by the weight; the same on every rank."""
        value: Tensor = _Quadratic.apply(self, strength, dtensor.local(self.theta))
        return value

    def value(self, strength: float) -> Tensor:
        """`penalty` without a graph."""
        return (0.5 * strength * self.pull()[0]).to(self.sides[0].dtype)

    def add_grad_(self, strength: float, scale: float, times: Tensor | None) -> Tensor:
        """Adds scale * times * gradient to theta.grad, made where it is missing; the penalty."""
        square, pull = self.pull()
        factor = strength * scale * factor_of(times, pull)
        mine = self.part(pull * factor)
        dtensor.local(gradient_of(self.theta)).add_(mine)
        return (0.5 * strength * square).to(pull.dtype)

    def prox_(self, step: float, times: Tensor | None = None) -> None:
        """Moves the weight to the minimum of |W - before|^2 / 2 + step * <D, L D R> / 2.

        In the factors' eigenbasis D shrinks by 1 + step * l_i * r_j: exact, and stable for any
        step. At step 0 no bit moves. The bases are found once, in float64.
        """
        self.follow()
        if self.basis is None:
            self.basis = eigen(self.sides[0]), eigen(self.sides[1])
        (rows, left), (columns, right) = self.basis
        d = self.moved()
        left, right = (None if v is None else v.to(d.dtype) for v in (left, right))
        inside = turned(right, turned(left, d).T.contiguous()).T
        # the change of D, exactly 0 where nothing pulls: the way there and back would round it
        less = 1 / (1 + factor_of(times, rows) * step * (rows[:, None] * columns)) - 1
        inside = (inside * less).to(d.dtype)
        d = turned(right, turned(left, inside.contiguous(), back=True).T.contiguous(), back=True).T
        dtensor.local(self.theta.detach()).add_(self.part(d))


def factor_of(times: Tensor | None, like: Tensor) -> Tensor | float:
    """One value where `like` is and in its dtype, 1 for none."""
    if times is None:
        return 1.0
    return ops.beside(times.detach().reshape(()), like.device).to(like.dtype)


def held_at(
    name: str, theta: Tensor, sides: Sides, start: Tensor, dtype: torch.dtype | str | None
) -> KroneckerHeld:
    """A weight held at `start`, the anchor encoded as anchor_dtype says."""
    wide = theta.dtype == torch.float64
    encoding = theta.dtype if wide or dtype is None else dtype
    anchor = packed.encode_anchor(start.to(theta.device, copy=True), encoding)
    return KroneckerHeld(name, theta, sides, anchor)


class _Quadratic(torch.autograd.Function):
    """The penalty of one weight; its forward leaves the gradient."""

    @staticmethod
    def forward(ctx: Any, held: KroneckerHeld, strength: float, theta: Tensor) -> Tensor:
        square, pull = held.pull()
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(held.part(pull * strength).to(theta.dtype))
        return (0.5 * strength * square).to(pull.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        checks.no_tangent("EWC.penalty", "the gradient of its result", grad)
        (pull,) = ctx.saved_tensors
        scaled = (pull * grad).to(pull.dtype)
        return None, None, *no_second_derivative([scaled], "EWC.penalty")


def low_rank(b: Tensor, a: Tensor, scale: float, sides: Sides) -> Tensor:
    """<D, L D R> of D = scale * b @ a, by scale^2 sum (a R a^T) * (b^T L b).

    Two products with a factor, and no matrix of D's size.
    """
    left, right = sides
    b, a = b.to(left.dtype), a.to(left.dtype)
    inner = (a @ times(right, a.T)) * (b.T @ times(left, b))
    return scale**2 * inner.sum().clamp_min(0)
