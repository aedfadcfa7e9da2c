"""Taps: where the squared per-example gradients of a module's parameters are taken.

A tap is an identity on a module's output whose backward sees d (the gradient at the output) beside
what the module saw in its forward, and hands both to the sums, inside one ordinary backward pass.
The parameters themselves are frozen meanwhile, so that autograd computes no weight gradient: the
square takes its place. Inputs are kept by save_for_backward, so activation checkpointing, reentrant
or not, treats them as any saved tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fasttax._base import dtensor
from fasttax.fisher import sharding
from fasttax.fisher.layout import WAY_OUT
from fasttax.fisher.passes import Met, Pass, UnitGradients, in_backward
from fasttax.fisher.pieces import Piece


class Sink(Protocol):
    """The sums, as a tap sees them."""

    current: Pass | None

    def take(self, current: Pass, name: str, piece: Piece) -> None:
        """Takes what one use of parameter `name` left."""

    def take_gradients(
        self, current: Pass, tap: Tap, gradients: UnitGradients, *, last: bool
    ) -> None:
        """Takes one call of a module that runs again unit by unit; `last`: no other follows."""


@dataclass(frozen=True)
class Call:
    """One forward call of a tapped module."""

    current: Pass
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument; None without any."""
        return next(iter((*self.args, *self.kwargs.values())), None)


@dataclass(frozen=True)
class Kept:
    """What a tap keeps of a call until its backward.

    Attributes:
        output: (N, ..., O), where the tap goes.
        input: what the module met.
        factors: one number an output vector that its gradient is multiplied by; bool ones put 0
            where False.
    """

    output: Tensor
    input: Tensor
    factors: tuple[Tensor, ...] = ()


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, seed: Tensor, record: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(*saved)
        if dtensor.is_sharded(y):
            return y.view_as(y)
        return y.data  # shares y's memory and is no view of it: a model may write into it

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.record(d, *saved)
        return d, None, None, *[None] * len(saved)


