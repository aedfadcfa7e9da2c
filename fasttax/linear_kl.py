"""KL and log-probs from hidden states and head: logits exist for a chunk of tokens at a time, forward and backward.

Memory is chunk x V whatever the number of tokens. Where the tokens' weights are known up front, each chunk's gradient is made
while its logits are there: four GEMMs in all, two forward and two back. Elsewhere a chunk is recomputed in its backward: six.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttax import _checks
from fasttax._library import prefer_huge_pages
from fasttax._vocab_parallel import to_group
from fasttax.kl import (
    NO_GRAD,
    REDUCTIONS,
    Tempering,
    check_mask,
    gradient_in_forward,
    held_gradients,
    hold_gradients,
    reduce,
    reduced_gradient,
    tempering,
    token_kl,
)
from fasttax.kl_stats import OUTPUTS, TokenStats, check_outputs, token_stats

GRAD_MODES = ("auto", "forward", "recompute")
CHUNK_BYTES = 96 << 20  # of float32 logits, both models together: 256 tokens of SmolLM2's vocabulary
MIN_CHUNK = 64  # below it a GEMM no longer runs at its rate


def _head(op: str, prefix: str, hidden: Any, weight: Any, bias: Any) -> Tensor:
    _checks.tensor(op, f"{prefix}hidden", hidden)
    _checks.tensor(op, f"{prefix}weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise _checks.fail(op, f"{prefix}weight", f"shape (V, {hidden.shape[-1] if hidden.dim() else 'H'}), the head of {prefix}hidden", weight)
    _checks.same_device(op, f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise _checks.fail(op, f"{prefix}bias", f"shape ({weight.shape[0]},)", bias)
    return hidden.reshape(-1, hidden.shape[-1])


def _wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What logits are computed in: float32, or float64 where any tensor has it."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 (or float64) logits also from bfloat16 operands and under autocast: rounded logits cost 4-23 % of a JSD gradient (Liger#1432)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _chunk(op: str, token_chunk: Any, vocab_chunk: Any, V: int, models: int) -> int:
    for name, value in (("token_chunk", token_chunk), ("vocab_chunk", vocab_chunk)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise _checks.fail(op, name, "None or an integer >= 1", value)
    return token_chunk or max(MIN_CHUNK, CHUNK_BYTES // (4 * V * models))


def linear_token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, bias: Tensor | None = None, ref_bias: Tensor | None = None,
                    token_weight: Tensor | None = None, return_entropy: bool = False, grad_mode: str = "auto", token_chunk: int | None = None,
                    vocab_chunk: int | None = None, kind: str = "policy_ref", beta: float = 0.5, temperature: float = 1.0,
                    ref_temperature: float | None = None, softcap: float | None = None, ref_softcap: float | None = None, logit_scale: float = 1.0,
                    ref_logit_scale: float = 1.0, mask: Tensor | None = None, reduction: str = "none", inf: str = "propagate",
                    tp_group: Any = None) -> Any:  # fmt: skip
    """`token_kl` of hidden @ weight^T against ref_hidden @ ref_weight^T; the (N, V) logits never exist whole.

    Args:
        hidden: (..., H), ref_hidden: (..., H'). weight: (V, H), ref_weight: (V, H'). bias, ref_bias: (V,). All differentiable.
        token_weight: (...), multiplies the tokens' values (`weight` is the head).
        return_entropy: also return the policy's entropy, as (kl, entropy).
        grad_mode: "forward" makes the gradients in the forward (four GEMMs), which needs reduction "sum" or "mean", or heads
            (and biases) that do not require grad; not with return_entropy, tp_group, float16 tensors, a token_weight that
            requires grad, torch.compile or torch.func. "recompute" computes the logits again in the backward (six GEMMs).
            "auto" takes "forward" where it can.
        token_chunk: tokens at a time; None keeps both logits of a chunk within 96 MiB, or 64 tokens if that is more.
        vocab_chunk: accepted as an upper bound on columns at a time; chunks here are whole rows, so token_chunk alone bounds memory.
        tp_group: ranks hold consecutive rows of the heads (and biases).
        Others as in `token_kl`.
    """
    op = "linear_token_kl"
    options = {"kind": kind, "beta": beta, "temperature": temperature, "ref_temperature": ref_temperature, "softcap": softcap,
               "ref_softcap": ref_softcap, "logit_scale": logit_scale, "ref_logit_scale": ref_logit_scale, "inf": inf}  # fmt: skip
    t = tempering(op, **options)  # type: ignore[arg-type]
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    _checks.choice(op, "grad_mode", grad_mode, GRAD_MODES)
    h, r = _head(op, "", hidden, weight, bias), _head(op, "ref_", ref_hidden, ref_weight, ref_bias)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise _checks.fail(op, "ref_hidden", f"leading shape {tuple(hidden.shape[:-1])} as hidden", ref_hidden)
    if ref_weight.shape[0] != weight.shape[0]:
        raise _checks.fail(op, "ref_weight", f"a vocabulary of {weight.shape[0]} as weight", ref_weight, "policy and reference must share one tokenizer")
    _checks.same_device(op, "ref_hidden", ref_hidden, "hidden", hidden)
    mask = check_mask(op, mask, hidden.shape[:-1], hidden.device)
    flat_mask = None if mask is None else mask.reshape(-1)
    if flat_mask is not None:  # NaN under the mask would reach the heads' gradients through 0 * NaN
        h, r = h.masked_fill(~flat_mask[:, None], 0.0), r.masked_fill(~flat_mask[:, None], 0.0)
    step = _chunk(op, token_chunk, vocab_chunk, weight.shape[0], 2)
    if grad_mode != "recompute":
        obstacle = _obstacle((h, weight, r, ref_weight, bias, ref_bias), token_weight, reduction, return_entropy, tp_group)
        if not obstacle:
            plan = _Plan(t, flat_mask, None if token_weight is None else _flat(op, token_weight, hidden), reduction, step)
            kl: Tensor = _GradientInForward.apply(h, weight, r, ref_weight, bias, ref_bias, plan)
            return kl.reshape(hidden.shape[:-1]) if reduction == "none" else kl
        if grad_mode == "forward" and obstacle != NO_GRAD:
            raise _checks.fail(op, "grad_mode", "'auto' or 'recompute'", "'forward'", f"the forward can't make the gradients: {obstacle}")
    if tp_group is not None:
        h, r = to_group(h, tp_group), to_group(r, tp_group)
    # widened once, so that the chunks' gradients meet in float32
    dtype = _wide_dtype(hidden, weight, ref_hidden, ref_weight, bias, ref_bias)
    weight, ref_weight = weight.to(dtype), ref_weight.to(dtype)

    def part(h: Tensor, r: Tensor, w: Tensor, rw: Tensor, b: Tensor | None, rb: Tensor | None, m: Tensor | None) -> tuple[Tensor, ...]:
        x, y = _logits(h, w, b), _logits(r, rw, rb)
        if not return_entropy:
            return (token_kl(x, y, mask=m, tp_group=tp_group, **options),)  # type: ignore[arg-type]
        stats = token_stats(x, y, outputs=("kl", "entropy"), mask=m, tp_group=tp_group, **options)  # type: ignore[arg-type]
        assert stats.kl is not None
        assert stats.entropy is not None
        return stats.kl, stats.entropy

    pieces = []
    for i in range(0, max(1, h.shape[0]), step):
        m = None if flat_mask is None else flat_mask[i : i + step]
        pieces.append(checkpoint(part, h[i : i + step], r[i : i + step], weight, ref_weight, bias, ref_bias, m, use_reentrant=False))
    outs = [reduce(op, torch.cat(group).reshape(hidden.shape[:-1]), mask, token_weight, reduction) for group in zip(*pieces, strict=True)]
    return tuple(outs) if return_entropy else outs[0]


def _flat(op: str, token_weight: Tensor, hidden: Tensor) -> Tensor:
    return _checks.per_token(op, "token_weight", token_weight, hidden.shape[:-1], hidden.device).reshape(-1)


def _obstacle(tensors: Sequence[Tensor | None], token_weight: Tensor | None, reduction: str, return_entropy: bool, tp_group: Any) -> str:
    """Why the gradients of (hidden, weight, ref_hidden, ref_weight, bias, ref_bias) can't be made in the forward; "" where they can."""
    _, weight, _, ref_weight, bias, ref_bias = tensors
    if reduction == "none" and any(head is not None and head.requires_grad for head in (weight, ref_weight, bias, ref_bias)):
        return "with reduction='none' the tokens' weights are not known, and a head requires grad"
    if return_entropy:
        return "return_entropy gives two results, each with a gradient of its own"
    if tp_group is not None:
        return "under tp_group it takes the other ranks' logits"
    return gradient_in_forward(tensors, token_weight)


