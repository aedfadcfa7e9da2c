"""Modules with no closed rule: differentiated again on their own, one example at a time.

And blocks that route tokens to experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fasttax.fisher import sharding
from fasttax.fisher.passes import WAY_OUT, Pass
from fasttax.fisher.taps import Sink, Tap


class ModuleTap(Tap):
    """Any module that treats examples apart.

    At its backward it runs once more, example by example, with its own parameters alone.

    The gradient of one example exists at a time. Exact for convolutions, recurrent cells, fused 3-D
    experts, bare parameters.
    """

    def _tapped(self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if current.unit == "token":
            raise ValueError(
                f"DiagonalFisher: {self.where} ({type(self.module).__name__}): no rule for "
                f"unit='token'; {WAY_OUT}"
            )
        outputs, out_spec = pytree.tree_flatten(y)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(sharding.is_dtensor(t) for t in (*leaves, *outputs)):
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(self.module).__name__}): no rule under "
                f"tensor parallelism; {WAY_OUT}"
            )
        differentiable = [
            i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        if not differentiable:
            raise TypeError(
                f"DiagonalFisher: {self.where} ({type(self.module).__name__}): expected a tensor "
                f"out; {WAY_OUT}"
            )
        tensors = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        kept = [t.detach() for t in leaves if isinstance(t, Tensor)]
        constants = [None if isinstance(t, Tensor) else t for t in leaves]
        only = current.only
        for i in differentiable:

            def record(d: Tensor, *saved: Tensor, i: int = i) -> None:
                current.see(d.shape[:2])
                filled = list(constants)
                for place, t in zip(tensors, saved, strict=True):
                    filled[place] = t
                self.sink.take_gradients(
                    current, self, (filled, spec, i, d, only), len(differentiable) > 1
                )

            t = outputs[i]
            if current.batch > 1 and only is None and t.dim() > 1 and t.shape[0] == 1:
                t = t.expand(current.batch, *t.shape[1:])
            outputs[i] = self._apply(t, record, *kept)
        return pytree.tree_unflatten(outputs, out_spec)

    def gradients(self, current: Pass, calls: list[tuple[Any, ...]], n: int) -> dict[str, Tensor]:
        """Unit n's gradient of the module's own parameters, over all calls of the module."""
        total: dict[str, Tensor] = {}
        for filled, spec, i, d, only in calls:
            if only is not None and only != n:
                continue
            cut = current.unit != "batch" and only is None
            part = [
                current.cut(t, n, self.where) if cut and isinstance(t, Tensor) else t
                for t in filled
            ]
            args, kwargs = pytree.tree_unflatten(part, spec)
            for own, g in self._vjp(
                args, kwargs, i, current.cut(d, n, self.where) if cut else d
            ).items():
                name = self.names[own]
                total[name] = total[name] + g if name in total else g
        return total

    def _vjp(self, args: Any, kwargs: Any, i: int, d: Tensor) -> dict[str, Tensor]:
        holders = {own: self.module.get_submodule(own.rpartition(".")[0]) for own in self.names}
        kept = {own: holders[own]._parameters[own.rpartition(".")[2]] for own in self.names}
        leaves = {own: p.detach().requires_grad_() for own, p in kept.items() if p is not None}
        running, self.sink.current = self.sink.current, None
        try:
            for own, leaf in leaves.items():
                holders[own]._parameters[own.rpartition(".")[2]] = leaf  # type: ignore[assignment]
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                out = pytree.tree_flatten(self.module.forward(*args, **kwargs))[0][i]
                grads = torch.autograd.grad(
                    out, list(leaves.values()), d.expand(out.shape), allow_unused=True
                )
        finally:
            self.sink.current = running
            for own, p in kept.items():
                holders[own]._parameters[own.rpartition(".")[2]] = p
        return {
            own: g.float() if g.dtype in (torch.bfloat16, torch.float16) else g
            for own, g in zip(leaves, grads, strict=True)
            if g is not None
        }


class RoutingBlock:
    """A block that sends tokens to experts of their own.

    Run example by example, so that every expert's tokens are one example's.

    The taps of the experts wait until the end of the backward and are then squared in one call over
    ragged segments.
    """

    def __init__(self, sink: Sink, module: nn.Module, where: str) -> None:
        self.sink, self.module, self.where = sink, module, where

    def install(self) -> RoutingBlock:
        forward = self.module.forward
        self.kept = self.module.__dict__.get("forward")

        def split(*args: Any, **kwargs: Any) -> Any:
            current = self.sink.current
            if current is None or current.unit == "batch" or current.only is not None:
                return forward(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            first = next((t for t in leaves if isinstance(t, Tensor)), None)
            if current.shape is None and first is not None:
                current.see(first.shape[:2])
            parts = []
            try:
                for n in range(current.examples):
                    current.only = n
                    mine = [
                        current.cut(t, n, self.where) if isinstance(t, Tensor) else t
                        for t in leaves
                    ]
                    args, kwargs = pytree.tree_unflatten(mine, spec)
                    parts.append(forward(*args, **kwargs))
            finally:
                current.only = None
            flat = [pytree.tree_flatten(part) for part in parts]
            joined = [
                current.join([f[0][i] for f in flat], self.where) if isinstance(t, Tensor) else t
                for i, t in enumerate(flat[0][0])
            ]
            return pytree.tree_unflatten(joined, flat[0][1])

        self.module.forward = split
        return self

    def remove(self) -> None:
        if self.kept is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.kept
