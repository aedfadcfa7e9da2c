"""What hypothesis draws for the calls of public functions: how many, and tensors of any layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tools import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# by Triton's interpreter, in which a call takes seconds
INTERPRETED = kernels.cpu_kernels() == ["triton"]
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130, 257)  # around vectors and tiles


def trials(
    request: pytest.FixtureRequest, short: int, long: int
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, the same ones in every short run."""
    soak = bool(request.config.getoption("--soak"))
    if INTERPRETED:
        short, long = max(2, short // 10), long // 10
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=long if soak else short,
        derandomize=not soak,
        deadline=None,
        database=None,
        suppress_health_check=slow,
        phases=[Phase.generate, Phase.shrink],
    )


LAYOUTS = ("plain", "offset", "columns", "every other", "last dimension turned", "repeated")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "offset":  # and no address that vectors like
        flat = torch.cat((t.new_zeros(1), t.reshape(-1)))
        return flat[1:].view(t.shape)
    if layout == "columns" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other" and t.dim():
        return torch.stack((t, t.flip(-1)), -1)[..., 0]
    if layout == "last dimension turned" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "repeated" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one sort: ordinary, large, all equal, one far above, or small."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    sort = draw(st.sampled_from(["ordinary", "large", "equal", "peaked", "small"]))
    if sort == "large":
        x = x * 30
    elif sort == "equal":
        x = torch.full_like(x, 3.0)
    elif sort == "peaked" and x.dim() and x.numel():
        x[..., 0] += 40
    elif sort == "small":
        x = x * 1e-3
    return laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


def suppressed(draw: st.DrawFn, *logits: Tensor) -> tuple[Tensor, ...]:
    """Logits, or the same with some tokens at -inf in all of them, as a sampler leaves them."""
    V = logits[0].shape[-1]
    if V < 2 or not draw(st.booleans()):
        return logits
    gone = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=V - 1))
    away = torch.zeros(V, dtype=torch.bool)
    away[gone] = True
    return tuple(x.masked_fill(away, -torch.inf) for x in logits)


def largest(*logits: Tensor) -> float:
    """Of all finite logits the largest, at least 1: what a logit's own rounding grows with."""
    finite = [x.double().abs()[x.isfinite()] for x in logits]
    return max(1.0, *(float(x.max()) for x in finite if x.numel()))


shapes = st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 10**6)
