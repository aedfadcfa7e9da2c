"""The words that options take, as types: a checker finds a wrong one before a run does."""

from typing import Literal

KlKind = Literal["policy_ref", "ref_policy", "jsd", "renyi"]
LogpEstimator = Literal["k1", "k2", "k3"]
Reduction = Literal["none", "sum", "mean"]
Infinities = Literal["propagate", "mask"]
GradMode = Literal["auto", "forward", "recompute"]
