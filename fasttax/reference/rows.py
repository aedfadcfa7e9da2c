"""What the ops over logits give and save for a token: the rows' order and widths.

Every other place takes them from here: `csrc/math/kl.h` has the same (TokenStat, KlRow, StatsRow).
"""

from __future__ import annotations

# the rows of what token_stats gives
STATS = ("logp", "ref_logp", "entropy", "lse", "kl_policy_ref", "kl_ref_policy")
LOGP, REF_LOGP, ENTROPY, LSE, KL_POLICY_REF, KL_REF_POLICY = range(len(STATS))

# those of the linear ops: token_stats', token_kl's value, and the reference's lse
LINEAR = (*STATS, "kl", "ref_lse")
KL, REF_LSE = range(len(STATS), len(LINEAR))

SAVED_KL = 8  # numbers that token_kl's forward saves of a token for its backward: KlRow
SAVED_STATS = 11  # and token_stats': StatsRow
