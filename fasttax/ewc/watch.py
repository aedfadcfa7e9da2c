"""Whether the parameters that an EWC holds are still those of its model.

A head that is replaced or grown, load_state_dict(assign=True), or an adapter put around a layer
leaves the EWC with tensors that nobody trains: their penalty stays as it is without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fasttax._base import checks, dtensor, inner
from fasttax.ewc.adapters import moving
from fasttax.ewc.names import Names, active_adapters, saved_modules

SHOWN = 5  # names that an error lists
# FSDP1 marks the parameters that it has flattened
FSDP1 = (
    "parameters that are whole, or FSDP2's",
    "FSDP1's flattened ones",
    "make the EWC before the model is wrapped, and in a Trainer take attach(trainer, ewc=ewc), "
    "which holds each rank's part of it; or use FSDP2 (torch.distributed.fsdp.fully_shard)",
)
WAY_OUT = (
    "make the EWC anew on the model as it is (ewc.on(model) where names and shapes fit; else "
    "EWC(model, fisher, anchor=ewc.anchor) with a Fisher without those names), or make it after "
    "the change"
)


class Watch:
    """The path of modules to each held parameter, compared with what the model has there.

    A look takes about half a microsecond a module and parameter. What differs is looked up by name,
    so that a wrapper put between (torch.compile of a layer, activation checkpointing) is none.
    """

    def __init__(self, model: nn.Module, held: Mapping[str, Tensor]) -> None:
        """`held`: the parameters by their whole names in `model`; of LoRA the base weights."""
        self.model = model
        self.held = dict(held)
        names = Names(model)
        # every place where one is computed with, tied ones' several: the place, and the held name
        self._uses = {use: name for name, p in held.items() for use in names.names_of(p)}
        self._shapes = {name: theta.shape for name, theta in held.items()}
        self._edges: list[tuple[Any, str, Any]] | None = None  # owner, attribute, what it was
        self._copies: list[tuple[Any, list[str]]] = []  # PEFT's saved modules, and which is used
        self._layers = self._moving(names)

    def on(self, model: nn.Module, held: Mapping[str, Tensor]) -> Watch:
        """The same over a copy of the model, which may be under construction."""
        other = Watch.__new__(Watch)
        other.model, other.held, other._shapes = model, dict(held), self._shapes
        other._uses, other._edges, other._copies = self._uses, None, []
        other._layers = self._layers
        return other

    def check(self, op: str, argument: str = "ewc", way_out: str = "") -> None:
        """An error where a held parameter is not the model's any more.

        Raises:
            ValueError: it names up to five; `way_out` stands in for what helps an EWC.
        """
        if self._edges is not None and self._is_as_it_was(self._edges):
            return
        names = Names(self.model)
        lost = [use for use, name in self._uses.items() if not self._has(names, use, name)]
        lost += [name for name in self._grown() if name not in lost]
        if lost and any(getattr(theta, "_fsdp_flattened", False) for theta in self.held.values()):
            raise checks.fail(op, argument, *FSDP1)
        if lost:
            more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
            raise checks.fail(
                op,
                argument,
                "parameters that are the model's",
                f"{', '.join(lost[:SHOWN])}{more}, in whose place the model has another one, or "
                "one of another shape (a module was replaced or resized, a parameter assigned)",
                way_out or WAY_OUT,
            )
        layers = self._moving(names)
        for name, count in layers.items():
            if count != self._layers.get(name):
                raise checks.fail(
                    op,
                    argument,
                    "weights under the adapters that they had",
                    f"{name} under {count} adapter layers, {self._layers.get(name)} when the "
                    f"{'EWC' if argument == 'ewc' else argument} was made",
                    way_out
                    or "make the EWC anew, on the model with the adapters that it is trained with",
                )
        edges = [edge for use in self._uses for edge in self._path(names, use)]
        self._edges = list(
            {(id(owner), name): (owner, name, was) for owner, name, was in edges}.values()
        )
        self._copies = [(m, active_adapters(m)) for m in saved_modules(self.model).values()]

    def _is_as_it_was(self, edges: list[tuple[Any, str, Any]]) -> bool:
        return (
            all(
                getattr(owner, name, None) is was or _lent(getattr(owner, name, None), was)
                for owner, name, was in edges
            )
            and all(active_adapters(m) == used for m, used in self._copies)
            and not self._grown()
        )

    def _grown(self) -> list[str]:
        """Those whose shape has changed: transformers resizes embeddings in place.

        Weights that were packed since, as bitsandbytes does on the way to a GPU, are left out.
        """
        return [
            name
            for name, theta in self.held.items()
            if theta.shape != self._shapes[name] and inner.is_float(theta)
        ]

    def _has(self, names: Names, use: str, name: str) -> bool:
        found = names.find(use)
        if found is None:
            return False
        now, theta = names.parameters[found], self.held[name]
        return now is theta or _lent(now, theta)

    def _moving(self, names: Names) -> dict[str, int]:
        """How many adapter layers are over each held parameter."""
        found = {name: names.find(name) or name for name in self.held}
        return {
            name: len(moving(self.model, names, names.parameters[whole]))
            for name, whole in found.items()
        }

    def _path(self, names: Names, use: str) -> list[tuple[Any, str, Any]]:
        """Every (owner, attribute, value) from the model to the parameter."""
        *path, leaf = (names.find(use) or use).split(".")
        edges: list[tuple[Any, str, Any]] = []
        module: Any = self.model
        for part in path:
            child = module.get_submodule(part)
            edges.append((module, part, child))
            module = child
        return [*edges, (module, leaf, self.held[self._uses[use]])]


def _lent(now: Any, theta: Any) -> bool:
    """Whether `now` is the whole of a sharded parameter, which FSDP2 puts there for a pass."""
    return dtensor.is_sharded(theta) and isinstance(now, Tensor) and now.shape == theta.shape
