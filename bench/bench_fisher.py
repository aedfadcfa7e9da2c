"""linear_sqgrad against its weight-gradient GEMM, and the whole-model exact Fisher against one ordinary training pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fasttax
from bench import baselines, workloads
from bench.timing import Case


def cases() -> Iterator[Case]:
    for shape, n, t, i, o in workloads.SQGRAD:
        a, d = torch.randn(n, t, i), torch.randn(n, t, o)
        out, weight = torch.zeros(o, i), torch.zeros(o, i)

        def gemm(a: Tensor = a, d: Tensor = d, weight: Tensor = weight) -> Tensor:
            return torch.mm(d.flatten(0, 1).T, a.flatten(0, 1), out=weight)

        contenders: dict[str, Callable[[], Any]] = {
            "weight-gradient GEMM": gemm,
            "materialised": partial(baselines.materialised_sqgrad, a, d),
            "fasttax": partial(fasttax.functional.linear_sqgrad, a, d, out=out),
        }
        yield Case("linear_sqgrad, float32", shape, contenders, 4 * (a.numel() + d.numel() + 2 * out.numel()), 2 * n * t * i * o, rounds=25)
    yield whole_model()


def whole_model() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, tie_word_embeddings=True)  # SmolLM2-135M's shape  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (8, 128))
    estimator = fasttax.DiagonalFisher(model)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def ordinary(rows: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    def loop() -> None:
        """The Fisher as it is usually written: one example at a time, labels drawn from the model, gradients squared."""
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
    contenders: dict[str, Callable[[], Any]] = {"forward+backward": plain, "loop over examples": loop, "fasttax": lambda: estimator.update(ids)}
    return Case("exact Fisher of SmolLM2-135M, float32", "batch 8 x 128", contenders, 16 * count, 6 * count * ids.numel(), rounds=3)
