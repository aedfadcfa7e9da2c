"""The ops of EWC and of the diagonal Fisher on plain tensors."""

from fasttax.ewc.ops import ewc_add_grad_ as ewc_add_grad_
from fasttax.ewc.ops import ewc_penalty as ewc_penalty
from fasttax.ewc.ops import ewc_prox_ as ewc_prox_
from fasttax.ewc.ops import lora_ewc_penalty as lora_ewc_penalty
from fasttax.fisher.ops import accumulate_sqgrad_ as accumulate_sqgrad_
from fasttax.fisher.ops import bias_sqgrad as bias_sqgrad
from fasttax.fisher.ops import embedding_sqgrad as embedding_sqgrad
from fasttax.fisher.ops import linear_sqgrad as linear_sqgrad
from fasttax.fisher.ops import lm_head_fisher as lm_head_fisher
from fasttax.fisher.ops import norm_sqgrad as norm_sqgrad

__all__ = [
    "accumulate_sqgrad_",
    "bias_sqgrad",
    "embedding_sqgrad",
    "ewc_add_grad_",
    "ewc_penalty",
    "ewc_prox_",
    "linear_sqgrad",
    "lm_head_fisher",
    "lora_ewc_penalty",
    "norm_sqgrad",
]
