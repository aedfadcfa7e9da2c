"""Token-level KL to a frozen reference, exact over the whole vocabulary."""

from fasttax.kl.kl_estimate import kl_estimate as kl_estimate
from fasttax.kl.linear import linear_token_kl as linear_token_kl
from fasttax.kl.linear import linear_token_logprobs as linear_token_logprobs
from fasttax.kl.token_kl import token_kl as token_kl
from fasttax.kl.token_stats import TokenStats as TokenStats
from fasttax.kl.token_stats import token_stats as token_stats
from fasttax.kl.topk import topk_kl as topk_kl
from fasttax.kl.topk import topk_logprobs as topk_logprobs

__all__ = [
    "TokenStats",
    "kl_estimate",
    "linear_token_kl",
    "linear_token_logprobs",
    "token_kl",
    "token_stats",
    "topk_kl",
    "topk_logprobs",
]
