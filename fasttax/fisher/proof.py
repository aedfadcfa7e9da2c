"""When two runs of a model gave the same numbers, but for the rounding of their dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttax.fisher.layout import WAY_OUT

# of a norm: what batches of another size change in a matrix product's rounding, and more
_SLACK = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.1


def slack_of(*tensors: Tensor) -> float:
    """The relative error that tells rounding from another number, of the least exact tensor."""
    widths = [_SLACK.get(t.dtype, _HALF) for t in tensors if t.is_floating_point()]
    if any(torch.is_autocast_enabled(t.device.type) for t in tensors):
        widths.append(_HALF)
    return max(widths, default=0.0)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are of one shape and hold the same numbers, NaN and infinities too."""
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    a, b = (torch.where(finite, t.double(), 0.0) for t in (found, expected))
    return float((a - b).norm()) <= slack_of(found, expected) * float(b.norm()) + 1e-30


def disagreement(op: str, wrong: list[str]) -> str:
    """The error of taps that autograd does not agree with."""
    more = ""
    if len(wrong) > 10:
        more = f"\n  and {len(wrong) - 10} more"
    return (
        f"{op}: the layers' taps disagree with autograd on:\n  "
        + "\n  ".join(wrong[:10])
        + f"{more}\nthese weights are used outside their own module's forward (or in a way it "
        f"does not show); {WAY_OUT}"
    )
