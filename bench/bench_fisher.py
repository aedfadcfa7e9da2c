"""Squares of gradients against the GEMM of the gradient, whole Fishers against a training pass."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.timing import Case
from fasttax.fisher.kronecker_fisher import KroneckerFisher


def cases() -> Iterator[Case]:
    """From single ops to a whole model."""
    for shape, n, t, i, o in workloads.SQGRAD:
        yield from layer(shape, n, t, i, o)
    yield from rows()
    yield lists()
    yield head()
    yield whole_model()
    yield from kronecker()
    yield memory()


def layer(shape: str, n: int, t: int, i: int, o: int) -> Iterator[Case]:
    """A linear layer i -> o at n examples of t tokens; floor: the weight gradient's flops."""
    a, d = torch.randn(n, t, i), torch.randn(n, t, o)
    out, weight = torch.zeros(o, i), torch.zeros(o, i)
    contenders: dict[str, Callable[[], Any]] = {
        "weight-gradient GEMM": lambda: torch.mm(d.flatten(0, 1).T, a.flatten(0, 1), out=weight)
    }
    if t > 1:  # N x out x in numbers: at T=1 it is 0.5 GB and a second
        contenders["materialised"] = partial(baselines.materialised_sqgrad, a, d)
    floor = 4 * (a.numel() + d.numel() + 2 * out.numel()), 2 * n * t * i * o
    exact = {"fasttax": partial(fasttax.functional.linear_sqgrad, a, d, out=out)}
    yield Case("linear_sqgrad, float32", shape, {**contenders, **exact}, *floor, rounds=25)
    halves = {
        "fasttax": partial(fasttax.functional.linear_sqgrad, a.bfloat16(), d.bfloat16(), out=out)
    }
    half_floor = 2 * (a.numel() + d.numel()) + 8 * out.numel(), floor[1]
    name = "linear_sqgrad, bfloat16 against float32's GEMM"
    yield Case(
        name,
        shape,
        {"weight-gradient GEMM": contenders["weight-gradient GEMM"], **halves},
        *half_floor,
        rounds=25,
        headline=False,
    )


def rows() -> Iterator[Case]:
    """Biases, norms and embeddings of 8 x 128 tokens, against the reference's PyTorch ops."""
    n, t, h, v = 8, 128, 576, 49152
    x, d = torch.randn(n * t, h), torch.randn(n * t, h)
    ids, cu = torch.randint(0, v, (n * t,)), torch.arange(n + 1) * t
    out, table = torch.zeros(h), torch.zeros(v, h)
    calls: dict[str, tuple[Tensor, tuple[Any, ...], int]] = {
        "bias_sqgrad": (out, (d, cu, None), 4 * n * t * h),
        "norm_sqgrad": (out, (x, d, cu, None), 8 * n * t * h),
        "embedding_sqgrad": (table, (ids, d, cu, None, -1), 12 * n * t * h),
    }
    for name, (target, args, floor) in calls.items():
        ours, theirs = (
            getattr(torch.ops.fasttax, prefix + name + "_") for prefix in ("", "_reference_")
        )
        contenders: dict[str, Callable[[], Any]] = {
            "PyTorch ops": partial(theirs, target, *args),
            "fasttax": partial(ours, target, *args),
        }
        yield Case(
            f"{name}, float32",
            f"{n} x {t} tokens of {h}",
            contenders,
            floor,
            rounds=25,
            headline=False,
        )


def lists() -> Case:
    """A model's gradients, squared and added: what a loop over examples does with each of them."""
    sums, grads = workloads.smollm2_like(2)
    count = sum(g.numel() for g in grads)

    def one_by_one() -> None:
        for total, grad in zip(sums, grads, strict=True):
            total += grad**2

    contenders: dict[str, Callable[[], Any]] = {
        "tensor by tensor": one_by_one,
        "foreach": lambda: torch._foreach_addcmul_(sums, grads, grads),
        "fasttax": lambda: fasttax.functional.accumulate_sqgrad_(sums, grads),
    }
    return Case(
        "accumulate_sqgrad_, float32",
        f"{count / 1e6:.1f} M parameters",
        contenders,
        12 * count,
        rounds=9,
        headline=False,
    )


def head() -> Case:
    """The head's exact Fisher over the whole vocabulary against its two GEMMs."""
    n, h, v = 512, 576, 49152
    a, w, out = torch.randn(n, h), torch.randn(v, h) * 0.05, torch.zeros(v, h)
    q = torch.rand(256, v)  # stands for p (1 - p) of a chunk of tokens

    def gemms() -> None:
        for part in a.split(256):
            torch.mm(part, w.T, out=q)
            out.addmm_(q.T, part)

    contenders: dict[str, Callable[[], Any]] = {
        "its 2 GEMMs": gemms,
        "fasttax": lambda: fasttax.functional.lm_head_fisher(a, w, out=out),
    }
    return Case(
        "lm_head_fisher, float32",
        f"{n} tokens, {h} -> {v}",
        contenders,
        4 * (a.numel() + w.numel() + 2 * out.numel()),
        4 * n * h * v,
        headline=False,
    )


