"""Modules with no rule of their own: differentiated again alone, one example at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fasttax._base import dtensor
from fasttax.fisher.layout import Layout
from fasttax.fisher.passes import Met, Pass
from fasttax.fisher.proof import alike
from fasttax.fisher.tap import Call, Tap, computing_with

_STATELESS = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


class ModuleTap(Tap):
    """Any module that treats examples apart.

    At its backward it runs once more, example by example, with its own parameters alone; the
    gradient of one example exists at a time. Exact for grouped convolutions, recurrent cells, fused
    3-D experts, bare parameters. Whether an example's part of its inputs gives that example's part
    of its outputs is tried once for each shape that it meets.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._folded: dict[tuple[torch.Size, ...], bool] = {}

    @staticmethod
    def problem(model: nn.Module, module: nn.Module) -> str | None:
        """Why a module of `model` cannot be differentiated on its own; None where it can."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return "batch statistics mix the examples (call model.eval())"
        if isinstance(module, torch.jit.ScriptModule):
            return "it is scripted"
        if module is model:
            return "it belongs to the model itself"
        if isinstance(module, nn.Embedding) and (
            module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        ):
            return "max_norm, scale_grad_by_freq or sparse"
        own, every = (sum(p.numel() for p in m.parameters()) for m in (module, model))
        if 2 * own > every and any(True for _ in module.children()):
            return "it holds most of the model"
        return None

    def check(self, call: Call) -> None:
        """Refuses what a second run of the module would not repeat.

        Raises:
            ValueError: unit="token", dropout, or an argument that may remember what it was given.
            TypeError: a DTensor comes in or goes out, or a parameter does.
        """
        if call.current.layout.unit == "token":
            raise self.refusal("no rule for unit='token'", ValueError)
        outputs = pytree.tree_leaves(call.output)
        inputs = pytree.tree_leaves((call.args, call.kwargs))
        if any(dtensor.is_sharded(t) for t in (*outputs, *inputs)):
            raise self.refusal("no rule under tensor parallelism")
        if any(isinstance(t, nn.Parameter) for t in outputs):
            raise self.refusal("it returns a parameter, which is used elsewhere")
        if any(drops(m) for m in self.module.modules() if m.training):
            reason = "its dropout would draw another mask in its second run: call model.eval()"
            raise self.refusal(reason, ValueError)
        states = [type(t).__name__ for t in inputs if not isinstance(t, _STATELESS)]
        if states:
            reason = (
                f"its argument of type {states[0]} may be changed by the first run and is met again"
                " by the second: run the model with use_cache=False"
            )
            raise self.refusal(reason, ValueError)

    def part(self, layout: Layout, t: Tensor, place: int, n: int, folded: bool) -> Tensor:
        """What example n has of a tensor, the module's argument or output number `place`."""
        return layout.cut(t, n, self.where, folded=folded)

    def parts(self, layout: Layout, leaves: Sequence[Any], n: int, folded: bool) -> list[Any]:
        """What example n has of the module's arguments, or outputs; what is no tensor as it is."""
        found = list(leaves)
        for place, t in enumerate(leaves):
            if isinstance(t, Tensor):
                found[place] = self.part(layout, t, place, n, folded)
        return found

    def tapped(self, call: Call) -> Any:
        """The module's outputs, of any structure, each behind a tap of its own."""
        current, layout = call.current, call.current.layout
        outputs, out_spec = pytree.tree_flatten(call.output)
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        differentiable = [i for i, t in enumerate(outputs) if _has_gradient(t)]
        if not differentiable:
            return call.output  # choices alone, which have no gradient
        folded = self._folds(layout, leaves, spec, outputs)
        places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        saved = [leaves[i].detach() for i in places]
        for i in places:
            leaves[i] = None  # kept by save_for_backward alone
        only = layout.only

        def record(d: Tensor, *saved: Tensor, output: int) -> None:
            filled = list(leaves)
            for place, t in zip(places, saved, strict=True):
                filled[place] = t

            def gradients(n: int) -> dict[str, Tensor]:
                if only is not None:
                    return self._gradients(filled, spec, output, d) if n == only else {}
                if layout.unit == "batch":
                    return self._gradients(filled, spec, output, d)
                parts = self.parts(layout, filled, n, folded)
                mine = self.part(layout, d, output, n, folded)
                return self._gradients(parts, spec, output, mine)

            self.sink.take_gradients(current, self, gradients, last=len(differentiable) == 1)

        for i in differentiable:
            t = self.copied(current, outputs[i])
            outputs[i] = self.identity(t, functools.partial(record, output=i), *saved)
        return pytree.tree_unflatten(outputs, out_spec)

    def shown(self, call: Call, met: Met) -> Any:
        """See Tap; of every argument, and of every output."""
        layout = call.current.layout
        outputs, out_spec = pytree.tree_flatten(call.output)
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        if not any(_has_gradient(t) for t in outputs):
            return call.output
        folded = self._folds(layout, leaves, spec, outputs)
        if layout.only is None and met.n < layout.examples:
            for t in (
                *self.parts(layout, leaves, met.n, folded),
                *self.parts(layout, outputs, met.n, folded),
            ):
                if isinstance(t, Tensor):
                    met.add(self.where, t.clone())
        for i, t in enumerate(outputs):
            if _has_gradient(t):
                outputs[i] = self.copied(call.current, t)
        return pytree.tree_unflatten(outputs, out_spec)

    def copied(self, current: Pass, t: Tensor) -> Tensor:
        """An output, with a copy for each example of what was computed once."""
        copies = current.layout.copies
        if copies == 1 or t.dim() < 2 or t.shape[0] != 1:
            return t
        current.expanded.append(self.where)
        return t.expand(copies, *t.shape[1:])

    # --- how examples lie in its tensors ----------------------------------------------------------

    def _folds(
        self, layout: Layout, leaves: Sequence[Any], spec: pytree.TreeSpec, outputs: Sequence[Any]
    ) -> bool:
        """Whether a first dimension of several times the batch's rows is cut as `Layout.cut` says.

        Raises:
            ValueError: an example's part of the inputs gives another output by either way.
        """
        layout.see(self.leading_of(outputs))
        if layout.only is not None or layout.unit == "batch" or layout.examples < 2:
            return False
        tensors = [t for t in (*leaves, *outputs) if isinstance(t, Tensor)]
        shapes = tuple(t.shape for t in tensors)
        if shapes not in self._folded:
            for folded in (False, True):
                if self._repeats(layout, leaves, spec, outputs, folded):
                    self._folded[shapes] = folded
                    break
            else:
                raise self.refusal(
                    "it does not treat the batch's examples apart, in the first dimension of its "
                    f"tensors (of shapes {', '.join(str(tuple(t.shape)) for t in tensors)})",
                    ValueError,
                )
        return self._folded[shapes]

    def leading_of(self, outputs: Sequence[Any]) -> torch.Size:
        """The leading shape (B, T, ...) that its outputs show."""
        return next(t for t in outputs if _has_gradient(t)).shape[:2]

    @torch.no_grad()
    def _repeats(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        outputs: Sequence[Any],
        folded: bool,
    ) -> bool:
        """Whether the second example's part of the inputs gives its part of the outputs."""
        args, kwargs = pytree.tree_unflatten(self.parts(layout, leaves, 1, folded), spec)
        try:
            with self._alone():
                alone = pytree.tree_leaves(self.module.forward(*args, **kwargs))
        except _FAILURES:
            return False
        expected = self.parts(layout, outputs, 1, folded)
        return len(alone) == len(expected) and all(
            alike(found, whole)
            for found, whole in zip(alone, expected, strict=True)
            if _has_gradient(whole)
        )

    # --- its second run ---------------------------------------------------------------------------

    def _gradients(
        self, leaves: list[Any], spec: pytree.TreeSpec, output: int, d: Tensor
    ) -> dict[str, Tensor]:
        """By the model's names: the gradients of the module's parameters in one rerun."""
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        own = {own: self.module.get_parameter(own) for own in self.names}
        params = {name: p.detach().requires_grad_() for name, p in own.items()}
        with self._alone(), computing_with(self.module, params), torch.enable_grad():
            out = pytree.tree_leaves(self.module.forward(*args, **kwargs))[output]
            if not out.requires_grad:
                return {}  # of none of its parameters
            grads = torch.autograd.grad(
                out, list(params.values()), d.expand(out.shape), allow_unused=True
            )
        found = zip(params, grads, strict=True)
        return {self.names[name]: _single(g) for name, g in found if g is not None}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, taps see nothing; the random state is put back."""
        running, self.sink.current = self.sink.current, None
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.sink.current = running


def drops(module: nn.Module) -> bool:
    """Whether a module drops out in train mode: torch's own, or one with a rate for a function.

    Those are numbers by the names of dropout, activation_dropout, layerdrop, drop_prob, ...
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = (value for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and 0 < rate <= 1 for rate in rates)


def _has_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _single(g: Tensor) -> Tensor:
    """Half-width gradients in float32, since those of several calls are summed."""
    return g.float() if g.dtype in (torch.bfloat16, torch.float16) else g
