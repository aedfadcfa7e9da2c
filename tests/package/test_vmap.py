"""torch.func over ops that have no rule for it: what it computes, or an error with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fasttax
from fasttax import functional, reference
from fasttax._base import library

X = torch.randn(3, 4, 5)
ONES, W, HEAD = torch.ones(4, 5), torch.rand(6, 5), torch.rand(7, 5)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "ewc_penalty": lambda a: functional.ewc_penalty([a], [ONES], [ONES], 1.0),
    "lora_ewc_penalty": lambda a: functional.lora_ewc_penalty(a, torch.ones(6, 4), W, 1.0, 1.0),
    "linear_sqgrad": lambda a: functional.linear_sqgrad(a[None], a[None]),
    "bias_sqgrad": lambda a: functional.bias_sqgrad(a[None]),
    "lm_head_fisher": lambda a: functional.lm_head_fisher(a, HEAD),
    "linear_token_kl": lambda a: fasttax.linear_token_kl(a, HEAD, a, HEAD),
}


PENALTIES = ("ewc_penalty", "lora_ewc_penalty")  # plain PyTorch under torch.func
LOOPS = ("linear_token_kl",)  # torch makes one, of tensors that are read


@pytest.mark.parametrize("name", [n for n in CALLS if n not in (*LOOPS, *PENALTIES)])
def test_is_refused(name: str) -> None:
    said = f"{name}: torch.func.vmap: expected tensors outside of it, .*; call the op in a loop"
    with pytest.raises(NotImplementedError, match=said):
        vmap(CALLS[name])(X)


@pytest.mark.parametrize("name", [*LOOPS, *PENALTIES])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_is_the_loop(name: str) -> None:
    call = CALLS[name]
    assert torch.allclose(vmap(call)(X), torch.stack([call(a) for a in X]), rtol=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_of_penalties(name: str) -> None:
    a = X[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(CALLS[name](a), a)
    torch.testing.assert_close(grad(CALLS[name])(X[0]), wanted)
    torch.testing.assert_close(vmap(grad(CALLS[name]))(X)[0], wanted)


def test_the_way_out() -> None:
    def penalty(a: Tensor) -> Tensor:
        return reference.ewc_penalty([a], [ONES], [ONES], [], 1.0)

    wanted = torch.stack([CALLS["ewc_penalty"](a) for a in X])
    assert torch.allclose(vmap(penalty)(X), wanted, rtol=1e-6)


def test_torchs_own_error_is_no_ops() -> None:
    """Of lists of tensors, and of tensors that are written, of which torch has no loop."""
    count = 0
    for name in library.OPS:
        schema = str(getattr(torch.ops.fasttax, name).default._schema)
        if "!" in schema or "Tensor[]" in schema.partition("->")[0]:
            key = "FuncTorchBatched"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttax::{name}", key), name
            count += 1
    assert count > 8
