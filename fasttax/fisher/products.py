"""Linear layers' products under the taps of `update`, on CPUs where fasttax's are the faster.

torch's float32 products on x86 are MKL's, which takes vectors half as wide as the machine's on AMD.
Which is faster is measured once a process, and fasttax's are taken where they win clearly.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttax._base.gemm import gemm, mixed_gemm, pieces, project
from fasttax._base.library import no_second_derivative
from fasttax._base.modes import autocast_dtype, transforming

TOKENS = 256  # at a time: packed, they stay in cache while the weight streams by
WORTH = 1 << 16  # entries of a weight from which a product outweighs its call
CLEAR = 0.9  # of torch's time: below it noise does not choose
ROUNDS = 5
CPU = torch.device("cpu")


@contextlib.contextmanager
def fast_linear(model: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers of frozen float32 weights on the CPU run the faster products.

    A layer whose forward is replaced on the instance, as by accelerate's hooks, keeps it.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _fits(m)]
    if not layers or not mixed_gemm(CPU) or not own_is_faster(torch.get_num_threads()):
        yield
        return
    try:
        for m in layers:
            m.forward = functools.partial(_forward, m)  # type: ignore[method-assign]
        yield
    finally:
        for m in layers:
            vars(m).pop("forward", None)


def _fits(m: nn.Linear) -> bool:
    return (
        type(m) is nn.Linear
        and "forward" not in vars(m)
        and type(m.weight) is nn.Parameter
        and m.weight.device == CPU
        and m.weight.dtype == torch.float32
        and m.weight.numel() >= WORTH
    )


def _forward(m: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's own name
    frozen = not m.weight.requires_grad and (m.bias is None or not m.bias.requires_grad)
    plain = (
        type(input) is Tensor
        and input.device == CPU
        and input.dtype == m.weight.dtype
        and input.shape[-1] == m.in_features
        and autocast_dtype(CPU) is None
        and not transforming()
    )
    if not frozen or not plain:
        return F.linear(input, m.weight, m.bias)
    out: Tensor = _Linear.apply(input, m.weight, m.bias)
    return out


class _Linear(torch.autograd.Function):
    """x W^T + b and its gradient by x; the weight and the bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return *no_second_derivative((d_input(d, weight),), "DiagonalFisher"), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of x (..., I): times weight (O, I)^T + bias (O,), by fasttax's kernel."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for some in pieces(0, rows.shape[0], TOKENS):
        project(rows[some], weight, bias, out[some])
    return out.view(*x.shape[:-1], weight.shape[0])


def d_input(d: Tensor, weight: Tensor) -> Tensor:
    """Of d (..., O): times weight (O, I), by fasttax's kernel."""
    rows = d.reshape(-1, d.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    gemm(rows, weight, out, add=False)
    return out.view(*d.shape[:-1], weight.shape[1])


@functools.cache
def own_is_faster(threads: int) -> bool:
    """Whether fasttax's products take less than CLEAR of torch's time with so many threads.

    Of 256 tokens, 768 -> 768, forward and by the input; the least of ROUNDS rounds, in turns:
    30 to 60 ms.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x, weight = (
            torch.randn(rows, 768, dtype=torch.float32, device=CPU) for rows in (TOKENS, 768)
        )

        def torchs() -> Tensor:
            return F.linear(x, weight) @ weight

        def own() -> Tensor:
            return d_input(linear(x, weight, None), weight)

        seconds = [(_seconds(torchs), _seconds(own)) for _ in range(ROUNDS)]
    theirs, ours = (min(times) for times in zip(*seconds, strict=True))
    return ours < CLEAR * theirs


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
