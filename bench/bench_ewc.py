"""EWC on SmolLM2-135M's parameters: the gradient of the penalty, AdamW with it, LoRA's delta W."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from bench import baselines, workloads
from bench.timing import Case
from fasttax._base.packed import encode
from fasttax.ewc.ops import add_grad_


class Parameters(nn.Module):
    """A module of nothing but SmolLM2's parameters, with gradients."""

    def __init__(self) -> None:
        super().__init__()
        values, grads = workloads.smollm2_like(2)
        self.p = nn.ParameterList(values)
        for p, g in zip(self.p, grads, strict=True):
            p.grad = g

    def ewc(self, storage: str, anchor_dtype: torch.dtype) -> fasttax.EWC:
        """An EWC over all of them, with a random Fisher."""
        fisher = {f"p.{i}": torch.rand(p.shape) for i, p in enumerate(self.p)}
        return fasttax.EWC(self, fisher, strength=0.5, storage=storage, anchor_dtype=anchor_dtype)


def add_grad_cases() -> Iterator[Case]:
    """Floor: theta, anchor, Fisher and gradient read, the gradient written, in their dtypes."""
    params, grads, anchors, fishers = workloads.smollm2_like(4)
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_()
        p.grad = g
    compiled = baselines.compiled(baselines.loop_ewc)
    detached = [p.detach() for p in params]
    count = sum(p.numel() for p in params)
    size = f"{count / 1e6:.1f} M parameters"

    def loop() -> Tensor:
        return torch.stack(
            [
                compiled(g, p, a, f, 0.5)
                for g, p, a, f in zip(grads, detached, anchors, fishers, strict=True)
            ]
        ).sum()

    float32: dict[str, Callable[[], Any]] = {
        "autograd loop": lambda: baselines.autograd_ewc(params, anchors, fishers, 0.5),
        "foreach": lambda: baselines.foreach_ewc(detached, grads, anchors, fishers, 0.5),
        "torch.compile": loop,
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(detached, grads, anchors, fishers, 0.5),
    }
    yield Case("ewc_add_grad_, float32", size, float32, floor_bytes=20 * count, rounds=5)
    half_anchors, half_fishers = ([t.bfloat16() for t in tensors] for tensors in (anchors, fishers))
    codes = [encode(f, "u8log") for f in fishers]
    values, scales = [c.values for c in codes], [c.scales for c in codes if c.scales is not None]
    packed: dict[str, Callable[[], Any]] = {
        "torch.compile, float32": loop,
        "fasttax, bf16 anchor and u8log Fisher": lambda: add_grad_(
            detached, grads, half_anchors, values, scales, 0.5, 1.0
        ),
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(
            detached, grads, half_anchors, half_fishers, 0.5
        ),
    }
    yield Case(
        "ewc_add_grad_, bf16 anchor and Fisher", size, packed, floor_bytes=16 * count, rounds=7
    )


def adamw_cases() -> Iterator[Case]:
    """Floor: AdamW's 28 bytes an element, and those of anchor and Fisher."""
    model = Parameters()
    count = sum(p.numel() for p in model.parameters())
    for storage, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("u8log", torch.bfloat16),
    ):
        plain = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        ewc = model.ewc(storage, dtype)
        held = fasttax.AdamWEWC(model.parameters(), ewc=ewc, lr=1e-6)
        held.state = plain.state  # one set of moments: both step the same memory

        def apart(ewc: fasttax.EWC = ewc, plain: torch.optim.Optimizer = plain) -> None:
            ewc.add_grad_()
            plain.step()

        contenders: dict[str, Callable[[], Any]] = {
            "fused AdamW alone": plain.step,
            "add_grad_, then fused AdamW": apart,
            "fasttax": held.step,
        }
        bytes_each = {"fp32": 36, "bf16": 32, "u8log": 31}[storage]
        anchor = str(dtype).removeprefix("torch.")
        yield Case(
            f"AdamWEWC, {storage} Fisher, {anchor} anchor",
            f"{count / 1e6:.1f} M parameters",
            contenders,
            floor_bytes=bytes_each * count,
            rounds=5,
            headline=storage != "u8log",
        )


def dense_lora(a: Tensor, b: Tensor, fisher: Tensor) -> None:
    """The penalty on a dense B @ A, forward and backward."""
    (0.5 * (fisher * (0.25 * b @ a) ** 2).sum()).backward()


def lora_cases() -> Iterator[Case]:
    """Floor: the Fisher read once; three products with B, A and the pull."""
    width, r = 4096, 16
    a, b = (torch.randn(shape).mul_(0.02).requires_grad_() for shape in ((r, width), (width, r)))
    for name, fisher in (
        ("float32", torch.rand(width, width)),
        ("bfloat16", torch.rand(width, width).bfloat16()),
    ):

        def ours(fisher: Tensor = fisher) -> None:
            fasttax.functional.lora_ewc_penalty(a, b, fisher, 0.25, 1.0).backward()

        def eager(fisher: Tensor = fisher) -> None:
            dense_lora(a, b, fisher)

        yield Case(
            f"lora_ewc_penalty forward+backward, {name} Fisher",
            f"{width}x{width}, r={r}",
            {"autograd": eager, "fasttax": ours},
            floor_bytes=fisher.nbytes,
            floor_flops=6.0 * r * width * width,
            headline=name == "float32",
        )


def cases() -> Iterator[Case]:
    """LoRA's first: on what the others leave in the heap, eager's 64 MB temporaries are cheaper."""
    yield from lora_cases()
    yield from add_grad_cases()
    yield from adamw_cases()
