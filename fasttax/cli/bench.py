"""`fasttax bench`: the main ops beside plain PyTorch on this machine, at sizes of your own, in
about a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttax
from fasttax._base import checks, files, timing
from fasttax._base.timing import Case


def eager_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1).mean()


def eager_linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    return eager_kl(hidden @ weight.T, ref_hidden @ ref_weight.T)


@torch.no_grad()
def foreach_ewc(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    strength: float,
) -> None:
    delta = torch._foreach_sub(list(params), list(anchors))
    torch._foreach_mul_(delta, list(fishers))
    torch._foreach_add_(list(grads), delta, alpha=strength)


def fused_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return fasttax.token_kl(logits, ref_logits, reduction="mean")


def fused_linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    return fasttax.linear_token_kl(hidden, weight, ref_hidden, ref_weight, reduction="mean")


def step(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], others: Sequence[Tensor]
) -> Callable[[], None]:
    """Forward and backward to fresh leaves."""

    def call() -> None:
        function(*(leaf.detach().requires_grad_() for leaf in leaves), *others).backward()

    return call


def cases(
    tokens: int, vocab: int, hidden: int, parameters: int, rounds: int, device: str
) -> Iterator[Case]:
    size = f"{tokens} x {vocab}"
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.randn(2, tokens, vocab, device=device).to(dtype).unbind()
        contenders: dict[str, Callable[[], Any]] = {
            "eager": step(eager_kl, (x,), (y,)),
            "fasttax": step(fused_kl, (x,), (y,)),
        }
        yield Case(
            f"token_kl forward+backward, {str(dtype).removeprefix('torch.')}",
            size,
            contenders,
            3.0 * x.nbytes,
            rounds=rounds,
        )
    h, w, rh, rw = (
        torch.randn(n, hidden, device=device) * hidden**-0.5 for n in (tokens, vocab, tokens, vocab)
    )
    contenders = {
        "eager": step(eager_linear_kl, (h, w), (rh, rw)),
        "fasttax": step(fused_linear_kl, (h, w), (rh, rw)),
    }
    yield Case(
        "linear_token_kl forward+backward, float32",
        f"{tokens} tokens, {hidden} -> {vocab}",
        contenders,
        4.0 * (2 * h.numel() + 3 * w.numel()),
        8.0 * tokens * hidden * vocab,
        rounds=rounds,
    )
    del h, w, rh, rw
    theta, grad, anchor, fisher = ([t] for t in torch.rand(4, parameters, device=device).unbind())
    contenders = {
        "foreach": lambda: foreach_ewc(theta, grad, anchor, fisher, 0.5),
        "fasttax": lambda: fasttax.functional.ewc_add_grad_(theta, grad, anchor, fisher, 0.5),
    }
    yield Case(
        "ewc_add_grad_, float32",
        f"{parameters:,} parameters",
        contenders,
        20.0 * parameters,
        rounds=rounds,
    )
    n, t = 8, max(1, tokens // 8)
    a, d, out = (
        torch.randn(n, t, hidden, device=device),
        torch.randn(n, t, hidden, device=device),
        torch.zeros(hidden, hidden, device=device),
    )
    contenders = {
        "weight-gradient GEMM": lambda: torch.mm(d.flatten(0, 1).T, a.flatten(0, 1)),
        "fasttax": lambda: fasttax.functional.linear_sqgrad(a, d, out=out),
    }
    yield Case(
        "linear_sqgrad (exact per example), float32",
        f"{n} x {t} tokens, {hidden} x {hidden}",
        contenders,
        4.0 * (2 * a.numel() + 2 * out.numel()),
        2.0 * a.numel() * hidden,
        rounds=rounds,
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fasttax bench", description=__doc__)
    for name, value, text in (
        ("tokens", 512, "of a batch"),
        ("vocab", 49152, "entries of the vocabulary"),
        ("hidden", 576, "width of the model"),
        ("parameters", 30_000_000, "of the EWC case"),
        ("rounds", 7, "in which contenders take turns"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    args = parser.parse_args(argv)
    sizes = {
        name: checks.count("fasttax bench", f"--{name}", getattr(args, name))
        for name in ("tokens", "vocab", "hidden", "parameters", "rounds")
    }
    seen = [
        "cpu",
        *(
            ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            if torch.cuda.is_available()
            else []
        ),
    ]
    checks.choice("fasttax bench", "--device", args.device, seen)
    torch.manual_seed(0)
    rate = timing.bandwidth(args.device)
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, copies "
        f"{rate / 1e9:.0f} GB/s; contenders take turns, medians"
    )
    rows = []
    for case in cases(**sizes, device=args.device):
        result = timing.run(case, rate)
        rows.append(result)
        others = ", ".join(
            f"{name} {result.milliseconds[name]:.1f} ms ({ratio:.2f}x)"
            for name, ratio in result.ratios.items()
        )
        print(
            f"{result.name}, {result.shape}: {result.milliseconds['fasttax']:.1f} ms; {others}",
            flush=True,
        )
    if args.json:
        text = (
            json.dumps(
                [
                    {
                        "name": r.name,
                        "shape": r.shape,
                        "milliseconds": r.milliseconds,
                        "ratios": r.ratios,
                    }
                    for r in rows
                ],
                indent=1,
            )
            + "\n"
        )
        print(
            files.whole(
                "fasttax bench", args.json, lambda path: path.write_text(text, encoding="utf-8")
            )
        )
    return 0
