"""A model's forward over whole sequences, which no cache of keys and values takes part in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
