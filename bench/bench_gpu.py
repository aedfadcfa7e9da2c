"""KL, EWC, AdamW and Fisher on a GPU (`make bench-gpu`): sizes of Llama 3, Qwen 2.5/3 and SmolLM2.

CUDA C++ and Triton beside eager PyTorch, torch.compile, Liger, TRL and torch's own AdamW, on rows
of every kind that bench/logits.py has. Times are the device's, from cold caches; a share is of what
a large copy, or a large product, reached in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from bench import baselines, gpu_peers, logits, workloads
from bench.bench_kl import STATS, forward, fused_stats
from bench.gpu_run import GpuCase, Spec
from fasttax.cli.bench import fused_kl, fused_linear_kl, step
from fasttax.kl.call import tempering

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    """Of the cases: those of the models, or small ones for a dry run."""

    kl: Sequence[tuple[str, int, int]] = workloads.GPU_KL
    kinds: tuple[int, int] = workloads.GPU_KINDS
    linear: Sequence[tuple[str, int, int, int]] = workloads.GPU_LINEAR
    parameters: Sequence[tuple[str, Sequence[tuple[int, ...]]]] = workloads.GPU_PARAMETERS
    sqgrad: Sequence[tuple[str, int, int, int, int]] = workloads.GPU_SQGRAD


TINY = Sizes(
    kl=(("4 x 300", 4, 300),),
    kinds=(4, 300),
    linear=(("6 tokens, 8 -> 50", 6, 8, 50),),
    parameters=(("3 parameters", [(40, 30), (7,), (9, 11)]),),
    sqgrad=(("N=2 T=3 5x7", 2, 3, 5, 7),),
)


def specs(device: torch.device, sizes: Sizes) -> list[Spec]:
    """All cases, the most important ones first: a budget that ends leaves out the last."""
    found = [
        *kl_specs(device, sizes.kl, torch.bfloat16),
        *ewc_specs(device, sizes.parameters),
        *linear_specs(device, sizes.linear),
        *kind_specs(device, sizes.kinds),
        *fisher_specs(device, sizes),
        *kl_specs(device, sizes.kl, torch.float32),
    ]
    names = [(spec.name, spec.shape) for spec in found]
    assert len(names) == len(set(names))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(kind: str, n: int, v: int, dtype: torch.dtype, device: torch.device) -> logits.Pair:
    """Policy and reference of a kind; synthetic ones are drawn on the device."""
    if kind not in logits.SYNTHETIC:
        x, y = logits.pair(kind, n, v, dtype)
        return x.to(device), y.to(device)
    torch.manual_seed(0)
    with device:
        x, y = logits.SYNTHETIC[kind](n, v)
    return x.to(dtype), y.to(dtype)


# --- the KL ---------------------------------------------------------------------------------------

NEAR = "moved .3"  # as a policy some steps away from its reference


def triton_step(x: Tensor, y: Tensor) -> Callable[[], Any]:
    """token_kl's mean and its gradient by Triton's kernel.

    Where CUDA C++ is built it is not the op's own.
    """
    from fasttax.triton import kl_launch as kl

    weight = torch.full(x.shape[:1], 1 / x.shape[0], device=x.device)
    options = tempering("bench").args()
    return lambda: kl.token_kl_grad(weight, x, y, None, *options, True, False)


def kl_specs(
    device: torch.device, shapes: Sequence[tuple[str, int, int]], dtype: torch.dtype
) -> Iterator[Spec]:
    """Value and gradient, the value alone, and token_stats."""
    for shape, n, v in shapes:
        of = partial(_kl_case, device, n, v, dtype)
        first = dtype == torch.bfloat16
        yield Spec(f"token_kl forward+backward, {_name(dtype)}", shape, of, first)
        of = partial(_forward_case, device, n, v, dtype)
        yield Spec(f"token_kl forward only, {_name(dtype)}", shape, of, first)
        of = partial(_stats_case, device, n, v, dtype)
        name = f"token_stats ({', '.join(STATS)}) forward+backward, {_name(dtype)}"
        yield Spec(name, shape, of, headline=False)


def _kl_case(device: torch.device, n: int, v: int, dtype: torch.dtype) -> GpuCase:
    """Floor: both logits read, one gradient written."""
    x, y = rows(NEAR, n, v, dtype, device)
    peers, absent = gpu_peers.kl_peers(x, y)
    contenders: Calls = {
        "eager": step(baselines.eager_kl, (x,), (y,)),
        "torch.compile": step(baselines.compiled(baselines.eager_kl), (x,), (y,)),
        **peers,
    }
    if x.is_cuda:
        contenders["Triton"] = triton_step(x, y)
    contenders["fasttax"] = step(fused_kl, (x,), (y,))
    return GpuCase(contenders, floor_bytes=3.0 * x.nbytes, absent=absent)


def _forward_case(device: torch.device, n: int, v: int, dtype: torch.dtype) -> GpuCase:
    """Floor: both logits read."""
    x, y = rows(NEAR, n, v, dtype, device)
    contenders: Calls = {
        "eager": forward(baselines.eager_kl, x, y),
        "torch.compile": forward(baselines.compiled(baselines.eager_kl), x, y),
        "fasttax": forward(fused_kl, x, y),
    }
    return GpuCase(contenders, floor_bytes=2.0 * x.nbytes)


def _stats_case(device: torch.device, n: int, v: int, dtype: torch.dtype) -> GpuCase:
    """Floor: both logits read twice, one gradient written."""
    x, y = rows(NEAR, n, v, dtype, device)
    ids = torch.randint(v, (n,), device=device)
    contenders: Calls = {
        "eager": step(baselines.eager_stats, (x,), (y, ids)),
        "torch.compile": step(baselines.compiled(baselines.eager_stats), (x,), (y, ids)),
        "fasttax": step(fused_stats, (x,), (y, ids)),
    }
    return GpuCase(contenders, floor_bytes=5.0 * x.nbytes)


def kind_specs(device: torch.device, size: tuple[int, int]) -> Iterator[Spec]:
    """The same op on every kind of rows, real ones where they are kept: none may be slow."""
    for kind in logits.kept_kinds():
        n, v = size
        if kind in logits.REAL:
            n, v = min(n, logits.ROWS), min(v, logits.REAL_VOCABULARY)
        make = partial(_kind_case, device, kind, n, v)
        name = f"token_kl on rows that are {kind}, bfloat16"
        yield Spec(name, f"{n} x {v}", make, headline=False)


def _kind_case(device: torch.device, kind: str, n: int, v: int) -> GpuCase:
    x, y = rows(kind, n, v, torch.bfloat16, device)
    contenders: Calls = {
        "eager": step(baselines.eager_kl, (x,), (y,)),
        "fasttax": step(fused_kl, (x,), (y,)),
    }
    return GpuCase(contenders, floor_bytes=3.0 * x.nbytes)


def linear_specs(
    device: torch.device, sizes: Sequence[tuple[str, int, int, int]]
) -> Iterator[Spec]:
    """KL and log-probs of hidden states, whose logits are never whole."""
    for shape, n, h, v in sizes:
        make = partial(_linear_case, device, n, h, v)
        yield Spec("linear_token_kl forward+backward, bfloat16", shape, make)
        make = partial(_logprobs_case, device, n, h, v)
        yield Spec("linear_token_logprobs forward+backward, bfloat16", shape, make, headline=False)


def _states(device: torch.device, n: int, h: int, v: int) -> tuple[Tensor, ...]:
    sizes = (n, v, n, v)
    return tuple((torch.randn(k, h, device=device) * h**-0.5).bfloat16() for k in sizes)


def _linear_case(device: torch.device, n: int, h: int, v: int) -> GpuCase:
    """Floor: both logits, and the gradients of hidden states and head: 4 products."""
    hidden, weight, ref_hidden, ref_weight = _states(device, n, h, v)
    own, ref = (hidden, weight), (ref_hidden, ref_weight)
    peers, absent = gpu_peers.linear_peers(own, ref)

    def mine(*tensors: Tensor) -> Tensor:
        return fused_linear_kl(*tensors)

    contenders: Calls = {
        "eager": step(lambda a, b, c, d: baselines.eager_linear_kl(a, b, c, d), own, ref),
        **peers,
        "fasttax": step(mine, own, ref),
    }
    read = 2.0 * (hidden.nbytes + weight.nbytes) + hidden.nbytes + weight.nbytes
    return GpuCase(contenders, read, 8.0 * n * h * v, absent=absent)


def _logprobs_case(device: torch.device, n: int, h: int, v: int) -> GpuCase:
    """Floor: 3 products."""
    hidden, weight, *_ = _states(device, n, h, v)
    ids = torch.randint(v, (n,), device=device)
    peers, absent = gpu_peers.logprob_peers(hidden, weight, ids)

    def mine(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = fasttax.linear_token_logprobs(hidden, weight, ids).logp
        assert logp is not None
        return logp.mean()

    contenders: Calls = {
        "eager": step(baselines.eager_linear_logprobs, (hidden, weight), (ids,)),
        **peers,
        "fasttax": step(mine, (hidden, weight), ()),
    }
    read = 2.0 * (hidden.nbytes + weight.nbytes)
    return GpuCase(contenders, read, 6.0 * n * h * v, absent=absent)


# --- EWC and AdamW --------------------------------------------------------------------------------


def ewc_specs(
    device: torch.device, models: Sequence[tuple[str, Sequence[tuple[int, ...]]]]
) -> Iterator[Spec]:
    """The penalty's gradient, and AdamW with it, over a model's parameters."""
    for shape, parameters in models:
        make = partial(_ewc_case, device, parameters)
        yield Spec("ewc_add_grad_, float32", shape, make)
        make = partial(_adamw_case, device, parameters)
        yield Spec("AdamWEWC, float32", shape, make)


def _lists(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], ...]:
    """Theta, gradient, anchor and Fisher."""
    return tuple([torch.rand(shape, device=device) for shape in shapes] for _ in range(4))


def _ewc_case(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> GpuCase:
    """Floor: four read, one written: 20 bytes an element."""
    theta, grad, anchor, fisher = _lists(device, shapes)
    one = torch.compile(baselines.loop_ewc, dynamic=False)

    def loop() -> None:
        for g, t, a, f in zip(grad, theta, anchor, fisher, strict=True):
            one(g, t, a, f, 0.5)

    contenders: Calls = {
        "foreach": partial(baselines.foreach_ewc, theta, grad, anchor, fisher, 0.5)
    }
    if len({t.shape for t in theta}) <= 8:  # as many compilations
        contenders["torch.compile"] = loop
    contenders["fasttax"] = partial(
        fasttax.functional.ewc_add_grad_, theta, grad, anchor, fisher, 0.5
    )
    return GpuCase(contenders, floor_bytes=20.0 * sum(t.numel() for t in theta))


def _adamw_case(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> GpuCase:
    """Floor: six read, three written: 36 bytes an element, of which AdamW alone has 28."""
    theta, grad, anchor, fisher = _lists(device, shapes)
    model = nn.Module()
    for i, (t, g) in enumerate(zip(theta, grad, strict=True)):
        p = nn.Parameter(t)
        p.grad = g
        model.register_parameter(f"p{i}", p)
    params = list(model.parameters())
    ewc = fasttax.EWC(model, {f"p{i}": f for i, f in enumerate(fisher)}, strength=0.5)
    held = fasttax.AdamWEWC(params, ewc=ewc, lr=1e-6)
    contenders = gpu_peers.adamw_peers(params, anchor, fisher)
    contenders["fasttax"] = held.step
    return GpuCase(contenders, floor_bytes=36.0 * sum(t.numel() for t in theta))


# --- the Fisher -----------------------------------------------------------------------------------


def fisher_specs(device: torch.device, sizes: Sizes) -> Iterator[Spec]:
    """Squares of linear layers and of lists of gradients."""
    for shape, n, t, i, o in sizes.sqgrad:
        make = partial(_sqgrad_case, device, n, t, i, o)
        yield Spec("linear_sqgrad, bfloat16", shape, make)
    for shape, parameters in sizes.parameters:
        make = partial(_squares_case, device, parameters)
        yield Spec("accumulate_sqgrad_, float32", shape, make, headline=False)


def _sqgrad_case(device: torch.device, n: int, t: int, i: int, o: int) -> GpuCase:
    """Floor: the product that a weight's gradient is."""
    a, d = (torch.randn(n, t, width, device=device).bfloat16() for width in (i, o))
    out = torch.zeros(o, i, device=device)
    left, right = d.flatten(0, 1).T, a.flatten(0, 1)
    contenders: Calls = {
        "weight-gradient GEMM": partial(torch.mm, left, right),
        "materialised": partial(baselines.materialised_sqgrad, a, d),
        "fasttax": partial(fasttax.functional.linear_sqgrad, a, d, out=out),
    }
    read = float(a.nbytes + d.nbytes + 2 * out.nbytes)
    return GpuCase(contenders, read, 2.0 * n * t * i * o)


def _squares_case(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> GpuCase:
    """Floor: two read, one written: 12 bytes an element."""
    total, grad, *_ = _lists(device, shapes)
    contenders: Calls = {
        "foreach": partial(torch._foreach_addcmul_, total, grad, grad),
        "fasttax": partial(fasttax.functional.accumulate_sqgrad_, total, grad),
    }
    return GpuCase(contenders, floor_bytes=12.0 * sum(t.numel() for t in total))