class Tap:
    """A rule, behind one module of its kind.

    A rule says

    - what it fits (`fits`): the modules whose parameters it is exact for, by their class;
    - what it checks (`check`): that a call is one that it is exact for, before anything counts;
    - what it keeps of a call (`keep`) and how it records it (`record`): the pieces that the
      module's parameters get at the backward.

    Attributes:
        sink: the sums.
        module: the module that it stands behind, `where` in the model.
        names: the module's own parameter names -> the model's, of the parameters that count.
        parallel: the module's input and output are split over ranks by features.
        role: "embedding" or "head", what a weight that two modules share is to this one.
        linear: the module's weight gives nothing but pieces of kind "linear" or "head".
        turned: and lies as (in, out).
    """

    role: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    turned: ClassVar[bool] = False

    def __init__(self, sink: Sink, module: nn.Module, where: str, names: dict[str, str]) -> None:
        self.sink, self.module, self.where, self.names = sink, module, where, names
        self.parallel = False
        self._seed: Tensor | None = None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the rule is exact for the module's own parameters."""
        raise NotImplementedError

    def check(self, call: Call) -> None:
        """Refuses a call that the rule is not exact for.

        Whatever a rule must prove of a call before its squares may count, it proves here: that the
        module's own parameters were used, and that the layout of its tensors is the batch's.

        Raises:
            TypeError: not one tensor in and one out.
        """
        if not isinstance(call.output, Tensor) or not isinstance(call.input, Tensor):
            raise self.refusal("expected one tensor in and one out")

    def keep(self, call: Call) -> Kept:
        """What the backward will need, an example a row."""
        return Kept(*call.current.layout.per_example(call.output, call.input.detach()))

    def leading(self, x: Tensor) -> int:
        """How many dimensions of the kept input tell outputs apart."""
        return x.dim() - 1

    def record(self, current: Pass, d: Tensor, x: Tensor, bounds: Tensor) -> None:
        """Gives the module's parameters their pieces (`give`).

        Args:
            current: the pass.
            d: the gradient at the kept output.
            x: the kept input.
            bounds: the units' boundaries over x's leading dimensions.
        """
        raise NotImplementedError

    # --- what rules share -------------------------------------------------------------------------

    def install(self) -> Any:
        """A handle whose remove() takes the tap away.

        First of the module's hooks: what others make of its output is not its own.
        """
        return self.module.register_forward_hook(self._hook, with_kwargs=True, prepend=True)

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
    ) -> Any:
        current = self.sink.current
        if current is None:
            return y  # a tap's own rerun of a module
        if current.met is not None:
            call = Call(current, args, kwargs, y)
            self.check(call)
            return self.shown(call, current.met)
        if in_backward():
            current.recomputed = True
        else:
            current.calls[self] += 1
        if not torch.is_grad_enabled():
            return y  # a reentrant checkpoint's first pass, or somebody's evaluation
        call = Call(current, args, kwargs, y)
        self.check(call)
        return self.tapped(call)

    def shown(self, call: Call, met: Met) -> Any:
        """The module's output as the tap leaves it, and to `met` what the module met of an example.

        In a block that runs example by example, what it met is that example's by construction.
        """
        kept, layout = self._kept(call), call.current.layout
        leading = kept.input.shape[: self.leading(kept.input)]
        bounds = layout.segments(leading, self.where, layout.only)
        if layout.only is None and met.n < layout.examples:
            rows = kept.input.reshape(leading.numel(), -1)
            mine = rows[int(bounds[met.n]) : int(bounds[met.n + 1])]
            met.add(self.where, mine.detach().clone())
        return kept.output

    def _kept(self, call: Call) -> Kept:
        """What `keep` gives; the pass learns where an output was copied for each example."""
        kept = self.keep(call)
        if kept.output.shape != call.output.shape:
            call.current.expanded.append(self.where)
        return kept

    def tapped(self, call: Call) -> Any:
        """The module's output behind the tap."""
        current, only = call.current, call.current.layout.only
        like = dtensor.placements_of(call.output)
        kept = self._kept(call)
        current.layout.see(kept.input.shape[: self.leading(kept.input)])

        # holds no tensor of the call: a checkpoint drops what save_for_backward keeps
        def record(d: Tensor, x: Tensor, *factors: Tensor) -> None:
            self.parallel = like is not None
            bounds = current.layout.segments(x.shape[: self.leading(x)], self.where, only)
            d = sharding.activation(d, self.where, like)
            for factor in factors:
                d = scaled(d, factor)
            self.record(current, d, sharding.activation(x, self.where), bounds)

        return self.identity(kept.output, record, kept.input, *kept.factors)

    def identity(self, y: Tensor, record: Callable[..., None], *saved: Tensor) -> Tensor:
        """`y`, whose backward calls record(d, *saved)."""
        if self._seed is None or self._seed.device != y.device:
            # makes the output require grad though every parameter is frozen
            self._seed = torch.zeros((), device=y.device, requires_grad=True)
        out: Tensor = _Identity.apply(y, self._seed, record, *saved)
        return out

    def factors(self, name: str) -> bool:
        """Whether the model's parameter `name` is the weight of a linear layer here."""
        return self.linear and self.names.get("weight") == name

    def give(self, current: Pass, own: str, piece: Piece) -> None:
        """Hands the module's parameter `own` its piece, if it is one that counts."""
        if own in self.names:
            piece.parallel = self.parallel
            self.sink.take(current, self.names[own], piece)

    def refusal(self, reason: str, error: type[Exception] = TypeError) -> Exception:
        """The error of a module, or of a call of it, that the rule is not exact for."""
        return error(
            f"DiagonalFisher: {self.where} ({type(self.module).__name__}): {reason}; {WAY_OUT}"
        )


def scaled(d: Tensor, factor: Tensor) -> Tensor:
    """`d` (..., O) times one number an output vector; a bool puts 0, whatever d holds."""
    if factor.dtype == torch.bool:
        return d.masked_fill(~factor[..., None], 0.0)
    return d * factor[..., None].to(d.dtype)


@contextlib.contextmanager
def computing_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module computes with `tensors` in place of its parameters by (dotted) name.

    Call module.forward there: hooks, which the module itself would run, are of the real pass.
    """
    places = []
    for name, t in tensors.items():
        holder, _, last = name.rpartition(".")
        places.append((module.get_submodule(holder)._parameters, last, t))
    own = [(parameters, last, parameters[last]) for parameters, last, _ in places]
    try:
        for parameters, last, t in places:
            parameters[last] = t  # type: ignore[assignment]
        yield
    finally:
        for parameters, last, p in own:
            parameters[last] = p
