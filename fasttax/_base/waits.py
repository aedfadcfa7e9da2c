"""Where the host would wait for a device, and what is done instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def waits(t: Tensor) -> bool:
    """Whether a look at the values of `t` waits for all that its device has been given to do.

    One under FakeTensorMode has none, and counts as on a device.
    """
    return t.device.type != "cpu" or isinstance(t, FakeTensor)


def over(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; from the CPU through pinned memory, since other copies wait for the device.

    The result is ordered before the work that the current stream is given after it.
    """
    if t.device.type == "cpu" and device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


class Ranges:
    """Values on a device that must lie in a range, which is looked at when the host waits anyway.

    What computes with them meanwhile clamps them: nothing is read outside, and whatever it made is
    not given out before `check`.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, Callable[[str], Exception]]] = {}
        self._bounds: dict[str, tuple[float, float]] = {}

    def add(
        self, name: str, values: Tensor, low: float, high: float, error: Callable[[str], Exception]
    ) -> None:
        """`values` are `name`'s, each of which must be in [low, high].

        Args:
            name: what they are; the ranges of one name are one.
            values: any number; NaN is in no range.
            low: the least that is right.
            high: the greatest.
            error: from what was found, "low to high".
        """
        if not values.numel():
            return
        least, most = values.aminmax()
        if name in self._found:
            other_least, other_most, _ = self._found[name]
            least, most = torch.minimum(least, other_least), torch.maximum(most, other_most)
        self._found[name] = least, most, error
        self._bounds[name] = low, high

    def join(self, other: Ranges) -> None:
        """Takes over what another one has found."""
        for name, (least, most, error) in other._found.items():
            self.add(name, torch.stack((least, most)), *other._bounds[name], error)

    def check(self) -> None:
        """Looks.

        Raises:
            Exception: what the first `error` makes whose values are outside.
        """
        for name, (least, most, error) in self._found.items():
            low, high = self._bounds[name]
            if not (low <= least.item() and most.item() <= high):
                raise error(f"{least.item()} to {most.item()}")
