"""EWC: hold the weights that matter, let the rest move."""

from fasttax.ewc.adamw import AdamWEWC as AdamWEWC
from fasttax.ewc.drift import Drift as Drift
from fasttax.ewc.ewc import EWC as EWC
from fasttax.ewc.mask import FisherMask as FisherMask

__all__ = ["EWC", "AdamWEWC", "Drift", "FisherMask"]
