"""Token-level KL between a policy and a frozen reference, exact over the whole vocabulary.

With p = softmax(policy logits), q = softmax(reference logits), u = log p - log q:

    kind="policy_ref"   KL(policy || ref) = sum_v p_v u_v
    kind="ref_policy"   KL(ref || policy) = -sum_v q_v u_v
    kind="jsd"          beta KL(ref || m) + (1 - beta) KL(policy || m),   m = beta ref + (1 - beta)
    policy

Logits are tempered first: x = softcap * tanh(logits * logit_scale / softcap) / temperature (no
softcap: logits * logit_scale / temperature). The sums are taken in Bregman form (every term >= 0,
Bregman 1967), so a KL of 1e-7 keeps its digits, and equal logits give exactly 0. JSD as in Lin
1991, generalised as in Agarwal et al. 2024 (arXiv:2306.13649).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.library import define, lib, no_double_backward, second_derivative_message
from fasttax.kl.transforms import differentiable, register_vmap
from fasttax.kl.vocab_parallel import merge_kl

KINDS = ("policy_ref", "ref_policy", "jsd")
REDUCTIONS = ("none", "sum", "mean")
INF = ("propagate", "mask")


@dataclass(frozen=True)
class Tempering:
    """How raw logits become the distributions: checked once, passed to the op as plain numbers."""

    kind: int
    beta: float
    scale: float
    ref_scale: float
    softcap: float
    ref_softcap: float
    inv_temperature: float
    ref_inv_temperature: float
    inf_mask: bool

    def args(self) -> tuple[Any, ...]:
        return (
            self.kind,
            self.beta,
            self.scale,
            self.ref_scale,
            self.softcap,
            self.ref_softcap,
            self.inv_temperature,
            self.ref_inv_temperature,
            self.inf_mask,
        )


def tempering(
    op: str,
    *,
    kind: str = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    inf: str = "propagate",
) -> Tempering:
    temperature = checks.number(op, "temperature", temperature, low=0, open_low=True)
    ref_temperature = (
        temperature
        if ref_temperature is None
        else checks.number(op, "ref_temperature", ref_temperature, low=0, open_low=True)
    )
    return Tempering(
        kind=KINDS.index(checks.choice(op, "kind", kind, KINDS)),
        beta=checks.number(op, "beta", beta, low=0, high=1),
        scale=checks.number(op, "logit_scale", logit_scale, low=0, open_low=True),
        ref_scale=checks.number(op, "ref_logit_scale", ref_logit_scale, low=0, open_low=True),
        softcap=0.0
        if softcap is None
        else checks.number(op, "softcap", softcap, low=0, open_low=True),
        ref_softcap=0.0
        if ref_softcap is None
        else checks.number(op, "ref_softcap", ref_softcap, low=0, open_low=True),
        inv_temperature=checks.number(op, "1 / temperature", 1 / temperature),
        ref_inv_temperature=checks.number(op, "1 / ref_temperature", 1 / ref_temperature),
        inf_mask=checks.choice(op, "inf", inf, INF) == "mask",
    )


def check_logits(op: str, logits: Any, ref_logits: Any) -> tuple[Tensor, Tensor]:
    """Both logits with one dtype and a contiguous vocabulary; leading strides stay as they are."""
    checks.tensor(op, "logits", logits)
    checks.tensor(op, "ref_logits", ref_logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise checks.fail(op, "logits", "shape (..., V) with V >= 1", logits)
    if logits.shape[-1] != ref_logits.shape[-1]:
        raise checks.fail(
            op,
            "ref_logits",
            f"a vocabulary of {logits.shape[-1]} as in logits",
            ref_logits,
            "policy and reference must share one tokenizer; cut padded vocabularies to the common "
            "size",
        )
    if logits.shape != ref_logits.shape:
        raise checks.fail(op, "ref_logits", f"shape {tuple(logits.shape)} as logits", ref_logits)
    checks.same_device(op, "ref_logits", ref_logits, "logits", logits)
    if logits.dtype != ref_logits.dtype:
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits, (ref_logits if ref_logits.stride(-1) == 1 else ref_logits.contiguous())


def check_mask(
    op: str, mask: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    return (checks.per_token(op, "mask", mask, shape, device) != 0).contiguous()


def _masked_weight(op: str, values: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
    weight = checks.per_token(op, "weight", weight, values.shape, values.device).to(values.dtype)
    return weight if mask is None else weight.masked_fill(~mask, 0.0)


def _count(values: Tensor, mask: Tensor | None) -> int | Tensor:
    """Of the unmasked tokens, at least 1; no host sync."""
    return max(1, values.numel()) if mask is None else mask.sum().clamp(min=1)


def reduce(
    op: str, values: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str
) -> Tensor:
    """Weighs and reduces per-token values.

    "mean" divides by the number of unmasked tokens (0 of them: 0).
    """
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    if weight is not None:
        values = values * _masked_weight(op, values, mask, weight)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / _count(values, mask)


def reduced_gradient(
    op: str, values: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str
) -> Tensor:
    """The gradient of `reduce` ("sum" or "mean") by the tokens' values.

    Known before any of them is. `values` gives shape and dtype.
    """
    by_token = (
        torch.ones_like(values)
        if weight is None
        else _masked_weight(op, values, mask, weight).contiguous()
    )
    return by_token if reduction == "sum" else by_token / _count(values, mask)


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
    inf: str = "propagate",
    inplace_backward: bool = False,
    tp_group: Any = None,
) -> Tensor:
    """KL between policy and reference for every token, exact over the vocabulary.

    Nothing of size N x V is stored but gradients.

    Args:
        logits, ref_logits: (..., V), float32, bfloat16, float16 or float64; differentiable, each on
            its own.
        kind: "policy_ref" = KL(policy || ref), "ref_policy" = KL(ref || policy), "jsd" (see the
            module).
        beta: the reference's share of the mixture in "jsd", in [0, 1]; 0 and 1 give 0.
        temperature, softcap, logit_scale: of the policy; ref_...: of the reference.
            `ref_temperature=None` is `temperature`; a softcap of None is none, on each side by
            itself.
        mask: bool (or 0/1) that broadcasts to (...). A masked token is not read: its output and
            gradient are 0.
        weight: (...), multiplies the tokens' values.
        reduction: "none" (...), "sum" or "mean" (over the unmasked tokens; with none of them 0).
        inf: at an entry where only the reference is -inf, "propagate" gives KL(policy || ref) =
            inf; "mask" drops entries where either is -inf and renormalises. Both -inf contributes 0
            either way.
        inplace_backward: write the policy's gradient over `logits` (saves an N x V buffer; refused
            if anything else needs their values, as autograd's version check sees).
        tp_group: a torch.distributed group whose ranks hold consecutive shards of the vocabulary. A
            few floats a token cross the ranks. jsd keeps a shard of log m in float32 for its
            backward, inf="mask" copies of the shards.

    Returns:
        float32 (float64 for float64 logits), (...) or 0-d; never negative; NaN for an unmasked row
        with NaN.

    Raises:
        ValueError, TypeError: shape, dtype, device or an option does not fit.
        RuntimeError: a second derivative is asked for.
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
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    given = logits
    logits, ref_logits = check_logits(op, logits, ref_logits)
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    if tp_group is not None and not inplace_backward:
        kl = merge_kl(op, logits, ref_logits, mask, t, tp_group)
    elif inplace_backward:
        if logits is not given or tp_group is not None:
            raise checks.fail(
                op,
                "inplace_backward",
                "False with tp_group, mixed dtypes or a strided vocabulary",
                "True",
                "pass contiguous logits of one dtype",
            )
        kl = _InplaceTokenKL.apply(logits, ref_logits, mask, t)
    elif reduction != "none" and not gradient_in_forward((logits, ref_logits), weight):
        summed: Tensor = _ReducedTokenKL.apply(logits, ref_logits, mask, weight, reduction, t)
        return summed
    elif torch._C._are_functorch_transforms_active():
        kl = differentiable("token_kl", t.args(), logits, ref_logits, mask)[0]
    else:
        kl = torch.ops.fasttax.token_kl(logits, ref_logits, mask, *t.args())[0]
    return reduce(op, kl, mask, weight, reduction)


