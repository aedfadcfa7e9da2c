"""What the ops over rows of logits are tried on: vocabularies, options, easy and hard rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# V, each with a reason; AVX-512 has 16 lanes and takes 4 vectors at a time, AVX2 8, portable 4;
# sums fold every 2048 entries
VOCABULARIES = (
    1,  # one outcome: KL 0 whatever the logits
    2,  # the smallest distribution that can differ
    15,  # no whole AVX-512 vector
    16,  # one, and no tail
    17,  # one and a tail of one
    63,  # one short of the four-vector block
    65,  # one more than it
    1003,  # blocks, vectors and a tail
    2047,  # one short of the fold, which is also where the frame is primed
    2049,  # a second fold of one entry
    9001,  # several folds and a tail
)

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    # no shared scale: the general frame
    "temperatures": {
        "temperature": 0.7,
        "ref_temperature": 2.0,
    },
    "softcap": {"softcap": 5.0},  # deep in saturation for logits of 3 sigma = 9
    "softcaps": {"softcap": 30.0, "ref_softcap": 20.0},  # Gemma 2's
    "ref_softcap": {"ref_softcap": 4.0},  # one side only
    "scale": {"logit_scale": 0.25, "ref_logit_scale": 0.25},  # Cohere's
    "scales": {"logit_scale": 1.5, "ref_logit_scale": 0.5},
    "all": {
        "temperature": 0.8,
        "ref_temperature": 1.3,
        "softcap": 10.0,
        "ref_softcap": 15.0,
        "logit_scale": 0.5,
        "ref_logit_scale": 2.0,
    },
    "mask": {"inf": "mask"},  # the general frame with nothing to drop
    "beta_low": {"beta": 0.1},
    "beta_high": {"beta": 0.9},
    "beta_tiny": {"beta": 1e-3},  # log(beta) and log(1 - beta) of very different size
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "0d": lambda z: z[0, 0, 0],  # one token, no leading dimension
    "1d": lambda z: z[0, 0],
    "3d": lambda z: z,
    "none": lambda z: z[0, 0, :0],
    "none_inside": lambda z: z[:, :0],
    "one": lambda z: z[:1, 0, 0],
    "shifted": lambda z: z[0, :, :-1],  # the next-token logits of a language model
    "transposed": lambda z: z.transpose(0, 2),
    "every_other_row": lambda z: z[:, ::2, 1::2],
    "every_other_entry": lambda z: z[..., ::2],
    "vocabulary_first": lambda z: z.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    # rows start at no multiple of a vector, and end where others begin
    "unaligned": lambda z: z[..., 1:],
    "one_entry": lambda z: z[..., 3:4],  # V = 1 with a vocabulary stride that is not 1
    "expanded": lambda z: z[:, :1].expand(-1, 5, -1, -1),
    "expanded_vocabulary": lambda z: z[..., :1].expand(-1, -1, -1, 9),
}


def rows(V: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Four rows of each sort."""
    x, y, noise = torch.randn(3, 4, V)
    return {
        "apart": ((3 * x).to(dtype), (3 * y).to(dtype)),
        # the series, not the exponentials
        "near": (
            (3 * x).to(dtype),
            (3 * x + 0.1 * noise).to(dtype),
        ),
        # a tail filled with 0 instead of -inf would take all the mass
        "low": (
            (x - 500).to(dtype),
            (y - 300).to(dtype),
        ),
    }


def peaked(height: float, who: str, where: int, V: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 4, V) * 0.5
    if who in ("policy", "both", "apart"):
        x[:, where] += height
    if who in ("ref", "both"):
        y[:, where] += height
    if who == "apart":
        y[:, where // 2] += height
    return x, y
