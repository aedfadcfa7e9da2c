"""One block of observe(): the user's own passes, and the proof of an estimator's first one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax.fisher import sharding
from fasttax.fisher.layout import Layout
from fasttax.fisher.passes import Pass
from fasttax.fisher.proof import disagreement, slack_of
from fasttax.fisher.replay import replay
from fasttax.fisher.sums import Sums
from fasttax.fisher.view import View


class Observation:
    """What the taps see of the forwards and backwards inside one block.

    An unproven estimator's block counts nothing before

    - the sum of the gradients that the taps squared is, for every parameter, the one that autograd
      gives for the whole block: every use of a parameter was seen, with what it met;
    - the second example, run alone, meets in every module what the taps took for it in the batch.

    Attributes:
        passes: one a forward of the model.
        proven: both were seen, of a batch of at least two examples.
    """

    def __init__(
        self,
        op: str,
        view: View,
        sums: Sums,
        shape: tuple[int, int] | None,
        bounds: Tensor | None,
        *,
        proven: bool,
        replays: bool = True,
    ) -> None:
        self.op, self.view, self.sums = op, view, sums
        self._shape, self._bounds = shape, bounds
        self.proving, self.replays = not proven, replays
        self.proven, self._replaying = proven, False
        self.passes: list[Pass] = [self._pass()]

    def _pass(self, batch: int = 0) -> Pass:
        layout = Layout(self.view.unit, self._shape, self._bounds, batch)
        return Pass(layout, observed=True)

    @property
    def seen(self) -> list[Pass]:
        """The passes that had a backward."""
        return [p for p in self.passes if p.seen]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the user's forward and backward.

        Raises:
            RuntimeError: no gradient was seen.
            ValueError: the block was to be proven, and could not.
        """
        with contextlib.ExitStack() as stack:
            params: dict[str, Tensor] = {}
            if self.proving:
                params = _provable(self.sums)
                totals = stack.enter_context(self.sums.trial())
            stack.enter_context(self.view.quiet())
            stack.enter_context(self.sums.recording(self.passes))
            stack.enter_context(self.view.tapped(params))
            handle = self.view.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
            if not self.seen:
                raise RuntimeError(
                    f"{self.op}: no gradient reached the model's layers; run forward and backward "
                    "of the loss inside the block"
                )
            for p in self.seen:
                self.sums.finish(p)
            if self.proving:
                self._prove(params, totals)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model begins a batch."""
        if self._replaying:
            return
        values = (kwargs.get("input_ids"), *args, *kwargs.values())
        tensors = [t for t in values if isinstance(t, Tensor) and t.dim()]
        sharding.refuse_context_parallel(self.op, self.view.unit, *tensors)
        batch = tensors[0].shape[0] if tensors else 0
        if self.passes[-1].calls:
            self.passes.append(self._pass(batch))
            self.sums.current = self.passes[-1]
        elif batch and self._shape is None:
            self.passes[-1].layout.batch = batch
        if not self.proving or self.proven or not torch.is_grad_enabled():
            return
        if not self.replays:
            self.proven = True
            return
        self._replaying = True
        try:
            self.proven = replay(
                self.view,
                self.sums,
                lambda: Layout("example", self._shape, self._bounds, batch),
                args,
                kwargs,
            )
        finally:
            self._replaying = False

    def _prove(self, params: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> None:
        """The taps' gradients against autograd's, both of all examples together."""
        expected = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.detach()
            for n, p in params.items()
        }
        largest = max((float(g.norm()) for g in expected.values()), default=0.0)
        wrong = []
        for name, g in expected.items():
            slack = slack_of(g)
            found = totals.get(name, torch.zeros_like(g)).double()
            error, size = float((found - g.double()).norm()), float(g.norm())
            # a gradient that is 0 on paper (a key's bias) is rounding noise, in both
            if not error <= slack * size + 1e-2 * slack * largest:
                off = error / max(size, 1e-30)
                wrong.append(f"{name}: off by {off:.1e} of its gradient's norm")
        if wrong:
            raise ValueError(disagreement(self.op, wrong))
        several = any(p.layout.examples > 1 for p in self.seen)
        if several and not self.proven:
            raise ValueError(
                f"{self.op}: expected a call of the model itself inside the block, got calls of "
                "its parts, so that its examples cannot be run apart; call the model, pass "
                "loss=, or verify=False where you know that the first dimension of every layer's "
                "input counts the examples"
            )


def _provable(sums: Sums) -> dict[str, Tensor]:
    """The parameters that autograd can differentiate: not those behind packed weights."""
    return {
        n: s.param
        for n, s in sums.slots.items()
        if s.param is not None and s.param.is_floating_point() and s.param.is_leaf
    }
