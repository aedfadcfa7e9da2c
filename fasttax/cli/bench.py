"""`fasttax bench`: the main ops beside plain PyTorch, at sizes of your own, in about a minute."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fasttax
from fasttax._base import devices, timing
from fasttax._base.timing import Case, Result
from fasttax.cli import _options
from fasttax.cli._language_model import DTYPES

OP = "fasttax bench"
KEPT = ("name", "shape", "milliseconds", "ratios")  # of a result, in --json


def eager_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Mean KL(policy || ref) as it is written by hand, in float32."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1).mean()


def eager_linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    """`eager_kl` of whole logits, hidden (N, H) @ weight (V, H)^T."""
    return eager_kl(hidden @ weight.T, ref_hidden @ ref_weight.T)


@torch.no_grad()
def foreach_ewc(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    strength: float,
) -> None:
    """Grad += strength fisher (theta - anchor) by torch._foreach: three passes, one temporary."""
    delta = torch._foreach_sub(list(params), list(anchors))
    torch._foreach_mul_(delta, list(fishers))
    torch._foreach_add_(list(grads), delta, alpha=strength)


def fused_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`eager_kl`'s number by one op."""
    return fasttax.token_kl(logits, ref_logits, reduction="mean")


def fused_linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    """`eager_linear_kl`'s number, logits never whole."""
    return fasttax.linear_token_kl(hidden, weight, ref_hidden, ref_weight, reduction="mean")


def step(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], others: Sequence[Tensor]
) -> Callable[[], None]:
    """A call that runs forward and backward, to gradients of fresh copies of `leaves`."""

    def call() -> None:
        function(*(leaf.detach().requires_grad_() for leaf in leaves), *others).backward()

    return call


@dataclass(frozen=True)
class Sizes:
    """What the cases' shapes are made of; the command has an option for each."""

    tokens: int = 512
    vocab: int = 49152
    hidden: int = 576
    parameters: int = 30_000_000
    rounds: int = 7


HELP = {
    "tokens": "of a batch",
    "vocab": "entries of the vocabulary",
    "hidden": "width of the model",
    "parameters": "of the EWC case",
    "rounds": "in which contenders take turns",
}


def cases(sizes: Sizes, device: str, dtype: str | None) -> Iterator[Case]:
    """Five cases, or with one dtype four, each made when its turn comes."""
    chosen = [DTYPES[dtype]] if dtype else [torch.float32, torch.bfloat16]
    for of_logits in chosen:
        yield kl_case(sizes, device, of_logits)
    yield linear_kl_case(sizes, device, chosen[0])
    yield ewc_case(sizes, device)
    yield fisher_case(sizes, device)


def kl_case(sizes: Sizes, device: str, dtype: torch.dtype) -> Case:
    """Floor: both logits read once, one gradient written."""
    x, y = torch.randn(2, sizes.tokens, sizes.vocab, device=device).to(dtype).unbind()
    contenders: dict[str, Callable[[], Any]] = {
        "eager": step(eager_kl, (x,), (y,)),
        "fasttax": step(fused_kl, (x,), (y,)),
    }
    return Case(
        f"token_kl forward+backward, {_name(dtype)}",
        f"{sizes.tokens} x {sizes.vocab}",
        contenders,
        floor_bytes=3.0 * x.nbytes,
        rounds=sizes.rounds,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def linear_kl_case(sizes: Sizes, device: str, dtype: torch.dtype) -> Case:
    """Floor: four GEMMs of 2 tokens hidden vocab flops."""
    N, V, H = sizes.tokens, sizes.vocab, sizes.hidden
    h, w, ref_h, ref_w = (
        (torch.randn(n, H, device=device) * H**-0.5).to(dtype) for n in (N, V, N, V)
    )
    contenders: dict[str, Callable[[], Any]] = {
        "eager": step(eager_linear_kl, (h, w), (ref_h, ref_w)),
        "fasttax": step(fused_linear_kl, (h, w), (ref_h, ref_w)),
    }
    return Case(
        f"linear_token_kl forward+backward, {_name(dtype)}",
        f"{N} tokens, {H} -> {V}",
        contenders,
        floor_bytes=float(2 * h.nbytes + 3 * w.nbytes),
        floor_flops=8.0 * N * H * V,
        rounds=sizes.rounds,
    )


def ewc_case(sizes: Sizes, device: str) -> Case:
    """Floor: theta, anchor, Fisher and gradient read, one written: 20 bytes a parameter."""
    rows = torch.rand(4, sizes.parameters, device=device)
    theta, grad, anchor, fisher = ([row] for row in rows.unbind())
    contenders: dict[str, Callable[[], Any]] = {
        "foreach": lambda: foreach_ewc(theta, grad, anchor, fisher, 0.5),
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(theta, grad, anchor, fisher, 0.5),
    }
    return Case(
        "ewc_add_grad_, float32",
        f"{sizes.parameters:,} parameters",
        contenders,
        floor_bytes=20.0 * sizes.parameters,
        rounds=sizes.rounds,
    )


def fisher_case(sizes: Sizes, device: str) -> Case:
    """Floor: the flops of the weight gradient, whose place the square takes."""
    N, T, H = 8, max(1, sizes.tokens // 8), sizes.hidden
    a, d = torch.randn(2, N, T, H, device=device).unbind()
    out = torch.zeros(H, H, device=device)
    contenders: dict[str, Callable[[], Any]] = {
        "weight-gradient GEMM": lambda: torch.mm(d.flatten(0, 1).T, a.flatten(0, 1)),
        "fasttax": lambda: fasttax.functional.linear_sqgrad(a, d, out=out),
    }
    return Case(
        "linear_sqgrad (exact per example), float32",
        f"{N} x {T} tokens, {H} x {H}",
        contenders,
        floor_bytes=4.0 * (2 * a.numel() + 2 * out.numel()),
        floor_flops=2.0 * a.numel() * H,
        rounds=sizes.rounds,
    )


def main(argv: Sequence[str]) -> int:
    """Measures case by case, printing each as it is done, and writes --json.

    Returns:
        0; sizes below 1 and a device that is not there are errors before anything is measured.
    """
    args = _options.parsed(parser(), argv)
    _options.check_least(OP, args, **dict.fromkeys(HELP, 1))
    sizes = Sizes(**{name: getattr(args, name) for name in HELP})
    device = str(devices.named(OP, args.device))
    torch.manual_seed(0)
    rate = timing.bandwidth(device)
    _options.say(
        args,
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, copies "
        f"{rate / 1e9:.0f} GB/s; contenders take turns, medians",
    )
    results = []
    for case in cases(sizes, device, args.dtype):
        result = timing.run(case, rate)
        results.append(result)
        _options.say(args, line_of(result))
    rows = [{name: getattr(result, name) for name in KEPT} for result in results]
    _options.write_json(OP, args.json, rows)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog=OP,
        description=(
            "`fasttax bench`: the main ops beside plain PyTorch on this machine, at sizes of your "
            "own, in about a minute."
        ),
    )
    for name, value in asdict(Sizes()).items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{HELP[name]} (default {value})"
        )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the KLs' logits and heads (default: float32, and token_kl in bfloat16, too)",
    )
    devices.add_option(parser)
    _options.add_json(parser)
    return parser


def line_of(result: Result) -> str:
    """Milliseconds of fasttax, then of the others with how many times fasttax's they are."""
    others = ", ".join(
        f"{name} {result.milliseconds[name]:.1f} ms ({ratio:.2f}x)"
        for name, ratio in result.ratios.items()
    )
    return f"{result.name}, {result.shape}: {result.milliseconds['fasttax']:.1f} ms; {others}"
