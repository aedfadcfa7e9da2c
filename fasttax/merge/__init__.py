"""Models averaged weight by weight, streamed over safetensors.

One tensor of each model in memory at a time.
"""

from fasttax.merge.average import fisher_average as fisher_average
from fasttax.merge.average import linear as linear
from fasttax.merge.sweeps import sweep as sweep

__all__ = ["fisher_average", "linear", "sweep"]
