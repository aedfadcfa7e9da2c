"""Named sizes from real models."""

from __future__ import annotations

import torch
from torch import Tensor

KL = [("512 x 49152", 512, 49152), ("128 x 151936", 128, 151936)]  # SmolLM2's vocabulary, Qwen2.5's
# a training step's tokens; a few rows of Llama 3's
GPU_KL = [
    ("4096 x 151936", 4096, 151936),
    ("64 x 128256", 64, 128256),
]
LINEAR_KL = [("512 tokens, 576 -> 49152", 512, 576, 49152)]
SQGRAD = [
    ("N=16 T=128 1536x576", 16, 128, 1536, 576),  # SmolLM2's down projection
    ("N=8 T=512 576x1536", 8, 512, 576, 1536),  # its up projection, long rows
    ("N=8 T=128 576x576", 8, 128, 576, 576),  # its query projection
    ("N=32 T=16 576x1536", 32, 16, 576, 1536),  # short rows
    ("N=512 T=1 576x1536", 512, 1, 576, 1536),  # single tokens, as in a classifier's head
]
# Llama 3.2 1B's up projection
GPU_SQGRAD = [
    ("N=16 T=512 2048x8192", 16, 512, 2048, 8192),
    ("N=64 T=16 2048x8192", 64, 16, 2048, 8192),
]


def smollm2_shapes() -> list[tuple[int, ...]]:
    """SmolLM2-135M's 272 parameters (134.5 M values)."""
    layer: list[tuple[int, ...]] = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
        (576,),
        (576,),
    ]
    return [(49152, 576), *(shape for _ in range(30) for shape in layer), (576,)]


def smollm2_like(count: int) -> list[list[Tensor]]:
    """`count` lists of random tensors in SmolLM2's shapes."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.rand(shape, generator=generator) for shape in smollm2_shapes()] for _ in range(count)
    ]
