"""Blocks that send tokens to experts of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fasttax.fisher.passes import Pass
from fasttax.fisher.tap import Sink

_LISTS = (nn.ModuleList, nn.ModuleDict)


def expert_lists(model: nn.Module) -> dict[str, str]:
    """The place of each list of experts -> that of the block that routes to them.

    A list of modules whose name has "expert" in it, and the nearest module above with a forward.
    """
    found: dict[str, str] = {}
    for where, module in model.named_modules():
        block, _, last = where.rpartition(".")
        if isinstance(module, _LISTS) and "expert" in last.lower():
            while not _has_forward(model.get_submodule(block)):
                block = block.rpartition(".")[0]
            found[where] = block
    return found


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, _LISTS) and type(module).forward is not nn.Module.forward


class RoutingBlock:
    """A block that routes tokens to experts, run example by example.

    So that every expert's tokens are one example's. The taps of the experts wait until the end of
    the backward and are then squared in one call over ragged segments.
    """

    def __init__(self, sink: Sink, module: nn.Module, where: str) -> None:
        self.sink, self.module, self.where = sink, module, where
        self._before: Any = None

    def install(self) -> RoutingBlock:
        """Puts a forward over the module's own, which remove() takes away."""
        own = self.module.forward
        self._before = self.module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = self.sink.current
            if current is None or current.layout.unit == "batch":
                return own(*args, **kwargs)
            if current.layout.only is not None:
                return own(*args, **kwargs)  # inside another block
            return self._split(own, current, args, kwargs)

        self.module.forward = forward
        return self

    def _split(
        self,
        forward: Callable[..., Any],
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        layout = current.layout
        leaves, spec = pytree.tree_flatten((args, kwargs))
        first = next((t for t in leaves if isinstance(t, Tensor)), None)
        if first is not None:
            layout.see(first.shape[:2])
        parts: list[Any] = []
        try:
            for n in range(layout.examples):
                layout.only = n
                mine = [
                    layout.cut(t, n, self.where) if isinstance(t, Tensor) else t for t in leaves
                ]
                part_args, part_kwargs = pytree.tree_unflatten(mine, spec)
                parts.append(forward(*part_args, **part_kwargs))
        finally:
            layout.only = None
        flat = [pytree.tree_leaves(part) for part in parts]
        joined = [
            layout.join(list(same), self.where) if isinstance(same[0], Tensor) else same[0]
            for same in zip(*flat, strict=True)
        ]
        return pytree.tree_unflatten(joined, pytree.tree_structure(parts[0]))

    def remove(self) -> None:
        """The module's own forward again."""
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._before
