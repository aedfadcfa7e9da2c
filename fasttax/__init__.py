"""fasttax: exact token-level KL, diagonal Fisher and EWC, fast enough to leave on in every run."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fasttax import functional as functional
from fasttax._base.library import load_native as _load_native
from fasttax._base.version import __version__ as __version__
from fasttax.ewc import EWC as EWC
from fasttax.ewc import AdamWEWC as AdamWEWC
from fasttax.ewc import FisherMask as FisherMask
from fasttax.fisher import DiagonalFisher as DiagonalFisher
from fasttax.fisher import FisherEstimate as FisherEstimate
from fasttax.fisher import KroneckerEstimate as KroneckerEstimate
from fasttax.fisher import estimate_fisher as estimate_fisher
from fasttax.kl import TokenStats as TokenStats
from fasttax.kl import kl_estimate as kl_estimate
from fasttax.kl import linear_token_kl as linear_token_kl
from fasttax.kl import linear_token_logprobs as linear_token_logprobs
from fasttax.kl import token_kl as token_kl
from fasttax.kl import token_stats as token_stats
from fasttax.kl import topk_kl as topk_kl
from fasttax.kl import topk_logprobs as topk_logprobs

if TYPE_CHECKING:
    from fasttax import integrations as integrations
    from fasttax import merge as merge

    # rooms above this one: `from fasttax.tax import ...` knows their types
    demo: ModuleType
    tax: ModuleType

_load_native()

__all__ = [
    "EWC",
    "AdamWEWC",
    "DiagonalFisher",
    "FisherEstimate",
    "FisherMask",
    "KroneckerEstimate",
    "TokenStats",
    "estimate_fisher",
    "functional",
    "kl_estimate",
    "linear_token_kl",
    "linear_token_logprobs",
    "merge",
    "token_kl",
    "token_stats",
    "topk_kl",
    "topk_logprobs",
]

_ON_USE = ("demo", "integrations", "merge", "tax")


if not TYPE_CHECKING:  # whose readers would take any name for a module

    def __getattr__(name: str) -> ModuleType:
        # on use: they need extras, or nothing else needs them
        if name in _ON_USE:
            return importlib.import_module(f"fasttax.{name}")
        raise AttributeError(
            f"module 'fasttax' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )


def __dir__() -> list[str]:
    return sorted({*__all__, *_ON_USE, "__version__"})
