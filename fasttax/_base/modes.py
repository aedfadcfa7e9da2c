"""Which of torch's modes a call runs in, and a model's own mode put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch.autograd import forward_ad

from fasttax._base.inner import in_four_bits

HALVES = (torch.bfloat16, torch.float16)


def compiling() -> bool:
    """Whether torch.compile traces the call: its tensors have no values."""
    return torch.compiler.is_compiling()


def transforming() -> bool:
    """Whether torch.func's transforms (vmap, grad, vjp, jacrev) are at work."""
    return bool(torch._C._are_functorch_transforms_active())


def ordinary(t: Tensor) -> Tensor:
    """`t`, or a copy of what torch.inference_mode made, which autograd keeps for no backward."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast multiplies in on a device; None where it is off or leaves float32."""
    if not torch.amp.is_autocast_available(device.type):
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype in HALVES else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ops take their tensors as they are; nothing where there is no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def has_tangent(t: Tensor) -> bool:
    """Whether a forward-mode derivative goes along with `t`: forward_ad's, or torch.func.jvp's.

    Under torch.func a tensor is wrapped once for each transform that it is part of. The tensors of
    torch.compile's trace show no tangent: inside a level of forward mode any may have one.
    """
    if compiling():
        return forward_ad._current_level >= 0
    if not transforming():
        return forward_ad.unpack_dual(t).tangent is not None
    stack = get_interpreter_stack() or ()
    jvps = {layer.level() for layer in stack if layer.key() == TransformType.Jvp}
    while is_functorch_wrapped_tensor(t):
        if maybe_get_level(t) in jvps:
            return True
        t = get_unwrapped(t)
    return False


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; its modes are as before at the end.

    Not by model.eval(), of which some classes make more: loralib's merges its weights. And but for
    bitsandbytes' 4-bit layers, which drop nothing: on a CPU their first forward in eval mode
    without a gradient lays the weight out anew, from where none goes back any more.
    """
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            # not m.weight, which a parametrization computes: spectral_norm iterates at every look
            own = dict(m.named_parameters(recurse=False)).get("weight")
            m.training = in_four_bits(own)
        yield
    finally:
        for m in training:
            m.training = True
