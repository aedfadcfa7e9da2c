"""Every op in plain PyTorch: the specification, the test oracle, the fallback on any device, the
benchmarks' baseline.

Computed in float32, or in float64 for float64 inputs.
"""

from fasttax.reference.ewc import SPLIT_STEP as SPLIT_STEP
from fasttax.reference.ewc import decode_split as decode_split
from fasttax.reference.ewc import decode_u8log as decode_u8log
from fasttax.reference.ewc import ewc_adamw_ as ewc_adamw_
from fasttax.reference.ewc import ewc_add_grad_ as ewc_add_grad_
from fasttax.reference.ewc import ewc_penalty as ewc_penalty
from fasttax.reference.ewc import ewc_penalty_backward as ewc_penalty_backward
from fasttax.reference.ewc import ewc_prox_ as ewc_prox_
from fasttax.reference.ewc import lora_ewc_penalty as lora_ewc_penalty
from fasttax.reference.ewc import lora_ewc_penalty_backward as lora_ewc_penalty_backward
from fasttax.reference.ewc import prox as prox
from fasttax.reference.fisher import accumulate_sqgrad_ as accumulate_sqgrad_
from fasttax.reference.fisher import bias_sqgrad_ as bias_sqgrad_
from fasttax.reference.fisher import embedding_rows as embedding_rows
from fasttax.reference.fisher import embedding_sqgrad_ as embedding_sqgrad_
from fasttax.reference.fisher import example_sums as example_sums
from fasttax.reference.fisher import label_variance_ as label_variance_
from fasttax.reference.fisher import linear_sqgrad_ as linear_sqgrad_
from fasttax.reference.fisher import lm_head_fisher_ as lm_head_fisher_
from fasttax.reference.fisher import norm_sqgrad_ as norm_sqgrad_
from fasttax.reference.kl import ENTROPY as ENTROPY
from fasttax.reference.kl import JSD as JSD
from fasttax.reference.kl import KL_POLICY_REF as KL_POLICY_REF
from fasttax.reference.kl import KL_REF_POLICY as KL_REF_POLICY
from fasttax.reference.kl import LOGP as LOGP
from fasttax.reference.kl import LSE as LSE
from fasttax.reference.kl import POLICY_REF as POLICY_REF
from fasttax.reference.kl import REF_LOGP as REF_LOGP
from fasttax.reference.kl import REF_POLICY as REF_POLICY
from fasttax.reference.kl import divergences_to_mixture as divergences_to_mixture
from fasttax.reference.kl import gap as gap
from fasttax.reference.kl import jensen_gap as jensen_gap
from fasttax.reference.kl import log_mixture as log_mixture
from fasttax.reference.kl import log_probs as log_probs
from fasttax.reference.kl import temper as temper
from fasttax.reference.kl import temper_slope as temper_slope
from fasttax.reference.kl import token_kl as token_kl
from fasttax.reference.kl import token_kl_backward as token_kl_backward
from fasttax.reference.kl import token_kl_backward_ as token_kl_backward_
from fasttax.reference.kl import token_kl_grad as token_kl_grad
from fasttax.reference.kl import token_stats as token_stats
from fasttax.reference.kl import token_stats_backward as token_stats_backward
from fasttax.reference.numbers import times as times
from fasttax.reference.numbers import wide as wide
