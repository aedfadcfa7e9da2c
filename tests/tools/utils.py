"""Comparisons of results.

An error is judged by PyTorch's own error at the same dtype against float64, never by a round
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax._base.timing import peak_extra_bytes


def assert_within(
    out: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    name: str = "",
) -> None:
    """Whether the error of `out` is at most `factor` times PyTorch's own, and some roundings.

    max|out - truth| <= factor max|baseline - truth| + ulps eps max|truth|, eps of out's dtype.

    Args:
        out: the result.
        baseline: what PyTorch's own composition gives in out's dtype.
        truth: the same in float64.
        factor: on PyTorch's own error.
        ulps: for a baseline that is right by luck.
        name: of the result, in errors.
    """
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    truth = truth.double()
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isnan(out), torch.isnan(truth)), "NaN in other places than the truth's"
    assert torch.equal(out[torch.isinf(truth)].double(), truth[torch.isinf(truth)]), (
        "infinities differ"
    )
    if not finite.any():
        return
    error = (out.double() - truth)[finite].abs().max().item()
    own = (
        torch.nan_to_num((baseline.double() - truth)[finite].abs(), nan=0.0, posinf=0.0)
        .max()
        .item()
    )
    scale = truth[finite].abs().max().item()
    # the truth is a float64 composition and has roundings of its own
    allowed = (
        factor * own
        + ulps * torch.finfo(out.dtype).eps * scale
        + 16 * torch.finfo(torch.float64).eps
    )
    assert error <= allowed, (
        f"{name} error {error:.3e} > {allowed:.3e} (PyTorch's own {own:.3e}, scale {scale:.3e})"
    )


def own_result(float32: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's own result in `dtype`, from its float32 one.

    In float64 it has float32's error 2^29 times smaller, times four, for the truth is a float64
    composition with that error too.
    """
    if dtype == torch.float64:
        return truth + (float32 - truth) * 2.0**-27
    return float32.to(dtype)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    truth = truth.double()
    return float((out.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def peak_bytes(call: Callable[[], None]) -> int:
    """The most that torch's allocator held at once for `call`, over what it held before."""
    peak = peak_extra_bytes(call)
    assert peak, "no allocation was seen"
    return peak


def named(name: object) -> Callable[[str], str]:
    """For `msg` of assert_close: what differs, in front of how."""
    return lambda text: f"{name}: {text}"


def assert_says(
    call: Callable[[], Any],
    error: type[Exception] | tuple[type[Exception], ...],
    words: Iterable[str],
) -> None:
    """The call raises `error`, whose text has all of `words`."""
    with pytest.raises(error) as caught:
        call()
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"
