"""When two runs of a model gave the same numbers, but for the rounding of their dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fasttax.fisher.layout import WAY_OUT

# of a norm: what batches of another size change in a matrix product's rounding, and more; many
# norms of float64 models compute in float32
_SLACK = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF = 0.1
WIDE = (torch.float32, torch.float64)


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


def is_exact(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether a model of these dtypes computes in float32 or float64."""
    return all(d in WIDE for d in dtypes) and not torch.is_autocast_enabled(device.type)


def differences(
    params: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    exact: bool,
) -> list[str]:
    """A line for each of `params` whose gradients, or roots of squares, are not autograd's.

    Args:
        params: the parameters.
        found: the taps', by name; none is 0.
        truth: autograd's.
        exact: see is_exact.

    Raises:
        ValueError: one of autograd's is NaN or infinite, so that nothing can be compared.
    """
    sizes = {name: float(t.double().norm()) for name, t in truth.items()}
    odd = [name for name, size in sizes.items() if not math.isfinite(size)]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            "DiagonalFisher: expected finite gradients, got NaN or infinite ones of "
            f"{', '.join(odd[:3])}{more}; look at the model's weights, its inputs and its loss "
            "(float16 overflows at 65504: take bfloat16 or float32)"
        )
    largest = max(sizes.values(), default=0.0)
    wrong = []
    for name, p in params.items():
        slack, smallest = 0.1, 1e-2
        if exact and p.dtype == torch.float64:
            slack, smallest = 1e-5, 1e-7
        elif exact:
            slack, smallest = 1e-3, 1e-6
        noise = smallest * largest  # in a gradient that is 0 on paper, as a key's bias
        nothing = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        expected = truth.get(name, nothing).double()
        error = float((found.get(name, nothing).double() - expected).norm())
        size = sizes.get(name, 0.0)
        if not error <= slack * size + noise:
            off = error / max(size, 1e-30)
            wrong.append(f"{name}: off by {off:.1e} of its gradient's norm")
    return wrong


def roots(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of sums of squares, what compares as gradients do."""
    return {name: t.double().clamp_min(0).sqrt() for name, t in squares.items()}


def disagreement(op: str, wrong: list[str]) -> str:
    """The error of taps that autograd does not agree with."""
    return (
        f"{op}: the layers' taps disagree with autograd on:\n  {_first(wrong)}\nthese weights are "
        f"used outside their own module's forward (or in a way it does not show); {WAY_OUT}"
    )


def not_the_sum(op: str, wrong: list[str]) -> str:
    """The error of a block whose loss is not the sum of its examples' own."""
    return (
        f"{op}: loss: expected the losses of the examples, of which the block's own loss is the "
        f"sum, got gradients that sum to others of:\n  {_first(wrong)}\nsum the block's loss over "
        "its examples (a mean's gradients are smaller by their number), and give the same function "
        "of each; examples that meet in the loss (contrastive ones) have no gradient of their own"
    )


def _first(wrong: list[str]) -> str:
    lines = wrong[:10]
    if len(wrong) > 10:
        lines = [*lines, f"and {len(wrong) - 10} more"]
    return "\n  ".join(lines)
