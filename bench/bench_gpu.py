"""The KL and EWC families on a GPU (`make bench-gpu`): CUDA C++ and Triton against eager PyTorch and torch.compile of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.bench_kl import STATS, forward, fused, fused_stats, step
from bench.timing import Case
from fasttax.kl import tempering


def triton_step(x: Tensor, y: Tensor) -> Callable[[], Any]:
    """token_kl's mean and its gradient by Triton's kernel, which is not the op's own where CUDA C++ is built."""
    from fasttax.triton import kl

    weight, options = torch.full(x.shape[:1], 1 / x.shape[0], device=x.device), tempering("bench").args()
    return lambda: kl.token_kl_grad(weight, x, y, None, *options, True, False)


def cases(device: str = "cuda", shapes: Sequence[tuple[str, int, int]] = workloads.GPU_KL, parameters: int = 1 << 30) -> Iterator[Case]:
    compiled, compiled_stats = baselines.compiled(baselines.eager_kl), baselines.compiled(baselines.eager_stats)
    for dtype in (torch.bfloat16, torch.float32):
        for shape, n, v in shapes:
            x = (torch.randn(n, v, device=device) * 3).to(dtype)
            y = (x.float() + 0.3 * torch.randn(n, v, device=device)).to(dtype)
            ids = torch.randint(v, (n,), device=device)
            size, name = x.numel() * x.element_size(), str(dtype).removeprefix("torch.")
            contenders = {"eager": step(baselines.eager_kl, (x,), (y,)), "torch.compile": step(compiled, (x,), (y,)), "Triton": triton_step(x, y),
                          "fasttax": step(fused, (x,), (y,))}  # fmt: skip
            yield Case(f"token_kl forward+backward, {name}", shape, contenders, floor_bytes=3 * size)
            contenders = {"eager": forward(baselines.eager_kl, x, y), "torch.compile": forward(compiled, x, y), "fasttax": forward(fused, x, y)}
            yield Case(f"token_kl forward only, {name}", shape, contenders, floor_bytes=2 * size)
            contenders = {"eager": step(baselines.eager_stats, (x,), (y, ids)), "torch.compile": step(compiled_stats, (x,), (y, ids)),
                          "fasttax": step(fused_stats, (x,), (y, ids))}  # fmt: skip
            yield Case(f"token_stats ({', '.join(STATS)}) forward+backward, {name}", shape, contenders, floor_bytes=5 * size)
    theta, grad, anchor, fisher = torch.rand(4, parameters, device=device).unbind()
    one = torch.compile(baselines.loop_ewc, dynamic=False)
    contenders = {
        "foreach": lambda: baselines.foreach_ewc([theta], [grad], [anchor], [fisher], 0.5),
        "torch.compile": lambda: one(grad, theta, anchor, fisher, 0.5),
        "fasttax": lambda: fasttax.functional.ewc_add_grad_([theta], [grad], [anchor], [fisher], 0.5),
    }
    yield Case("ewc_add_grad_, float32", f"{parameters / 1e6:.0f} M parameters", contenders, floor_bytes=20 * parameters)
