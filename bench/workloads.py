"""Named sizes from real models."""

from __future__ import annotations

import torch
from torch import Tensor

KL = [("512 x 49152", 512, 49152), ("128 x 151936", 128, 151936)]  # SmolLM2's vocabulary, Qwen2.5's
# a step's tokens by the vocabularies of Qwen 2.5 and 3, Llama 3, SmolLM2; and a few rows
GPU_KL = (
    ("4096 x 151936", 4096, 151936),
    ("4096 x 128256", 4096, 128256),
    ("8192 x 49152", 8192, 49152),
    ("64 x 128256", 64, 128256),
)
GPU_KINDS = (2048, 49152)
# Qwen 2.5 1.5B's head, Llama 3.2 1B's, SmolLM2-135M's
GPU_LINEAR = (
    ("4096 tokens, 1536 -> 151936", 4096, 1536, 151936),
    ("4096 tokens, 2048 -> 128256", 4096, 2048, 128256),
    ("8192 tokens, 576 -> 49152", 8192, 576, 49152),
)
LINEAR_KL = [("512 tokens, 576 -> 49152", 512, 576, 49152)]
SQGRAD = [
    ("N=16 T=128 1536x576", 16, 128, 1536, 576),  # SmolLM2's down projection
    ("N=8 T=512 576x1536", 8, 512, 576, 1536),  # its up projection, long rows
    ("N=8 T=128 576x576", 8, 128, 576, 576),  # its query projection
    ("N=32 T=16 576x1536", 32, 16, 576, 1536),  # short rows
    ("N=512 T=1 576x1536", 512, 1, 576, 1536),  # single tokens, as in a classifier's head
]
# Llama 3.2 1B's up projection
GPU_SQGRAD = (
    ("N=16 T=512 2048x8192", 16, 512, 2048, 8192),
    ("N=64 T=16 2048x8192", 64, 16, 2048, 8192),
)


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


# lists of parameters: SmolLM2-135M's 272, and Llama 3.2 1B's head and layers in four large ones
GPU_PARAMETERS: tuple[tuple[str, list[tuple[int, ...]]], ...] = (
    ("1.07e9 parameters in 4", [(128256, 2048), *((4 * 8192, 8192),) * 3]),
    ("SmolLM2-135M's 272", smollm2_shapes()),
)


def smollm2_like(count: int) -> list[list[Tensor]]:
    """`count` lists of random tensors in SmolLM2's shapes."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.rand(shape, generator=generator) for shape in smollm2_shapes()] for _ in range(count)
    ]
