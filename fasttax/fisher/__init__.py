"""The diagonal Fisher information of a model: which weights matter for what it already knows."""

from fasttax.fisher.diagonal import DiagonalFisher as DiagonalFisher
from fasttax.fisher.estimate import FisherEstimate as FisherEstimate
from fasttax.fisher.estimate_fisher import estimate_fisher as estimate_fisher
from fasttax.fisher.kronecker import KroneckerEstimate as KroneckerEstimate

__all__ = ["DiagonalFisher", "FisherEstimate", "KroneckerEstimate", "estimate_fisher"]