# --- schemas, shapes, autograd -----------------------------------------------------------------------------------------

_OPTIONS = "int kind, float beta, float scale, float ref_scale, float softcap, float ref_softcap, float inv_temperature, float ref_inv_temperature, bool inf_mask"
STATS = 8  # what a native forward keeps of a token for its backward: csrc/math/kl.h, KlRow


def _token_kl_fake(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1], dtype=dtype), logits.new_empty(
        (*logits.shape[:-1], STATS), dtype=dtype
    )


def _token_kl_backward_fake(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    need_policy, need_ref = options[-2:]
    return (
        logits.new_empty(logits.shape if need_policy else (0,)),
        ref_logits.new_empty(ref_logits.shape if need_ref else (0,)),
    )


def _token_kl_grad_fake(
    token_weight: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kl, stats = _token_kl_fake(logits, ref_logits, mask)
    return (kl, *_token_kl_backward_fake(kl, logits, ref_logits, mask, stats, *options))


define(
    f"token_kl(Tensor logits, Tensor ref_logits, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.token_kl,
    _token_kl_fake,
)
define(
    "token_kl_grad(Tensor token_weight, Tensor logits, Tensor ref_logits, Tensor? mask, "
    f"{_OPTIONS}, bool need_policy, bool need_ref) "
    "-> (Tensor, Tensor, Tensor)",
    reference.token_kl_grad,
    _token_kl_grad_fake,
)
define(
    "token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits, Tensor? mask, Tensor stats, "
    f"{_OPTIONS}, bool need_policy, "
    "bool need_ref) -> (Tensor, Tensor)",
    reference.token_kl_backward,
    _token_kl_backward_fake,
)
define(
    "token_kl_backward_(Tensor grad, Tensor(a!) logits, Tensor ref_logits, Tensor? mask, Tensor "
    f"stats, {_OPTIONS}, bool need_ref) -> Tensor",
    reference.token_kl_backward_,
    lambda grad, logits, ref_logits, mask, stats, *options: ref_logits.new_empty(
        ref_logits.shape if options[-1] else (0,)
    ),
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, ref_logits, mask, *ctx.options = inputs
    ctx.save_for_backward(logits, ref_logits, mask, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_kl: Tensor, d_stats: Tensor) -> Any:
    logits, ref_logits, mask, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    d = torch.ops.fasttax.token_kl_backward(
        d_kl.contiguous(), logits, ref_logits, mask, stats, *ctx.options, *needs
    )
    return (
        d[0] if needs[0] else None,
        d[1] if needs[1] else None,
        None,
        *[None] * len(ctx.options),
    )


NO_GRAD = "nothing requires grad"


def gradient_in_forward(
    tensors: Sequence[Tensor | None], weight: Tensor | None, stateless: bool = False
) -> str:
    """Why a forward can't write the gradients of `tensors` while it is at it; "" where it can.

    float16 gradients would underflow before a GradScaler's factor reaches them; torch.compile and
    torch.func want ops without state (`stateless`: there is one).
    """
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return NO_GRAD
    if any(t is not None and t.dtype == torch.float16 for t in tensors):
        return "a float16 gradient would underflow before a GradScaler's factor reaches it"
    if weight is not None and weight.requires_grad:
        return "the tokens' weights require grad"
    if (
        torch.compiler.is_compiling() and not stateless
    ) or torch._C._are_functorch_transforms_active():
        return "torch.compile and torch.func want ops without state"
    return ""


def _scaled(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """Gradient * factor; over `gradient` unless it is to be kept, and with no pass at all where a
    factor on the CPU is 1.
    """
    if factor.numel() == 1 and factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient.clone() if keep else gradient
    return gradient * factor if keep else gradient.mul_(factor)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient that was computed without a graph.

    Differentiating it further is an error, not a silent 0.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(ctx.op, "its backward"))


def hold_gradients(ctx: Any, gradients: Sequence[Tensor | None], token_weight: Tensor) -> None:
    """Keeps a forward's gradients for `held_gradients`."""
    ctx.gradients = list(gradients)
    # a second backward without retain_graph gets autograd's own error
    ctx.save_for_backward(token_weight)


def held_gradients(ctx: Any, op: str, factor: Tensor) -> list[Tensor | None]:
    """The gradients that the forward left, times what came from above.

    Nobody else holds them, or autograd would copy them.
    """
    ctx.saved_tensors  # noqa: B018  (raises on a freed graph)
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    gradients, ctx.gradients = ctx.gradients, ctx.gradients if keep else None
    gradients = [d if d is None else _scaled(d, factor.detach(), keep) for d in gradients]
    return no_second_derivative(gradients, op)


def no_second_derivative(gradients: list[Tensor | None], op: str) -> list[Tensor | None]:
    """Gradients made without a graph, under create_graph.

    Using what autograd would take for their graph is an error.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    marker = torch.zeros((), requires_grad=True)
    return [d if d is None else _NoSecondDerivative.apply(d, marker, op) for d in gradients]


class _ReducedTokenKL(torch.autograd.Function):
    """The sum or mean of token_kl.

    Its forward knows every token's weight and leaves nothing to do for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        reduction: str,
        t: Tempering,
    ) -> Tensor:
        shape_of_kl = logits.new_empty(
            logits.shape[:-1],
            dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
        )
        token_weight = reduced_gradient("token_kl", shape_of_kl, mask, weight, reduction)
        needs = ctx.needs_input_grad[:2]
        kl, *gradients = torch.ops.fasttax.token_kl_grad(
            token_weight, logits.detach(), ref_logits.detach(), mask, *t.args(), *needs
        )
        hold_gradients(
            ctx,
            [d if need else None for d, need in zip(gradients, needs, strict=True)],
            token_weight,
        )
        return reduce("token_kl", kl, mask, weight, reduction)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return *held_gradients(ctx, "token_kl", factor), None, None, None, None


class _InplaceTokenKL(torch.autograd.Function):
    """token_kl whose backward overwrites the policy's logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, t: Tempering
    ) -> Tensor:
        owner = logits if logits._base is None else logits._base
        shared = logits.untyped_storage().data_ptr() == ref_logits.untyped_storage().data_ptr()
        if shared or any(
            size > 1 and stride == 0
            for size, stride in zip(logits.shape, logits.stride(), strict=True)
        ):
            got = "memory shared with ref_logits" if shared else "expanded ones"
            raise checks.fail(
                "token_kl",
                "inplace_backward",
                "logits with memory of their own",
                got,
                "clone them, or pass inplace_backward=False",
            )
        if owner.requires_grad and owner.is_leaf:
            raise checks.fail(
                "token_kl",
                "inplace_backward",
                "logits computed by a model",
                "leaf logits that require grad",
                "their values would be lost; pass inplace_backward=False",
            )
        kl, stats = torch.ops.fasttax.token_kl(
            logits.detach(), ref_logits.detach(), mask, *t.args()
        )
        ctx.options = t.args()
        ctx.save_for_backward(logits, ref_logits, mask, stats)
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_kl: Tensor) -> Any:
        logits, ref_logits, mask, stats = ctx.saved_tensors
        need_ref = ctx.needs_input_grad[1]
        logits = logits.detach()
        d_ref = torch.ops.fasttax.token_kl_backward_(
            d_kl.contiguous(), logits, ref_logits, mask, stats, *ctx.options, need_ref
        )
        # a custom op does not; whoever else saved the logits must see it
        torch.autograd.graph.increment_version(logits)
        return logits, (d_ref if need_ref else None), None, None


torch.library.register_autograd("fasttax::token_kl", _backward, setup_context=_setup, lib=lib)
no_double_backward("token_kl_backward", "token_kl")
no_double_backward("token_kl_grad", "token_kl")
register_vmap("token_kl", tensors=3, outputs=(0, 0))
register_vmap("token_kl_backward", tensors=5)
