"""Token-level KL between a policy and a frozen reference, exact over the whole vocabulary.

With p = softmax(policy logits), q = softmax(reference logits), u = log p - log q:

    kind="policy_ref"   KL(policy || ref) = sum_v p_v u_v
    kind="ref_policy"   KL(ref || policy) = -sum_v q_v u_v
    kind="jsd"          beta KL(ref || m) + (1 - beta) KL(policy || m),
                        m = beta ref + (1 - beta) policy
    kind="renyi"        log(sum_v p_v^beta q_v^(1 - beta)) / (beta - 1)

Logits are tempered first: x = softcap * tanh(logits * logit_scale / softcap) / temperature (no
softcap: logits * logit_scale / temperature). The sums are taken in Bregman form (every term >= 0,
Bregman 1967), so a KL of 1e-7 keeps its digits, and equal logits give exactly 0. JSD as in Lin
1991, generalised as in Agarwal et al. 2024 (arXiv:2306.13649). Rényi 1961; van Erven & Harremoës
2014 (arXiv:1206.2459): of order beta -> 1 it is KL(policy || ref).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.choices import Infinities, KlKind, Reduction
from fasttax._base.interrupts import surfaced
from fasttax._base.library import define, lib, no_double_backward, no_second_derivative
from fasttax.kl.call import (
    OPTIONS,
    Tempering,
    check_logits,
    check_mask,
    tempering,
)
from fasttax.kl.gradients import held_gradients, hold_gradients, obstacle_to_gradients, only_needed
from fasttax.kl.transforms import register_vmap, run
from fasttax.kl.vocab_parallel import combine_kl
from fasttax.kl.weigh import Weighing, weighing
from fasttax.reference.numbers import empty_gradient, wide_dtype
from fasttax.reference.rows import SAVED_KL


@surfaced
def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: KlKind = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    scale: float | Tensor = 1.0,
    inf: Infinities = "propagate",
    inplace_backward: bool = False,
    tp_group: Any = None,
) -> Tensor:
    """KL between policy and reference for every token, exact over the vocabulary.

    Nothing of size N x V is stored but gradients.

    Args:
        logits: (..., V), the policy's: float32, bfloat16, float16 or float64; differentiable.
        ref_logits: (..., V), the reference's; differentiable too. CUDA kernels read float32 beside
            bfloat16 or float16 as they are; other pairs of dtypes, and other devices, get copies in
            the wider one.
        kind: "policy_ref" = KL(policy || ref), "ref_policy" = KL(ref || policy), "jsd" or "renyi"
            (see the module).
        beta: the reference's share of the mixture in "jsd", in [0, 1]; 0 and 1 give 0. The order in
            "renyi", > 0 and not 1.
        temperature: of the policy.
        ref_temperature: of the reference; None is `temperature`.
        softcap: of the policy; None is none.
        ref_softcap: of the reference; None is none.
        logit_scale: of the policy.
        ref_logit_scale: of the reference.
        mask: bool (or 0/1) that broadcasts to (...). A masked token is not read: its output and
            gradient are 0.
        weight: (...), multiplies the tokens' values.
        reduction: "none" (...), "sum" or "mean" (over the unmasked tokens; with none of them 0).
        scale: multiplies the result and its gradients, as `scale * token_kl(...)` does, but in what
            the sweeps are given for each token: no entry of a gradient is gone over again. A finite
            number of either sign, or a 0-d tensor, which is multiplied into `weight` without a
            look at its value.
        inf: at an entry where only the reference is -inf, "propagate" gives KL(policy || ref) =
            inf; "mask" drops entries where either is -inf and renormalises. Both -inf contributes 0
            either way.
        inplace_backward: write the policy's gradient over `logits` (saves an N x V buffer; refused
            if anything else needs their values, as autograd's version check sees).
        tp_group: a torch.distributed group whose ranks hold consecutive shards of the vocabulary,
            which may be empty. Eight floats a token cross the ranks, once. jsd tempers copies of
            the shards in float32, and keeps one of log m for its backward. Not with "renyi".

    Returns:
        float32 (float64 for float64 logits), (...) or 0-d; never negative; NaN for an unmasked row
        with NaN.

    Raises:
        ValueError, TypeError: shape, dtype, device or an option does not fit.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> kl = fasttax.token_kl(logits, ref_logits, mask=mask, reduction="mean")  # nats a token
        >>> kl.backward()
    """
    op = "token_kl"
    t = tempering(
        op,
        kind=kind,
        beta=beta,
        temperature=temperature,
        ref_temperature=ref_temperature,
        softcap=softcap,
        ref_softcap=ref_softcap,
        logit_scale=logit_scale,
        ref_logit_scale=ref_logit_scale,
        inf=inf,
    )
    given = logits
    logits, ref_logits = check_logits(op, logits, ref_logits, shards=tp_group is not None)
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    w = weighing(op, mask, weight, reduction, scale, logits)
    in_forward = w.reduces and not obstacle_to_gradients((logits, ref_logits), w.weight)
    if inplace_backward or tp_group is not None or not in_forward:
        checks.for_backward(op, logits=logits, ref_logits=ref_logits, mask=mask, weight=w.weight)
    if inplace_backward:
        if logits is not given or tp_group is not None:
            raise checks.fail(
                op,
                "inplace_backward",
                "False with tp_group, mixed dtypes or a strided vocabulary",
                "True",
                "pass contiguous logits of one dtype",
            )
        kl = _InplaceTokenKL.apply(logits, ref_logits, mask, t)
    elif tp_group is None and in_forward:
        total: Tensor = _ReducedTokenKL.apply(logits, ref_logits, w, t)
        return total
    else:
        kl = kl_of_rows(op, logits, ref_logits, mask, t, tp_group)
    return w.of(kl)


def kl_of_rows(
    op: str,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    t: Tempering,
    tp_group: Any,
) -> Tensor:
    """The divergence of every token, of checked tensors, for the public function `op`."""
    if tp_group is not None:
        return combine_kl(op, logits, ref_logits, mask, t, tp_group)
    return run("token_kl", t.args(), logits, ref_logits, mask)


# schemas, shapes, autograd


def _token_kl_fake(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    tokens, dtype = logits.shape[:-1], wide_dtype(logits)
    kl = logits.new_empty(tokens, dtype=dtype)
    return kl, logits.new_empty((*tokens, SAVED_KL), dtype=dtype)


def _token_kl_backward_fake(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    need_policy, need_ref = options[-2:]
    return empty_gradient(logits, need_policy), empty_gradient(ref_logits, need_ref)


def _token_kl_backward_inplace_fake(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> Tensor:
    return empty_gradient(ref_logits, options[-1])


def _token_kl_grad_fake(
    token_weight: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kl, saved = _token_kl_fake(logits, ref_logits, mask)
    return kl, *_token_kl_backward_fake(kl, logits, ref_logits, mask, saved, *options)


define(
    f"token_kl(Tensor logits, Tensor ref_logits, Tensor? mask, {OPTIONS}) -> (Tensor, Tensor)",
    reference.token_kl,
    _token_kl_fake,
)
define(
    "token_kl_grad(Tensor token_weight, Tensor logits, Tensor ref_logits, Tensor? mask, "
    f"{OPTIONS}, bool need_policy, bool need_ref) -> (Tensor, Tensor, Tensor)",
    reference.token_kl_grad,
    _token_kl_grad_fake,
)
define(
    "token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits, Tensor? mask, Tensor saved, "
    f"{OPTIONS}, bool need_policy, bool need_ref) -> (Tensor, Tensor)",
    reference.token_kl_backward,
    _token_kl_backward_fake,
)
define(
    "token_kl_backward_(Tensor grad, Tensor(a!) logits, Tensor ref_logits, Tensor? mask, "
    f"Tensor saved, {OPTIONS}, bool need_ref) -> Tensor",
    reference.token_kl_backward_,
    _token_kl_backward_inplace_fake,
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # zeros for `saved`, which has no gradient
    logits, ref_logits, mask, *ctx.options = inputs
    ctx.save_for_backward(logits, ref_logits, mask, output[1])
    ctx.mark_non_differentiable(output[1])


@surfaced
def _backward(ctx: Any, d_kl: Tensor | None, d_saved: None) -> Any:
    if d_kl is None:
        return (None,) * (3 + len(ctx.options))
    checks.no_tangent("token_kl", "the gradient of its result", d_kl)
    needs = ctx.needs_input_grad[:2]
    gradients = torch.ops.fasttax.token_kl_backward(
        d_kl.contiguous(), *ctx.saved_tensors, *ctx.options, *needs
    )
    return *only_needed(gradients, needs), None, *[None] * len(ctx.options)


class _ReducedTokenKL(torch.autograd.Function):
    """The sum or mean of token_kl.

    Its forward knows every token's weight and leaves nothing to do for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        w: Weighing,
        t: Tempering,
    ) -> Tensor:
        token_weight = w.by_token(logits.new_empty(logits.shape[:-1], dtype=wide_dtype(logits)))
        needs = ctx.needs_input_grad[:2]
        kl, *gradients = torch.ops.fasttax.token_kl_grad(
            token_weight, logits.detach(), ref_logits.detach(), w.mask, *t.args(), *needs
        )
        hold_gradients(ctx, only_needed(gradients, needs), token_weight)
        return w.of(kl)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return *held_gradients(ctx, "token_kl", factor), None, None


