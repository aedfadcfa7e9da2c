"""Numbers on the fake CUDA: torch's own kernels, and fasttax's, are the CPU's on the same memory.

A device's memory is the host's, so that an op's tensors are looked at as the CPU's, and what the
CPU makes of them goes back. Devices that do not fit each other are torch's errors, as on a GPU.
Nothing here knows of CUDA's own kernels: what is shown is the way to them, from a user's call.

As a pytest plugin it does so for every test, on one device: several are a trainer's DataParallel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# what only touches memory, or asks about it
NATIVE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_pinned",
    "_pin_memory",
    "record_stream",
    "resize_",
    "set_",
}
CROSSING = {"copy_", "_to_copy"}  # from one device to another
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU's by the CPU's too


def as_the_cpu_has_it(func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """An op that CUDA alone has, by one of the CPU's: narrow operands, and a wide result."""
    name, overload = func._schema.name.partition("::")[2], func._overloadname
    if name in ("_softmax", "_log_softmax") and args[2]:  # half to float
        return func, (args[0].float(), args[1], False)
    if name in ("mm", "addmm", "bmm", "baddbmm") and overload.startswith("dtype"):
        *operands, dtype = args
        packet = getattr(torch.ops.aten, name)
        same = packet.out if overload == "dtype_out" else packet.default
        return same, tuple(t.to(dtype) for t in operands)
    if name == "_fused_rms_norm_backward":
        return decomposition_table[func], args
    return func, args


def on_host(t: Tensor) -> Tensor:
    """A tensor of the CPU's over the memory of one of the fake's."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(whole, t.storage_offset(), t.size(), t.stride())


def on_device(t: Tensor, device: torch.device) -> Tensor:
    """A copy of the CPU's on a device."""
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
    on_host(out).copy_(t)
    return out


class Emulation(TorchDispatchMode):
    """Every op on tensors of the fake's, and every one that makes them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where ops made of others come whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        wanted = kwargs.get("device")
        asked = None if wanted is None else torch.device(wanted)
        devices = {t.device for t in tensors if t.is_cuda or t.dim()}
        if asked is not None and asked.type == "cuda":
            devices.add(asked)
        name = func._schema.name.partition("::")[2]
        here = next((d for d in devices if d.type == "cuda"), None)
        crossing = name in CROSSING or (name in INDEXING and tensors[0].is_cuda)
        if here is None or func.is_view or name in NATIVE or (len(devices) > 1 and not crossing):
            return func(*args, **kwargs)  # on two devices: torch's own error
        aliases = {id(t): t for t in tensors}

        def lowered(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_cuda:
                alias = on_host(x)
                aliases[id(alias)] = x
                return alias
            if isinstance(x, torch.Generator) and x.device.type == "cuda":
                return None
            return torch.device("cpu") if isinstance(x, torch.device) else x

        op, given = as_the_cpu_has_it(func, tree_map(lowered, args))
        result = op(*given, **tree_map(lowered, kwargs))
        target = here if asked is None else asked
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())

        def raised(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in aliases:
                return aliases[id(x)]
            return x if target.type != "cuda" else on_device(x, target)

        return tree_map(raised, result)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with sdpa_kernel(SDPBackend.MATH), Emulation():
        yield