@dataclass(frozen=True)
class _Plan:
    t: Tempering
    mask: Tensor | None
    token_weight: Tensor | None
    reduction: str
    step: int


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class _Side:
    """One model's head: logits of a chunk into a buffer, and its gradients, added up chunk by chunk in `dtype`."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], rows: int,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.logits = prefer_huge_pages(self.hidden.new_empty(rows, weight.shape[0]))
        self.d_hidden = torch.zeros_like(self.hidden) if needs[0] else None
        self.d_weight = prefer_huge_pages(torch.empty_like(self.weight)) if needs[1] else None
        self.d_bias = self.hidden.new_zeros(weight.shape[0]) if needs[2] else None
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        if self.d_weight is not None and not hidden.shape[0]:
            self.d_weight.zero_()

    def project(self, hidden: Tensor) -> Tensor:
        out = self.logits[: hidden.shape[0]]
        return torch.mm(hidden, self.weight.T, out=out) if self.bias is None else torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def add(self, begin: int, end: int, d_logits: Tensor) -> None:
        if self.d_hidden is not None:
            torch.mm(d_logits, self.weight, out=self.d_hidden[begin:end])
        if self.d_weight is not None and begin == 0:
            torch.mm(d_logits.T, self.hidden[begin:end], out=self.d_weight)
        elif self.d_weight is not None:
            self.d_weight.addmm_(d_logits.T, self.hidden[begin:end])
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0)

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, bias, in their dtypes."""
        return [None if d is None else d.to(dtype) for d, dtype in zip((self.d_hidden, self.d_weight, self.d_bias), self.dtypes, strict=True)]