class _InplaceTokenKL(torch.autograd.Function):
    """token_kl whose backward overwrites the policy's logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering
    ) -> Tensor:
        _check_inplace(logits, ref_logits)
        kl, saved = torch.ops.fasttax.token_kl(
            logits.detach(), ref_logits.detach(), mask, *t.args()
        )
        ctx.options = t.args()
        ctx.save_for_backward(logits, ref_logits, mask, saved)
        return kl

    @staticmethod
    @surfaced
    def backward(ctx: Any, d_kl: Tensor) -> Any:
        checks.no_tangent("token_kl", "the gradient of its result", d_kl)
        logits, ref_logits, mask, saved = ctx.saved_tensors
        need_ref = ctx.needs_input_grad[1]
        logits = logits.detach()
        d_ref = torch.ops.fasttax.token_kl_backward_(
            d_kl.detach().contiguous(), logits, ref_logits, mask, saved, *ctx.options, need_ref
        )
        # a custom op does not; whoever else saved the logits must see it
        torch.autograd.graph.increment_version(logits)
        gradients = only_needed((logits, d_ref), (True, need_ref))
        return *no_second_derivative(gradients, "token_kl"), None, None


def _check_inplace(logits: Tensor, ref_logits: Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    got, way_out = "", "clone them, or pass inplace_backward=False"
    if logits.untyped_storage().data_ptr() == ref_logits.untyped_storage().data_ptr():
        got = "memory shared with ref_logits"
    elif _overlap(logits):
        got = f"rows that may overlap (strides {logits.stride()})"
    if got:
        expected = "logits with memory of their own"
        raise checks.fail("token_kl", "inplace_backward", expected, got, way_out)
    if owner.requires_grad and owner.is_leaf:
        raise checks.fail(
            "token_kl",
            "inplace_backward",
            "logits computed by a model",
            "leaf logits that require grad",
            "their values would be lost; pass inplace_backward=False",
        )


def _overlap(t: Tensor) -> bool:
    """Whether two entries of `t` may be one in memory: expanded, unfolded, or strided so.

    They are none where each dimension steps over all that the finer ones reach.
    """
    reach = 0
    steps = [(n, size) for size, n in zip(t.shape, t.stride(), strict=True) if size > 1]
    for stride, size in sorted(steps):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


torch.library.register_autograd("fasttax::token_kl", _backward, setup_context=_setup, lib=lib)
no_double_backward("token_kl_backward", "token_kl")
no_double_backward("token_kl_grad", "token_kl")
register_vmap("token_kl", tensors=3, outputs=(0, 0))
register_vmap("token_kl_backward", tensors=5)
