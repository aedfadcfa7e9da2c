"""Forwards that are a look at a model and no training: in eval mode, and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fasttax._base import inner


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, every part of the model is in eval mode; its modes are as before at the end.

    bitsandbytes' 4-bit layers, which drop nothing, keep their mode: on a CPU the first forward in
    eval mode without a gradient lays their weights out anew, from where none goes back any more.
    """
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = inner.in_four_bits(getattr(m, "weight", None))
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, no config of the model asks for a cache.

    With one transformers does not tell packed documents apart by their position_ids, and modules
    that run again would meet it filled. Not by an argument of the forward, which the heads of a
    model do not pass on.
    """
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    asking = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        for config in asking:
            config.use_cache = False
        yield
    finally:
        for config in asking:
            config.use_cache = True
