"""What fasttax's tools take of memory and time, from a model's shape and a GPU's rates.

Memory is exact for what is stored (parameters times bytes), and for activations what a Llama layer
was seen to save for its backward: 8 hidden + 2 key-value + 4 intermediate values a token (counted
by saved_tensors_hooks; tests/package/test_cli_plan.py counts again). Times are multiplications at
`use` of the GPU's peak, or bytes at its bandwidth: they say what dominates, not milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

GB = 1e9
# Bytes a parameter: weights and gradient in bf16, AdamW's moments and the master copy in float32.
TRAINING = 2 + 2 + 8 + 4
HALF, FULL = 2, 4  # bytes of bf16 and float32
U8LOG = 1 + 8 / 256  # a code, and two floats for each block of 256
LOGIT = 10  # bytes a logit of linear_token_kl in bf16: logits, their gradient, one in float32
CHUNK = 1 / 32  # of the GPU's memory, which linear_token_kl's chunks take at most
HOST = 50e9  # bytes/s between host and GPU, PCIe 5.0 x16 as it measures


@dataclass(frozen=True)
class Gpu:
    """Vendor's numbers: dense bf16 flop/s, bytes/s, bytes."""

    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "b200": Gpu(2250e12, 7.7e12, 180e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9),
    "rtx4090": Gpu(165e12, 1.01e12, 24e9),
}


@dataclass(frozen=True)
class Shape:
    """A model's: parameters, those that a token is multiplied with, and its layers' widths.

    `quantised` is how its weights lie, "" for floats; all that is counted is of the floats.
    """

    parameters: int
    multiplied: int
    layers: int
    hidden: int
    keys: int
    inner: int
    vocabulary: int
    quantised: str = ""

    @staticmethod
    def of(config: Any) -> Shape:
        """Of a transformers config, by a model without values.

        Raises:
            ValueError: the config does not say its widths, or has no causal language model.
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        hidden = getattr(text, "hidden_size", None)
        layers = getattr(text, "num_hidden_layers", None)
        if hidden is None or layers is None:
            raise ValueError(f"{type(config).__name__} has no hidden_size and num_hidden_layers")
        heads = getattr(text, "num_attention_heads", None) or 1
        width = getattr(text, "head_dim", None) or hidden // heads
        keys = width * (getattr(text, "num_key_value_heads", None) or heads)
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        return Shape(
            parameters=sum(p.numel() for p in model.parameters()),
            multiplied=_multiplied(model, text),
            layers=layers,
            hidden=hidden,
            keys=keys,
            inner=inner,
            vocabulary=text.vocab_size,
            quantised=_quantised(config),
        )

    def forward(self, tokens: float, length: int) -> float:
        """Flops of a forward over sequences of `length`, causal attention at half."""
        return tokens * (2 * self.multiplied + 2 * self.layers * self.hidden * length)

    def activations(self, tokens: float, checkpointing: bool) -> float:
        """Bytes that a forward in bf16 keeps for its backward."""
        layer = HALF * tokens * (8 * self.hidden + 2 * self.keys + 4 * self.inner)
        if checkpointing:
            return layer + HALF * tokens * self.hidden * self.layers
        return layer * self.layers


def _quantised(config: Any) -> str:
    """The method that a config's weights are quantised by."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return ""
    found = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
    return str(getattr(found, "value", found) or "some method")


def _multiplied(model: nn.Module, text: Any) -> int:
    """Weights that meet a token: those of linear layers, the head's too where it is tied.

    Of fused experts (3-d parameters) those that a token is sent to.
    """
    from transformers.pytorch_utils import Conv1D

    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    count = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    if experts and count and chosen:
        experts = experts * chosen // count
    return linear + experts


@dataclass(frozen=True)
class Job:
    """What is planned: tokens of a step on a GPU, sequences of a length, of a Fisher, of replay."""

    gpu: Gpu
    gpus: int
    use: float
    tokens: int
    length: int
    examples: int
    k: int
    every: int
    checkpointing: bool


@dataclass(frozen=True)
class Cost:
    """Bytes on each GPU beside training's, and seconds a step (or once)."""

    name: str
    memory: float
    seconds: float
    note: str


def costs(shape: Shape, job: Job) -> Iterator[Cost]:
    """Training first, then what each tool adds to it; parameters and their like are sharded."""
    P, N, gpu = shape.parameters, job.gpus, job.gpu
    rate = gpu.flops * job.use
    forward = shape.forward(job.tokens, job.length) / rate
    kept = shape.activations(job.tokens, job.checkpointing)
    again = 1.0 if job.checkpointing else 0.0  # the forward that checkpointing repeats
    step = (3 + again) * forward
    yield Cost(
        "training",
        TRAINING * P / N + kept,
        step,
        "bf16 weights and gradients, float32 AdamW; all sharded",
    )
    for name, bytes_ in (
        ("EWC, fp32 Fisher and anchor", 2 * FULL),
        ("EWC, bf16 Fisher and anchor", 2 * HALF),
        ("EWC, u8log Fisher, bf16 anchor", U8LOG + HALF),
    ):
        # add_grad_ reads theta and gradient, and writes the gradient, in bf16
        moved = (bytes_ + 3 * HALF) * P / N
        yield Cost(name, bytes_ * P / N, moved / gpu.bandwidth, "one pass over the parameters")
    yield Cost(
        "EWC, offload",
        0.0,
        2 * FULL * P / N / HOST,
        "fp32 Fisher and anchor on the host, read every step",
    )
    logits = min(LOGIT * job.tokens * shape.vocabulary, CHUNK * gpu.memory)
    head = 8.0 * job.tokens * shape.vocabulary * shape.hidden / rate  # four GEMMs
    yield Cost(
        "KL to a reference",
        HALF * P / N + logits,
        forward + head,
        "its bf16 weights, a forward, logits in chunks",
    )
    kept_ids = 8.0 * job.k * job.tokens
    yield Cost(
        f"KL from a cache, k={job.k}",
        kept_ids + logits,
        kept_ids / HOST + head / 2,
        f"no reference in memory; {8 * job.k} bytes a token on disk",
    )
    share = 1 / job.every
    yield Cost(
        "replay, LM loss", 0.0, step * share, f"as many tokens again every {job.every} steps"
    )
    yield Cost(
        "replay, KL",
        HALF * P / N + logits,
        (step + forward + head) * share,
        "the reference's forward, too",
    )
    read = job.examples * job.length
    yield Cost(
        "Fisher (once, before)",
        (HALF + FULL) * P / N + shape.activations(job.tokens, job.checkpointing),
        (3 + again) * shape.forward(read, job.length) / rate / N,
        f"{job.examples} sequences; weights, float32 sums; no optimizer",
    )