def smollm2() -> Any:
    """A model of SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def peak(call: Callable[[], Any]) -> int:
    """Bytes that the process grows by at most while `call` runs; 0 where Linux does not count."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0

    def kilobytes(field: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(field)
        )

    gc.collect()
    # glibc: what earlier calls freed would hide what this one takes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    clear.write_text("5")  # the high-water mark begins anew
    before = kilobytes("VmRSS:")
    call()
    return 1024 * (kilobytes("VmHWM:") - before)


def memory() -> Case:
    """Peak memory above the model, at two batch sizes, printed with the case's shape.

    It is a copy of the parameters in float32, and activations.
    """
    model = smollm2()
    estimator = fasttax.DiagonalFisher(model, verify=False)
    ids = torch.randint(0, 49152, (4, 64))
    estimator.update(ids[:1])

    def ordinary(rows: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    parameters = 4 * sum(p.numel() for p in model.parameters())
    shares = []
    for n in (1, 4):  # the sums are there already, as the gradients are not for the ordinary pass
        model.zero_grad(set_to_none=True)
        ours = peak(partial(estimator.update, ids[:n]))
        theirs = peak(partial(ordinary, ids[:n]))
        shares.append(
            f"N={n}: {(ours + parameters) / 2**20:.0f} MiB, ordinary pass {theirs / 2**20:.0f} MiB"
        )
    model.zero_grad(set_to_none=True)
    contenders: dict[str, Callable[[], Any]] = {
        "forward+backward": lambda: ordinary(ids),
        "fasttax": lambda: estimator.update(ids),
    }
    return Case(
        "exact Fisher, peak memory above the model, sums included",
        f"4 x 64; {'; '.join(shares)}",
        contenders,
        16 * parameters / 4,
        6 * parameters / 4 * ids.numel(),
        rounds=2,
        headline=False,
    )


def whole_model() -> Case:
    """An exact Fisher's update; floor: 2 flops a parameter and token, three times."""
    model = smollm2()
    ids = torch.randint(0, 49152, (8, 128))
    estimator = fasttax.DiagonalFisher(model)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def ordinary(rows: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    def loop() -> None:
        """The Fisher as it is usually written.

        One example at a time, labels drawn from the model, gradients squared.
        """
        for row in ids:
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    squares[name] += p.grad**2
        model.zero_grad(set_to_none=True)

    def plain() -> None:
        ordinary(ids)
        model.zero_grad(set_to_none=True)

    count = sum(p.numel() for p in model.parameters())
    contenders: dict[str, Callable[[], Any]] = {
        "forward+backward": plain,
        "loop over examples": loop,
        "fasttax": lambda: estimator.update(ids),
    }
    return Case(
        "exact Fisher of SmolLM2-135M, float32",
        "batch 8 x 128",
        contenders,
        16 * count,
        6 * count * ids.numel(),
        rounds=3,
    )


def kronecker() -> Iterator[Case]:
    """Factors of every linear layer beside the diagonal, and a step of EWC on either.

    Floors: of the estimate the diagonal's; of the step two products with the factors a layer.

    Yields:
        The estimate, and the step.
    """
    model = smollm2()
    ids = torch.randint(0, 49152, (4, 128))
    diagonal = fasttax.DiagonalFisher(model, verify=False)
    factors = KroneckerFisher(model, verify=False)
    count = sum(p.numel() for p in model.parameters())
    yield Case(
        "Kronecker Fisher of SmolLM2-135M, float32",
        "batch 4 x 128",
        {"diagonal": lambda: diagonal.update(ids), "fasttax": lambda: factors.update(ids)},
        16 * count,
        6 * count * ids.numel(),
        rounds=3,
    )
    estimate = fasttax.estimate_fisher(model, [ids], structure="kron", progress=False)
    flops = sum(2 * (len(a) + len(g)) * len(a) * len(g) for a, g in estimate.factors.values())
    plain = fasttax.EWC(model, estimate.to_diagonal(), strength=1.0)
    whole = fasttax.EWC(model, estimate, strength=1.0)
    yield Case(
        "EWC.add_grad_ on Kronecker factors",
        "SmolLM2-135M",
        {"diagonal": plain.add_grad_, "fasttax": whole.add_grad_},
        20 * count,
        flops,
        rounds=3,
    )
