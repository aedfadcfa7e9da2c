"""Monte-Carlo estimates of the KL from the sampled tokens' log-probs.

k1, k2, k3 as in Schulman 2020, "Approximating KL divergence": with r = ref_logp - logp of a token
sampled from the policy, k1 = -r, k2 = r^2/2, k3 = e^r - 1 - r; k1 and k3 are unbiased for
KL(policy || ref).
"""

from __future__ import annotations

from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.choices import LogpEstimator, Reduction
from fasttax.kl.call import check_mask
from fasttax.kl.weigh import CLIP, weighing
from fasttax.reference.weigh import K1, K2, K3

ESTIMATORS = {"k1": K1, "k2": K2, "k3": K3}
GRADS = ("estimator", "reverse_kl")


def kl_estimate(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    kind: LogpEstimator = "k3",
    old_logp: Tensor | None = None,
    grad: str = "estimator",
    clip: float = CLIP,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Monte-Carlo estimate of KL(policy || ref) from the sampled tokens' log-probs.

    What its mean over the sampled tokens is the gradient of, with grad="estimator":

    - without `old_logp`, on samples of the present weights: k1's is 0; k2's is that of KL(policy ||
      ref), though its value is another; k3's is that of KL(ref || policy).
    - with `old_logp`, whatever weights sampled: k1's and k3's are those of KL(policy || ref), to
      which their values belong; k2's is that of E[r^2/2], another quantity (off by 31 % where
      it was measured, on a language model).

    grad="reverse_kl" is that of KL(policy || ref) in all cases: with `old_logp` whatever weights
    sampled, without it on samples of the present ones. All of these are of each token's
    distribution at its prefix. The KL of whole sequences has a term more, of how the policy comes
    to its prefixes: `FullKL(estimator="sequence")` in GRPO and RLOO.

    Args:
        logp: (...), of the tokens that were sampled, under the policy.
        ref_logp: (...), of the same tokens under the reference.
        kind: "k1" = -r, "k2" = r^2/2, "k3" = e^r - 1 - r, with r = ref_logp - logp.
        old_logp: log-probs under the policy that sampled; multiplies by the importance ratio
            exp(logp - old_logp), differentiated.
        grad: "estimator" differentiates what is returned; "reverse_kl" keeps the value and takes
            the gradient of KL(policy || ref): ratio * (logp - ref_logp) * d logp.
        clip: log-ratio above which exp goes on along its tangent.
        mask: as in `token_kl`; what is under it may be NaN.
        weight: as in `token_kl`.
        reduction: as in `token_kl`.
        scale: as in `token_kl`.

    Returns:
        float32 (float64 for float64 log-probs), (...) or 0-d.

    Raises:
        ValueError, TypeError: shape, dtype, device or an option does not fit.

    Example:
        >>> stats = fasttax.token_stats(logits, ref_logits, ids, outputs=("logp", "ref_logp"))
        >>> k3 = fasttax.kl_estimate(stats.logp, stats.ref_logp, kind="k3", mask=mask)
        >>> k3.shape
        torch.Size([2, 5])
    """
    op = "kl_estimate"
    given = {"logp": logp, "ref_logp": ref_logp}
    if old_logp is not None:
        given["old_logp"] = old_logp
    for name, value in given.items():
        checks.tensor(op, name, value, forward_mode=True)
        if value.shape != logp.shape:
            raise checks.fail(op, name, f"shape {tuple(logp.shape)} as logp", value)
        checks.same_device(op, name, value, "logp", logp)
    checks.choice(op, "kind", kind, ESTIMATORS)
    checks.choice(op, "grad", grad, GRADS)
    clip = checks.number(op, "clip", clip, low=0, high=40, open_low=True)
    mask = check_mask(op, mask, logp.shape, logp.device)
    w = weighing(op, mask, weight, reduction, scale, logp[..., None], forward_mode=True)
    dtype = reference.wide_dtype(*given.values())
    values = [value.to(dtype)[None] for value in given.values()]
    (value,) = w.of_rows(
        values,
        (ESTIMATORS[kind],),
        pair=range(len(values)),
        clip=clip,
        reverse=grad == "reverse_kl",
    )
    return value
