"""What the tests of the linear ops share: a small case with every tensor, and token_kl's formula on
its materialised logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fasttax

N, H, R, V = 13, 8, 6, 37  # no multiple of any chunk below; the reference's head has another width
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ref_policy": {"kind": "ref_policy", "temperature": 0.7},
    "jsd": {"kind": "jsd", "beta": 0.3, "softcap": 9.0, "ref_softcap": 8.0},
}
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias")


def tensors(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, Tensor]:
    shapes = {
        "hidden": (N, H),
        "weight": (V, H),
        "ref_hidden": (N, R),
        "ref_weight": (V, R),
        "bias": (V,),
        "ref_bias": (V,),
    }
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def materialised(
    t: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Per-token KL of whole logits in `dtype`, and the gradients of its weighted sum."""
    w = {name: value.detach().to(dtype).requires_grad_() for name, value in t.items()}
    x, y = (
        w["hidden"] @ w["weight"].T + w["bias"],
        w["ref_hidden"] @ w["ref_weight"].T + w["ref_bias"],
    )
    kl = fasttax.token_kl(x, y, **options)
    return kl.detach(), torch.autograd.grad((kl * upstream().to(dtype)).sum(), list(w.values()))


def upstream() -> Tensor:
    return torch.linspace(-1.0, 2.0, N)


def fused(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    kl = fasttax.linear_token_kl(
        *(t[name] for name in NAMES[:4]), bias=t["bias"], ref_bias=t["ref_bias"], **options
    )
    return kl.detach(), torch.autograd.grad(
        (kl * upstream().to(kl.dtype)).sum(), [t[name] for name in NAMES]
    )
