"""The device operations of a call, without a device, and no host sync among them.

On the "meta" device ops run for their shapes alone: each that a GPU would be launched for is seen
as it is dispatched, and what asks for a value raises. The linear ops, which are Python over others,
are gone into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttax.kl import linear_sweep

META = torch.device("meta")
# what makes a tensor and launches nothing, beside views
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave"}


class Launches(TorchDispatchMode):
    """Names of the ops that launch something, in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if name.startswith("linear_token_"):
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:  # the op's own ops
                return func.redispatch(key, *args, **(kwargs or {}))
        assert name not in SYNCS, f"{name} makes the host wait for the device"
        if name in ("index", "index_put_"):
            indices = [i for i in args[1] if isinstance(i, Tensor)]
            assert not any(i.dtype == torch.bool for i in indices), "a boolean index is a sync"
        if space != "prim" and name not in MEMORY and not func.is_view:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Tensor | list[Tensor]]) -> list[str]:
    """What is launched by `call` and by its results' backward, whose own first gradient is not.

    `call` makes its tensors outside: they are no part of it.
    """
    with Launches() as mode:
        results = call()
    results = [results] if isinstance(results, Tensor) else results
    results = [result for result in results if result.requires_grad]
    grads = [torch.empty_like(result) for result in results]
    with mode:
        torch.autograd.backward(results, grads)
    return mode.seen


@pytest.fixture
def on_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear ops' products are those of an NVIDIA GPU: half-width operands as they are."""
    monkeypatch.setattr(linear_sweep, "narrow_gemm", lambda device: True)


def logits(*, requires_grad: bool = True) -> Tensor:
    """Of 64 tokens, 1000 words."""
    return torch.empty(64, 1000, device=META, dtype=torch.bfloat16, requires_grad=requires_grad)


def numbers(*, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    """One a token."""
    return torch.empty(64, device=META, dtype=dtype, requires_grad=requires_grad)
