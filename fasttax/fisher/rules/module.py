"""Modules with no rule of their own: differentiated again alone, one example at a time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fasttax._base import dtensor
from fasttax.fisher.tap import Call, Tap, computing_with


class ModuleTap(Tap):
    """Any module that treats examples apart.

    At its backward it runs once more, example by example, with its own parameters alone; the
    gradient of one example exists at a time. Exact for grouped convolutions, recurrent cells, fused
    3-D experts, bare parameters.
    """

    @staticmethod
    def problem(model: nn.Module, module: nn.Module) -> str | None:
        """Why a module of `model` cannot be differentiated on its own; None where it can."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return "batch statistics mix the examples (call model.eval())"
        if module is model:
            return "it belongs to the model itself"
        if isinstance(module, nn.Embedding):
            return "max_norm, scale_grad_by_freq or sparse"
        own, every = (sum(p.numel() for p in m.parameters()) for m in (module, model))
        if 2 * own > every and any(True for _ in module.children()):
            return "it holds most of the model"
        return None

    def check(self, call: Call) -> None:
        """Refuses single tokens, tensors split over ranks, and outputs without a gradient.

        Raises:
            ValueError: unit="token".
            TypeError: a DTensor comes in or goes out, or no tensor of floats does.
        """
        if call.current.layout.unit == "token":
            raise self.refusal("no rule for unit='token'", ValueError)
        outputs = pytree.tree_leaves(call.output)
        inputs = pytree.tree_leaves((call.args, call.kwargs))
        if any(dtensor.is_sharded(t) for t in (*outputs, *inputs)):
            raise self.refusal("no rule under tensor parallelism")
        if not any(_has_gradient(t) for t in outputs):
            raise self.refusal("expected a tensor out")

    def tapped(self, call: Call) -> Any:
        """The module's outputs, of any structure, each behind a tap of its own."""
        current, layout = call.current, call.current.layout
        outputs, out_spec = pytree.tree_flatten(call.output)
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        saved = [leaves[i].detach() for i in places]
        for i in places:
            leaves[i] = None  # kept by save_for_backward alone
        differentiable = [i for i, t in enumerate(outputs) if _has_gradient(t)]
        only = layout.only

        def record(d: Tensor, *saved: Tensor, output: int) -> None:
            layout.see(d.shape[:2])
            filled = list(leaves)
            for place, t in zip(places, saved, strict=True):
                filled[place] = t

            def gradients(n: int) -> dict[str, Tensor]:
                if only is not None:
                    return self._gradients(filled, spec, output, d) if n == only else {}
                if layout.unit == "batch":
                    return self._gradients(filled, spec, output, d)
                parts = [
                    layout.cut(t, n, self.where) if isinstance(t, Tensor) else t for t in filled
                ]
                return self._gradients(parts, spec, output, layout.cut(d, n, self.where))

            self.sink.take_gradients(current, self, gradients, last=len(differentiable) == 1)

        for i in differentiable:
            t = outputs[i]
            if layout.copies > 1 and t.dim() > 1 and t.shape[0] == 1:
                t = t.expand(layout.copies, *t.shape[1:])
            outputs[i] = self.identity(t, functools.partial(record, output=i), *saved)
        return pytree.tree_unflatten(outputs, out_spec)

    def _gradients(
        self, leaves: list[Any], spec: pytree.TreeSpec, output: int, d: Tensor
    ) -> dict[str, Tensor]:
        """By the model's names: the gradients of the module's parameters in one rerun."""
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        own = {own: self.module.get_parameter(own) for own in self.names}
        params = {name: p.detach().requires_grad_() for name, p in own.items()}
        running, self.sink.current = self.sink.current, None
        try:
            with (
                computing_with(self.module, params),
                torch.enable_grad(),
                torch.random.fork_rng(devices=[]),
            ):
                out = pytree.tree_leaves(self.module.forward(*args, **kwargs))[output]
                grads = torch.autograd.grad(
                    out, list(params.values()), d.expand(out.shape), allow_unused=True
                )
        finally:
            self.sink.current = running
        found = zip(params, grads, strict=True)
        return {self.names[name]: _single(g) for name, g in found if g is not None}


def _has_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _single(g: Tensor) -> Tensor:
    """Half-width gradients in float32, since those of several calls are summed."""
    return g.float() if g.dtype in (torch.bfloat16, torch.float16) else g
