"""The KL of responses in the shapes that verl and OpenRLHF have: (B, R) beside a (B, R) mask.

Both frameworks estimate the KL to the reference from the sampled tokens alone (k1, k2, k3). These
are the exact ones, for the place of that estimate; the mask's zeros are never read:

    verl      kld = response_kl(logits, ref_logits, data["response_mask"])
              agg_loss(loss_mat=kld, loss_mask=response_mask, loss_agg_mode=..., ...)
    OpenRLHF  kl = response_kl(output["logits"], ref_output["logits"], experience.action_mask)
              aggregate_loss(kl, experience.action_mask, **loss_batch_info)

Neither framework need be installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttax._base import checks
from fasttax._base.choices import KlKind
from fasttax.kl import linear_token_kl, token_kl, topk_kl


def response_kl(
    logits: Tensor,
    ref_logits: Tensor,
    response_mask: Tensor,
    *,
    kind: KlKind = "policy_ref",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
) -> Tensor:
    """KL of each response token's two distributions, exact over the vocabulary: (B, R) float32.

    Args:
        logits: (B, L, V) of prompts and responses, whose last R tokens are the responses: the token
            at position t is predicted at t - 1. Or (B, R, V), those of the responses' tokens alone.
        ref_logits: as `logits`, the reference's.
        response_mask: (B, R), bool or numbers: which tokens count. Others give 0, with gradient 0.
        kind: as in `token_kl`.
        jsd_beta: the reference's share of the mixture in "jsd", the order in "renyi".
        temperature: of the policy. OpenRLHF's actor and verl's engine have divided their logits by
            the sampling temperature already: leave it at 1 there.
        ref_temperature: of the reference; None is the policy's.

    Returns:
        (B, R), differentiable by `logits`; never negative.

    Raises:
        ValueError, TypeError: a shape, dtype or option does not fit.

    Example:
        >>> from fasttax.integrations.rlhf import response_kl
        >>> response_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])  # of the last 3 tokens
        >>> response_kl(logits, ref_logits, response_mask).shape
        torch.Size([2, 3])
    """
    op = "response_kl"
    mask = _mask(op, response_mask)
    return token_kl(
        _of_responses(op, "logits", logits, mask),
        _of_responses(op, "ref_logits", ref_logits, mask),
        kind=kind,
        beta=jsd_beta,
        temperature=temperature,
        ref_temperature=ref_temperature,
        mask=mask,
    )


def response_topk_kl(
    logits: Tensor,
    ref_topk_logp: Tensor,
    ref_topk_ids: Tensor,
    response_mask: Tensor,
    *,
    kind: KlKind = "ref_policy",
    tail: str = "ghost",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """`response_kl` against a reference known by its k largest log-probs, as teachers serve it.

    tail="ghost" gathers all other tokens into one on both sides: a lower bound of the full KL that
    is never negative, so that there is nothing to clamp, where sum p_k (log p_k - log q_k) over the
    k tokens alone is below 0 wherever the policy gives them more mass than the reference does.

    Args:
        logits: as in `response_kl`.
        ref_topk_logp: (B, L, k) or (B, R, k), at the reference's own temperature.
        ref_topk_ids: their ids.
        response_mask: as in `response_kl`.
        kind: as in `token_kl`.
        tail: "ghost" or "renormalize", as in `topk_kl`.
        jsd_beta: as in `response_kl`.
        temperature: of the policy.

    Returns:
        (B, R), differentiable by `logits`.

    Raises:
        ValueError, TypeError, IndexError: a shape, dtype, id or option does not fit.

    Example:
        >>> from fasttax.integrations.rlhf import response_topk_kl
        >>> logp, top_ids = fasttax.topk_logprobs(ref_logits, 4)
        >>> kld = response_topk_kl(logits, logp, top_ids, response_mask)
    """
    op = "response_topk_kl"
    mask = _mask(op, response_mask)
    return topk_kl(
        _of_responses(op, "logits", logits, mask),
        _of_responses(op, "ref_topk_logp", ref_topk_logp, mask),
        _of_responses(op, "ref_topk_ids", ref_topk_ids, mask),
        kind=kind,
        tail=tail,
        beta=jsd_beta,
        temperature=temperature,
        mask=mask,
    )


def response_linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    response_mask: Tensor,
    *,
    kind: KlKind = "policy_ref",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    **options: Any,
) -> Tensor:
    """`response_kl` of hidden @ weight^T against ref_hidden @ ref_weight^T, without either logits.

    Args:
        hidden: (B, L, H) or (B, R, H), as the logits of `response_kl`.
        weight: (V, H), the policy's head; differentiable, as `hidden`.
        ref_hidden: (B, L, H') or (B, R, H').
        ref_weight: (V, H').
        response_mask: as in `response_kl`.
        kind: as in `token_kl`.
        jsd_beta: as in `response_kl`.
        temperature: as in `response_kl`; logits have not been divided here.
        ref_temperature: as in `response_kl`.
        options: others of `linear_token_kl`, as bias, softcap and logit_scale.

    Returns:
        (B, R).

    Raises:
        ValueError, TypeError: a shape, dtype or option does not fit.

    Example:
        >>> from fasttax.integrations.rlhf import response_linear_kl
        >>> kld = response_linear_kl(
        ...     hidden, head.weight, ref_hidden, ref_head.weight, response_mask
        ... )
    """
    op = "response_linear_kl"
    mask = _mask(op, response_mask)
    return linear_token_kl(
        _of_responses(op, "hidden", hidden, mask),
        weight,
        _of_responses(op, "ref_hidden", ref_hidden, mask),
        ref_weight,
        kind=kind,
        beta=jsd_beta,
        temperature=temperature,
        ref_temperature=ref_temperature,
        mask=mask,
        **options,
    )


def _mask(op: str, response_mask: Any) -> Tensor:
    if not isinstance(response_mask, Tensor) or response_mask.dim() != 2:
        raise checks.fail(
            op,
            "response_mask",
            "a tensor (B, R), padded",
            response_mask,
            "of a nested one take .to_padded_tensor(0)",
        )
    return response_mask


def _of_responses(op: str, name: str, value: Any, mask: Tensor) -> Tensor:
    """The rows that predict the responses' tokens: (B, R, ...)."""
    rows, length = mask.shape
    if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[0] != rows:
        raise checks.fail(op, name, f"({rows}, L or {length}, ...) beside the mask", value)
    if value.shape[1] == length:
        return value
    if value.shape[1] < length:
        raise checks.fail(
            op, name, f"at least the {length} positions of response_mask", value, "pad both alike"
        )
    return value[:, -length - 1 : -1]
