"""fasttax in trainers of others.

`integrations.transformers`, `integrations.trl`, `integrations.lightning`; each needs its trainer's
package.

Nothing here is imported by `import fasttax`.
"""

import importlib
from typing import Any

from fasttax.integrations.control import AdaptiveKL as AdaptiveKL

__all__ = ["AdaptiveKL"]
MODULES = ("transformers", "trl", "lightning", "reference")


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"fasttax.integrations.{name}")
    raise AttributeError(
        f"module 'fasttax.integrations' has no attribute {name!r}; it offers "
        f"{', '.join((*__all__, *MODULES))}"
    )
