"""token_kl, forward and backward through autograd with a fresh gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.timing import Case


def cases() -> Iterator[Case]:
    compiled = baselines.compiled(baselines.eager_kl)

    def fused(x: Tensor, y: Tensor) -> Tensor:
        return fasttax.token_kl(x, y, reduction="mean")

    for dtype in (torch.float32, torch.bfloat16):
        for shape, n, v in workloads.KL:
            x = (torch.randn(n, v) * 3).to(dtype)
            y = (x.float() + 0.3 * torch.randn(n, v)).to(dtype)

            def step(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = x, y: Tensor = y) -> Callable[[], None]:
                def call() -> None:
                    leaf = x.detach().requires_grad_()
                    function(leaf, y).backward()

                return call

            name = f"token_kl forward+backward, {str(dtype).removeprefix('torch.')}"
            contenders = {"eager": step(baselines.eager_kl), "torch.compile": step(compiled), "fasttax": step(fused)}
            # read both logits and write one gradient, once each
            yield Case(name, shape, contenders, floor_bytes=3 * x.numel() * x.element_size())
