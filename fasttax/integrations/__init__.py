"""fasttax in trainers of others: transformers, TRL, DeepSpeed, Lightning, Axolotl and more.

`import fasttax` imports nothing of this; each module needs its trainer's package and says so.
"""

import importlib
from typing import Any

from fasttax.integrations.control import AdaptiveKL as AdaptiveKL

__all__ = ["AdaptiveKL"]
MODULES = (
    *("transformers", "trl", "deepspeed", "lightning", "axolotl", "llamafactory"),
    *("verl", "rlhf", "reference"),
)


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"fasttax.integrations.{name}")
    raise AttributeError(
        f"module 'fasttax.integrations' has no attribute {name!r}; it offers "
        f"{', '.join((*__all__, *MODULES))}"
    )
