"""token_kl and token_stats, forward and backward through autograd with a fresh gradient, and forward alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.timing import Case

STATS = ("logp", "entropy", "kl_policy_ref", "kl_ref_policy")


def cases() -> Iterator[Case]:
    compiled = baselines.compiled(baselines.eager_kl)

    compiled_stats = baselines.compiled(baselines.eager_stats)

    def fused(x: Tensor, y: Tensor) -> Tensor:
        return fasttax.token_kl(x, y, reduction="mean")

    def tokens(x: Tensor, y: Tensor) -> Tensor:
        return fasttax.token_kl(x, y).sum()

    def fused_stats(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        stats = fasttax.token_stats(x, y, ids, outputs=STATS)
        return torch.stack([getattr(stats, name) for name in STATS]).sum()

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
            size = x.numel() * x.element_size()
            yield Case(name, shape, contenders, floor_bytes=3 * size)

            def forward(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = x, y: Tensor = y) -> Callable[[], None]:
                def call() -> None:
                    with torch.no_grad():
                        function(x, y)

                return call

            contenders = {"eager": forward(baselines.eager_kl), "torch.compile": forward(compiled), "fasttax": forward(fused)}
            yield Case(name.replace("forward+backward", "forward only"), shape, contenders, floor_bytes=2 * size)

            ids = torch.randint(v, (n,))
            contenders = {
                "eager": step(partial(baselines.eager_stats, ids=ids)),
                "torch.compile": step(partial(compiled_stats, ids=ids)),
                "token_kl alone": step(tokens),
                "fasttax": step(partial(fused_stats, ids=ids)),
            }
            yield Case(name.replace("token_kl", "token_stats (logp, entropy, both KLs)"), shape, contenders, floor_bytes=5 * size)
    yield from linear_cases()


def linear_cases() -> Iterator[Case]:
    """SmolLM2's head, trained, against a frozen one."""
    for shape, n, h, v in workloads.LINEAR_KL:
        hidden, weight = torch.randn(n, h), torch.randn(v, h) / h**0.5
        ref_hidden, ref_weight = hidden + 0.1 * torch.randn(n, h), weight + 0.01 * torch.randn(v, h)

        def step(function: Callable[..., Tensor], hidden: Tensor = hidden, weight: Tensor = weight,
                 refs: tuple[Tensor, Tensor] = (ref_hidden, ref_weight)) -> Callable[[], None]:  # fmt: skip
            def call() -> None:
                function(hidden.detach().requires_grad_(), weight.detach().requires_grad_(), *refs).backward()

            return call

        def gemms(hidden: Tensor = hidden, weight: Tensor = weight, refs: tuple[Tensor, Tensor] = (ref_hidden, ref_weight)) -> None:
            x = hidden @ weight.T
            refs[0] @ refs[1].T
            x @ weight
            x.T @ hidden

        contenders = {
            "4 GEMMs alone": gemms,
            "eager": step(baselines.eager_linear_kl),
            "fasttax": step(partial(fasttax.linear_token_kl, reduction="mean")),
        }
        yield Case("linear_token_kl forward+backward, float32", shape, contenders, floor_bytes=4 * (3 * v * h + 4 * n * h))
