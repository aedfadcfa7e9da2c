"""EWC's gradient on SmolLM2-135M's parameters, into existing gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fasttax
from bench import baselines, workloads
from bench.timing import Case


def cases() -> Iterator[Case]:
    params, grads, anchors, fishers = workloads.smollm2_like(4)
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_()
        p.grad = g
    compiled = baselines.compiled(baselines.loop_ewc)
    detached = [p.detach() for p in params]

    def loop() -> torch.Tensor:
        return torch.stack([compiled(g, p, a, f, 0.5) for g, p, a, f in zip(grads, detached, anchors, fishers, strict=True)]).sum()

    contenders = {
        "autograd loop": lambda: baselines.autograd_ewc(params, anchors, fishers, 0.5),
        "foreach": lambda: baselines.foreach_ewc(detached, grads, anchors, fishers, 0.5),
        "torch.compile": loop,
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(detached, grads, anchors, fishers, 0.5),
    }
    count = sum(p.numel() for p in params)
    yield Case("ewc_add_grad_, float32", f"{count / 1e6:.1f} M parameters", contenders, floor_bytes=20 * count, rounds=5)
