"""Models averaged weight by weight, streamed over safetensors.

One tensor of each model in memory at a time.
"""

import importlib
from typing import Any

from fasttax.merge.average import fisher_average as fisher_average
from fasttax.merge.average import linear as linear
from fasttax.merge.mergekit import read_mergekit as read_mergekit
from fasttax.merge.mergekit import write_mergekit as write_mergekit

__all__ = ["fisher_average", "linear", "read_mergekit", "write_mergekit"]


def __getattr__(name: str) -> Any:
    # on use: a sweep reports, which needs more than averaging does
    if name == "sweep":
        return importlib.import_module("fasttax.tax.sweeps").sweep
    raise AttributeError(
        f"module 'fasttax.merge' has no attribute {name!r}; it offers {', '.join(__all__)}, sweep"
    )
