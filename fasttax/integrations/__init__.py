"""fasttax in trainers of others: `integrations.transformers`, `integrations.trl`, `integrations.lightning`; each needs its trainer's package.

Nothing here is imported by `import fasttax`.
"""

from fasttax.integrations.control import AdaptiveKL as AdaptiveKL

__all__ = ["AdaptiveKL"]
