"""One block of observe(): the user's own passes, and the proof of an estimator's first one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.fisher import loop, sharding
from fasttax.fisher.layout import Layout
from fasttax.fisher.loss_factor import LossFactor
from fasttax.fisher.passes import Pass
from fasttax.fisher.proof import differences, disagreement, is_exact, not_the_sum, roots
from fasttax.fisher.replay import replay
from fasttax.fisher.sums import Sums
from fasttax.fisher.view import View

Loss = Callable[[int], Tensor]  # an example of the block -> its loss, by a forward of its own


def one_loss(op: str, loss: Any) -> Tensor:
    """What a user's loss gave, which must be one number that hangs on the model.

    Raises:
        TypeError: it is another thing.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    came = "one without a graph" if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    way_out = "return the SUM of the examples' losses, as the model's outputs give it"
    raise checks.fail(
        op, "loss", "a tensor of one number to differentiate", came, way_out, TypeError
    )


class Observation:
    """What the taps see of the forwards and backwards inside one block.

    An unproven estimator's block counts nothing before

    - the sum of the gradients that the taps squared is, for every parameter, the one that autograd
      gives for the whole block: every use of a parameter was seen, with what it met;
    - the second example, run alone, meets in every module what the taps took for it in the batch;
      or, of a block with a loss by example, the squares are those of the examples' own gradients;
    - a loss that shows itself as a cross-entropy is its sum over tokens, not a mean.

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
        loss: Loss | None,
    ) -> None:
        self.op, self.view, self.sums = op, view, sums
        self._shape, self._bounds, self._loss = shape, bounds, loss
        self.proving, self.proven, self._replaying = not proven, proven, False
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
            factor = LossFactor()
            if self.proving:
                params = _provable(self.sums)
                totals = stack.enter_context(self.sums.trial())
                if self._loss is None:
                    stack.enter_context(factor.watching(self.view.model))
            with (
                self.view.quiet(),
                self.sums.recording(self.passes),
                self.view.tapped(params),
                self._watching(),
            ):
                yield
                if not self.seen:
                    raise RuntimeError(
                        f"{self.op}: no gradient reached the model's layers; run forward and "
                        "backward of the loss inside the block"
                    )
                for p in self.seen:
                    self.sums.finish(p)
                if self.proving:
                    self._prove(params, totals)
                    self._prove_sum(factor.found)
            if self.proving and self._loss is not None:
                self._prove_examples(params, totals, self._loss)
                self.proven = True

    @contextlib.contextmanager
    def looping(self) -> Iterator[None]:
        """Around the user's forward, which says how many examples there are for the loss.

        Raises:
            RuntimeError: the model did not run, so that nobody knows how many.
        """
        loss = self._loss
        assert loss is not None
        before = [(p, p.grad) for p in self.view.model.parameters()]
        try:
            for p, _ in before:
                p.grad = None
            with self._watching():
                yield
        finally:
            for p, grad in before:
                p.grad = grad
        (current,) = self.passes  # no tap counts calls
        if not (current.layout.batch or current.layout.examples):
            raise RuntimeError(f"{self.op}: run the model inside the block, or pass shape=")
        current.layout.see(torch.Size((current.layout.batch, 1)))
        current.seen = True
        params = _provable(self.sums)
        examples = range(current.layout.examples)
        self.sums.add_by_example(self._alone(params, loss, n) for n in examples)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        handle = self.view.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

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
        proves = self.proving and not self.proven and self._loss is None
        if not proves or not torch.is_grad_enabled():
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
        expected = {n: p.grad.detach() for n, p in params.items() if p.grad is not None}
        wrong = differences(params, totals, expected, self._exact(params))
        if wrong:
            raise ValueError(disagreement(self.op, wrong))
        several = any(p.layout.examples > 1 for p in self.seen)
        if several and not self.proven and self._loss is None:
            raise ValueError(
                f"{self.op}: expected a call of the model itself inside the block, got calls of "
                "its parts, so that its examples cannot be run apart; call the model, pass "
                "loss=, or verify=False where you know that the first dimension of every layer's "
                "input counts the examples"
            )

    def _prove_sum(self, factor: float | None) -> None:
        """The loss is no mean, and has no factor, where it is a cross-entropy.

        Means, accumulations and loss scales are factors of 2 and more; one nearer 1 may be a
        smoothing of the labels.
        """
        if factor is None or 0.51 < factor < 1.96:
            return
        raise ValueError(
            f"{self.op}: expected the sum of the tokens' losses, got a cross-entropy of "
            f"{factor:.3g} times its sum, whose squares are {factor**2:.3g} times the Fisher's; "
            "take reduction='sum', no GradScaler and no division by accumulation steps; or where "
            "the factor is meant pass loss= of one example, with it"
        )

    def _exact(self, params: Mapping[str, Tensor]) -> bool:
        return is_exact(self.view.device, *(p.dtype for p in params.values()))

    def _alone(self, params: Mapping[str, Tensor], loss: Loss, n: int) -> dict[str, Tensor]:
        """Autograd's gradients of example n."""

        def backward() -> None:
            one_loss(self.op, loss(n)).backward()

        return self.view.gradients_of(params, backward)

    def _prove_examples(
        self, params: Mapping[str, Tensor], totals: Mapping[str, Tensor], loss: Loss
    ) -> None:
        """The squares against those of each example's own gradient, for unit="example"."""
        if self.view.unit != "example":
            return
        examples = sum(p.layout.examples for p in self.seen)
        sums, truth = loop.totals(self._alone(params, loss, n) for n in range(examples))
        exact = self._exact(params)
        squared = {n: p for n, p in params.items() if not self.sums.approximates(n)}
        squares = {n: self.sums.value(n) / self.sums.weight for n in squared}
        wrong = differences(squared, roots(squares), roots(truth), exact)
        if not wrong:
            return
        of_the_loss = differences(params, totals, sums, exact)
        if of_the_loss:
            raise ValueError(not_the_sum(self.op, of_the_loss))
        raise ValueError(disagreement(self.op, wrong))


def _provable(sums: Sums) -> dict[str, Tensor]:
    """The parameters that autograd can differentiate: not those behind packed weights."""
    return {
        n: s.param
        for n, s in sums.slots.items()
        if s.param is not None and s.param.is_floating_point() and s.param.is_leaf
    }
