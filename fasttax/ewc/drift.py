"""How far a model has drifted from its anchor, and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """sum fisher * (theta - anchor)^2 by parameter, 0-d tensors.

    The penalty is strength/2 times the total.

    Example:
        >>> model(**batch).loss.backward()
        >>> optimizer.step()
        >>> drift = ewc.distance()
        >>> moved_most = max(drift.per_layer, key=drift.per_layer.get)
    """

    per_parameter: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Over all parameters."""
        return _sum(list(self.per_parameter.values()))

    @property
    def per_module(self) -> dict[str, Tensor]:
        """By the module that owns the parameters."""
        return self._by(lambda name: name.rpartition(".")[0])

    @property
    def per_layer(self) -> dict[str, Tensor]:
        """By numbered layer ("model.layers.3"); modules outside all of them by themselves."""

        def layer(name: str) -> str:
            numbered = re.match(r".*?\.?\d+(?=\.)", name)
            return numbered[0] if numbered else name.rpartition(".")[0]

        return self._by(layer)

    @property
    def share(self) -> dict[str, Tensor]:
        """The part of the total that each layer holds; 0 everywhere where nothing has moved."""
        layers, total = self.per_layer, self.total
        return {
            name: torch.where(total > 0, value.to(total.device) / total, 0.0)
            for name, value in layers.items()
        }

    def _by(self, group: Callable[[str], str]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for name, value in self.per_parameter.items():
            parts.setdefault(group(name), []).append(value)
        return {name: _sum(values) for name, values in parts.items()}


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device)
    return total