class _GradientInForward(torch.autograd.Function):
    """linear_token_kl whose forward leaves nothing to do for the backward but a multiplication by what comes from above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias: Tensor | None, ref_bias: Tensor | None,
                plan: _Plan) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            shared, rows = _same(weight, ref_weight) and _same(bias, ref_bias), min(plan.step, hidden.shape[0])
            dtype = _wide_dtype(hidden, weight, ref_hidden, ref_weight, bias, ref_bias)
            policy = _Side(hidden, weight, bias, (needs[0], needs[1], needs[4]), 2 * rows if shared else rows, dtype)
            ref = _Side(ref_hidden, ref_weight, ref_bias, (needs[2], needs[3], needs[5]), 0 if shared else rows, dtype)
            kl = policy.logits.new_empty(hidden.shape[0])
            ctx.known = plan.reduction != "none"  # what comes from above is one number; else one a token, and only hidden states have gradients
            token_weight = reduced_gradient("linear_token_kl", kl, plan.mask, plan.token_weight, plan.reduction if ctx.known else "sum")
            need_policy, need_ref = any(needs[i] for i in (0, 1, 4)), any(needs[i] for i in (2, 3, 5))
            for begin in range(0, hidden.shape[0], plan.step):
                end = min(begin + plan.step, hidden.shape[0])
                if shared:  # one GEMM reads the head once
                    x, y = policy.project(torch.cat((policy.hidden[begin:end], ref.hidden[begin:end]))).chunk(2)
                else:
                    x, y = policy.project(policy.hidden[begin:end]), ref.project(ref.hidden[begin:end])
                mask = None if plan.mask is None else plan.mask[begin:end]
                kl[begin:end], stats = torch.ops.fasttax.token_kl(x, y, mask, *plan.t.args())
                by_token = token_weight[begin:end].contiguous()
                if need_policy:
                    d_ref = torch.ops.fasttax.token_kl_backward_(by_token, x, y, mask, stats, *plan.t.args(), need_ref)
                    policy.add(begin, end, x)
                else:
                    d_ref = torch.ops.fasttax.token_kl_backward(by_token, x, y, mask, stats, *plan.t.args(), False, True)[1]
                if need_ref:
                    ref.add(begin, end, d_ref)
        (d_hidden, d_weight, d_bias), (d_ref_hidden, d_ref_weight, d_ref_bias) = policy.gradients(), ref.gradients()
        hold_gradients(ctx, [d_hidden, d_weight, d_ref_hidden, d_ref_weight, d_bias, d_ref_bias], token_weight)
        return reduce("linear_token_kl", kl, plan.mask, plan.token_weight, plan.reduction)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return *held_gradients(ctx, "linear_token_kl", factor if ctx.known else factor[:, None]), None


def linear_token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, outputs: Sequence[str] = ("logp",),
                          temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0, mask: Tensor | None = None,
                          token_weight: Tensor | None = None, reduction: str = "none", token_chunk: int | None = None, vocab_chunk: int | None = None,
                          tp_group: Any = None) -> TokenStats:  # fmt: skip
    """`logp`, `entropy` and `lse` of hidden @ weight^T for the tokens `ids`, by chunks of tokens as `linear_token_kl`.

    Args:
        hidden: (..., H). weight: (V, H). bias: (V,). ids: int64 (...), in [0, V).
        Others as in `token_stats` and `linear_token_kl`.
    """
    op = "linear_token_logprobs"
    h = _head(op, "", hidden, weight, bias)
    names = check_outputs(op, outputs, ids, None)
    _checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    if ids.shape != hidden.shape[:-1]:
        raise _checks.fail(op, "ids", f"shape {tuple(hidden.shape[:-1])}, one id a token", ids)
    mask = check_mask(op, mask, hidden.shape[:-1], hidden.device)
    flat_mask, flat_ids = None if mask is None else mask.reshape(-1), ids.reshape(-1)
    if flat_mask is not None:
        h = h.masked_fill(~flat_mask[:, None], 0.0)
    if tp_group is not None:
        h = to_group(h, tp_group)
    weight = weight.to(_wide_dtype(hidden, weight, bias))

    def part(h: Tensor, i: Tensor, w: Tensor, b: Tensor | None, m: Tensor | None) -> tuple[Tensor, ...]:
        stats = token_stats(_logits(h, w, b), None, i, outputs=names, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                            mask=m, tp_group=tp_group)  # fmt: skip
        return tuple(getattr(stats, name) for name in names)

    step = _chunk(op, token_chunk, vocab_chunk, weight.shape[0], 1)
    pieces = [
        checkpoint(part, h[i : i + step], flat_ids[i : i + step], weight, bias, None if flat_mask is None else flat_mask[i : i + step], use_reentrant=False)
        for i in range(0, max(1, h.shape[0]), step)
    ]
    values = {name: torch.cat(group).reshape(hidden.shape[:-1]) for name, group in zip(names, zip(*pieces, strict=True), strict=True)}
    return TokenStats(**{name: reduce(op, values[name], mask, token_weight, reduction) for name in OUTPUTS if name in values})
