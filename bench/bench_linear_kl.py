"""linear_token_kl and linear_token_logprobs, forward and backward, at SmolLM2's head.

Times beside their GEMMs, and peak memory.

The GEMMs alone are timed as a user gets them, by `@` into fresh outputs: so autograd runs them.
"Warm" is the same into buffers that were there before, which no caller's gradients can be: the
machine's GEMM rate without a page fault.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.timing import Case
from fasttax.cli.bench import fused_linear_kl, step


def gemms(*pairs: tuple[Tensor, Tensor]) -> dict[str, Callable[[], None]]:
    """The products alone: into fresh memory, and into memory that is there."""
    outputs = [a @ b for a, b in pairs]

    def fresh() -> None:
        for a, b in pairs:
            a @ b

    def warm() -> None:
        for (a, b), out in zip(pairs, outputs, strict=True):
            torch.mm(a, b, out=out)

    return {f"its {len(pairs)} GEMMs alone": fresh, "the GEMMs, warm": warm}


def peer(name: str, call: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """A contender of TRL's, where it is installed."""
    if importlib.util.find_spec("trl") is None:
        print(f"{name} is left out: trl is not installed (pip install 'fasttax[trl]')")
        return {}
    return {name: call}


def under_autocast(call: Callable[[], None]) -> Callable[[], None]:
    """The call as a trainer with bf16=True makes it."""

    def inside() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            call()

    return inside


def tokens(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """A KL for every token, which makes the logits again in the backward."""
    return fasttax.linear_token_kl(hidden, weight, ref_hidden, ref_weight).mean()


def logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Mean log-prob of the ids, logits never whole."""
    logp = fasttax.linear_token_logprobs(hidden, weight, ids, reduction="mean").logp
    assert logp is not None
    return logp


def cases() -> Iterator[Case]:
    """The policy's head is trained, the reference's is not."""
    for shape, n, h, v in workloads.LINEAR_KL:
        hidden, weight = torch.randn(n, h), torch.randn(v, h) / h**0.5
        refs, ids = (
            (hidden + 0.1 * torch.randn(n, h), weight + 0.01 * torch.randn(v, h)),
            (torch.randint(v, (n,)),),
        )
        leaves, x, half = (
            (hidden, weight),
            hidden @ weight.T,
            (hidden.bfloat16(), weight.bfloat16()),
        )
        half_refs, half_x = (refs[0].bfloat16(), refs[1].bfloat16()), x.bfloat16()
        ours = [(hidden, weight.T), (x, weight), (x.T, hidden)]
        half_ours = [(half[0], half[1].T), (half_x, half[1]), (half_x.T, half[0])]
        flops, size = 2.0 * n * h * v, 4.0 * (v * h + n * h)
        eager, trl = baselines.eager_linear_kl, baselines.trl_linear_kl

        contenders = {
            **gemms(*ours, (refs[0], refs[1].T)),
            "eager": step(eager, leaves, refs),
            **peer("TRL", step(trl, leaves, refs)),
            "fasttax": step(fused_linear_kl, leaves, refs),
        }
        yield Case(
            "linear_token_kl forward+backward, float32",
            shape,
            contenders,
            3 * size,
            4 * flops,
            memory=True,
        )
        contenders = {
            "eager": step(eager, leaves, refs),
            **peer("TRL", step(trl, leaves, refs)),
            "fasttax": step(tokens, leaves, refs),
        }
        yield Case(
            "linear_token_kl per token (recomputes), float32",
            shape,
            contenders,
            3 * size,
            6 * flops,
            headline=False,
            memory=True,
        )
        contenders = {
            **gemms(*half_ours, (half_refs[0], half_refs[1].T)),
            "eager": step(eager, half, half_refs),
            **peer("TRL", step(trl, half, half_refs)),
            "fasttax": step(fused_linear_kl, half, half_refs),
        }
        yield Case(
            "linear_token_kl forward+backward, bfloat16",
            shape,
            contenders,
            1.5 * size,
            4 * flops,
            headline=False,
            memory=True,
        )
        contenders = {
            **gemms(*half_ours, (half_refs[0], half_refs[1].T)),
            "eager": under_autocast(step(eager, leaves, refs)),
            "fasttax": under_autocast(step(fused_linear_kl, leaves, refs)),
        }
        yield Case(
            "linear_token_kl forward+backward, float32 under bfloat16 autocast",
            shape,
            contenders,
            3 * size,
            4 * flops,
            headline=False,
            memory=True,
        )

        contenders = {
            **gemms(*ours),
            "eager": step(baselines.eager_linear_logprobs, leaves, ids),
            **peer("TRL", step(baselines.trl_linear_logprobs, leaves, ids)),
            "fasttax": step(logprobs, leaves, ids),
        }
        yield Case(
            "linear_token_logprobs forward+backward, float32",
            shape,
            contenders,
            2 * size,
            3 * flops,
            memory=True,
        )
        contenders = {
            **gemms(*half_ours),
            "eager": step(baselines.eager_linear_logprobs, half, ids),
            **peer("TRL", step(baselines.trl_linear_logprobs, half, ids)),
            "fasttax": step(logprobs, half, ids),
        }
        yield Case(
            "linear_token_logprobs forward+backward, bfloat16",
            shape,
            contenders,
            size,
            3 * flops,
            headline=False,
            memory=True,
        )
