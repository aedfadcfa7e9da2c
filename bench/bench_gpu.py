"""KL, EWC and Fisher on a GPU (`make bench-gpu`).

CUDA C++ and Triton against eager PyTorch and torch.compile of the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from bench import baselines, workloads
from bench.bench_kl import STATS, forward, fused_stats
from bench.timing import Case
from fasttax.cli.bench import fused_kl, step
from fasttax.kl.call import tempering


def triton_step(x: Tensor, y: Tensor) -> Callable[[], Any]:
    """token_kl's mean and its gradient by Triton's kernel.

    Where CUDA C++ is built it is not the op's own.
    """
    from fasttax.triton import kl_launch as kl

    weight, options = (
        torch.full(x.shape[:1], 1 / x.shape[0], device=x.device),
        tempering("bench").args(),
    )
    return lambda: kl.token_kl_grad(weight, x, y, None, *options, True, False)


def cases(
    device: str = "cuda",
    shapes: Sequence[tuple[str, int, int]] = workloads.GPU_KL,
    parameters: int = 1 << 30,
    layers: Sequence[tuple[str, int, int, int, int]] = workloads.GPU_SQGRAD,
) -> Iterator[Case]:
    """All families; the arguments make them small, for a test on the CPU."""
    yield from kl_cases(device, shapes)
    yield from ewc_cases(device, parameters)
    yield from fisher_cases(device, layers, parameters)


def kl_cases(device: str, shapes: Sequence[tuple[str, int, int]]) -> Iterator[Case]:
    """CUDA C++ and Triton beside eager PyTorch and torch.compile."""
    compiled, compiled_stats = (
        baselines.compiled(baselines.eager_kl),
        baselines.compiled(baselines.eager_stats),
    )
    for dtype in (torch.bfloat16, torch.float32):
        for shape, n, v in shapes:
            x = (torch.randn(n, v, device=device) * 3).to(dtype)
            y = (x.float() + 0.3 * torch.randn(n, v, device=device)).to(dtype)
            ids = torch.randint(v, (n,), device=device)
            size, name = x.numel() * x.element_size(), str(dtype).removeprefix("torch.")
            contenders = {
                "eager": step(baselines.eager_kl, (x,), (y,)),
                "torch.compile": step(compiled, (x,), (y,)),
            }
            if x.is_cuda:
                contenders["Triton"] = triton_step(x, y)
            contenders["fasttax"] = step(fused_kl, (x,), (y,))
            yield Case(
                f"token_kl forward+backward, {name}", shape, contenders, floor_bytes=3 * size
            )
            contenders = {
                "eager": forward(baselines.eager_kl, x, y),
                "torch.compile": forward(compiled, x, y),
                "fasttax": forward(fused_kl, x, y),
            }
            yield Case(f"token_kl forward only, {name}", shape, contenders, floor_bytes=2 * size)
            contenders = {
                "eager": step(baselines.eager_stats, (x,), (y, ids)),
                "torch.compile": step(compiled_stats, (x,), (y, ids)),
                "fasttax": step(fused_stats, (x,), (y, ids)),
            }
            yield Case(
                f"token_stats ({', '.join(STATS)}) forward+backward, {name}",
                shape,
                contenders,
                floor_bytes=5 * size,
            )


def ewc_cases(device: str, parameters: int) -> Iterator[Case]:
    """The penalty's gradient and AdamW with it, on one tensor."""
    theta, grad, anchor, fisher = torch.rand(4, parameters, device=device).unbind()
    one = torch.compile(baselines.loop_ewc, dynamic=False)
    contenders: dict[str, Callable[[], Any]] = {
        "foreach": lambda: baselines.foreach_ewc([theta], [grad], [anchor], [fisher], 0.5),
        "torch.compile": lambda: one(grad, theta, anchor, fisher, 0.5),
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(
            [theta], [grad], [anchor], [fisher], 0.5
        ),
    }
    size = f"{parameters / 1e6:.0f} M parameters"
    yield Case("ewc_add_grad_, float32", size, contenders, floor_bytes=20 * parameters)
    module = nn.Module()
    module.p = nn.Parameter(theta)
    module.p.grad = grad
    plain = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    held = fasttax.AdamWEWC(
        module.parameters(), ewc=fasttax.EWC(module, {"p": fisher}, strength=0.5), lr=1e-6
    )
    held.state = plain.state  # one set of moments: both step the same memory
    yield Case(
        "AdamWEWC, float32",
        size,
        {"fused AdamW alone": plain.step, "fasttax": held.step},
        floor_bytes=36 * parameters,
    )


def fisher_cases(
    device: str, layers: Sequence[tuple[str, int, int, int, int]], parameters: int
) -> Iterator[Case]:
    """Squares of linear layers and of lists of gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        for shape, n, t, i, o in layers:
            a, d = (torch.randn(n, t, width, device=device).to(dtype) for width in (i, o))
            out = torch.zeros(o, i, device=device)
            contenders: dict[str, Callable[[], Any]] = {
                "weight-gradient GEMM": lambda a=a, d=d: torch.mm(
                    d.flatten(0, 1).T, a.flatten(0, 1)
                ),  # type: ignore[misc]
                "materialised": partial(baselines.materialised_sqgrad, a, d),
                "fasttax": partial(fasttax.functional.linear_sqgrad, a, d, out=out),
            }
            yield Case(
                f"linear_sqgrad, {str(dtype).removeprefix('torch.')}",
                shape,
                contenders,
                a.nbytes + d.nbytes + 2 * out.nbytes,
                2 * n * t * i * o,
            )
    total, grad = torch.rand(2, parameters, device=device).unbind()
    contenders = {
        "foreach": lambda: torch._foreach_addcmul_([total], [grad], [grad]),
        "fasttax": lambda: fasttax.functional.accumulate_sqgrad_([total], [grad]),
    }
    yield Case(
        "accumulate_sqgrad_, float32",
        f"{parameters / 1e6:.0f} M parameters",
        contenders,
        floor_bytes=12 * parameters,
    )
