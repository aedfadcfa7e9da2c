"""How far a Fisher estimate still is from its limit, estimated from the spread between batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fasttax._base import waits

COORDINATES = 64  # watched in each parameter


class SamplingError:
    """Relative error of the estimate, sqrt(sum_i var_i / sum_i F_i^2).

    Over up to 64 coordinates of each parameter. With batches b of n_b examples and sums x_b, F =
    sum x_b / sum n_b, and var = B/(B-1) sum (x_b - n_b F)^2 / (sum n_b)^2, the ratio estimator's
    variance (Cochran, Sampling Techniques, 1977, 6.19), which needs running sums alone.
    """

    def __init__(self, numels: Mapping[str, int]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.places = {
            n: torch.randint(0, m, (COORDINATES,), generator=draw, device="cpu").unique()
            for n, m in numels.items()
            if m
        }
        width = sum(p.numel() for p in self.places.values())
        self.total, self.squares, self.crossed = (
            torch.zeros(width, dtype=torch.float64, device="cpu") for _ in range(3)
        )
        self.counts = torch.zeros(3, dtype=torch.float64, device="cpu")  # batches, units, units^2

    def batch(self, value: Callable[[str], Tensor], units: int | Tensor) -> None:
        """After a batch of `units` examples: `value(name)` is the running sum of squares.

        On the device of the first parameter, so that nothing waits for it.
        """
        picked: list[Tensor] = []
        for name in self.places:
            flat = value(name).reshape(-1)
            self.places[name] = waits.over(self.places[name], flat.device)
            mine = flat[self.places[name]].double()
            picked.append(mine.to(picked[0].device if picked else mine.device))
        if not picked:
            return
        now = torch.cat(picked)
        self._move(now.device)
        x, self.total = now - self.total, now
        number = units if isinstance(units, Tensor) else torch.tensor(units, device="cpu")
        number = waits.over(number.double(), now.device)
        self.squares += x * x
        self.crossed += number * x
        self.counts += torch.stack((torch.ones_like(number), number, number**2))

    def _move(self, device: torch.device) -> None:
        """The running sums to where the parameters are, once."""
        if self.counts.device != device:
            self.restore({k: waits.over(t, device) for k, t in self.state().items()})

    def relative(self) -> float:
        """The relative error so far; NaN before the second batch."""
        batches, units, squared = self.counts.tolist()
        if batches < 2 or units == 0:
            return math.nan
        mean = self.total / units
        spread = self.squares - 2 * mean * self.crossed + mean * mean * squared
        variance = spread.clamp_min(0).sum() * batches / (batches - 1) / units**2
        size = (mean * mean).sum()
        if size == 0:
            return 0.0
        return float((variance / size).sqrt())  # NaN where the estimate is

    def state(self) -> dict[str, Tensor]:
        """The running sums, for a file; `restore` takes them back."""
        return {
            "total": self.total,
            "squares": self.squares,
            "crossed": self.crossed,
            "counts": self.counts,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        self.total, self.squares, self.crossed, self.counts = (
            state[k].clone() for k in ("total", "squares", "crossed", "counts")
        )
