"""KL and log-probs from hidden states and head: logits exist for a chunk of tokens at a time, forward and backward.

Each chunk is recomputed in its backward (six GEMMs in all), so memory is chunk x V whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttax import _checks, reference
from fasttax._vocab_parallel import to_group
from fasttax.kl import check_mask, reduce, tempering, token_kl
from fasttax.kl_stats import OUTPUTS, TokenStats, check_outputs, token_stats

GRAD_MODES = ("auto", "recompute")
CHUNK_BYTES = 256 << 20  # of float32 logits, both models together


def _head(op: str, prefix: str, hidden: Any, weight: Any, bias: Any) -> Tensor:
    _checks.tensor(op, f"{prefix}hidden", hidden)
    _checks.tensor(op, f"{prefix}weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise _checks.fail(op, f"{prefix}weight", f"shape (V, {hidden.shape[-1] if hidden.dim() else 'H'}), the head of {prefix}hidden", weight)
    _checks.same_device(op, f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise _checks.fail(op, f"{prefix}bias", f"shape ({weight.shape[0]},)", bias)
    return hidden.reshape(-1, hidden.shape[-1])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 (or float64) logits also from bfloat16 operands: rounded logits cost 4-23 % of a JSD gradient (Liger#1432)."""
    return torch.nn.functional.linear(reference.wide(hidden), reference.wide(weight), None if bias is None else reference.wide(bias))


def _chunk(op: str, token_chunk: Any, vocab_chunk: Any, V: int, models: int) -> int:
    for name, value in (("token_chunk", token_chunk), ("vocab_chunk", vocab_chunk)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise _checks.fail(op, name, "None or an integer >= 1", value)
    return token_chunk or max(16, CHUNK_BYTES // (4 * V * models))


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
        grad_mode: "auto" or "recompute": logits are computed again in the backward.
        token_chunk: tokens at a time; None keeps both logits of a chunk within 256 MiB. vocab_chunk: accepted as an upper bound
            on columns at a time; chunks here are whole rows, which bounds memory by token_chunk alone.
        tp_group: ranks hold consecutive rows of the heads (and biases).
        Others as in `token_kl`.
    """
    op = "linear_token_kl"
    options = {"kind": kind, "beta": beta, "temperature": temperature, "ref_temperature": ref_temperature, "softcap": softcap,
               "ref_softcap": ref_softcap, "logit_scale": logit_scale, "ref_logit_scale": ref_logit_scale, "inf": inf}  # fmt: skip
    tempering(op, **options)  # type: ignore[arg-type]
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
    if tp_group is not None:
        h, r = to_group(h, tp_group), to_group(r, tp_group)
    # widened once, so that the chunks' gradients meet in float32
    weight, ref_weight = reference.wide(weight), reference.wide(ref_weight)

    def part(h: Tensor, r: Tensor, w: Tensor, rw: Tensor, b: Tensor | None, rb: Tensor | None, m: Tensor | None) -> tuple[Tensor, ...]:
        x, y = _logits(h, w, b), _logits(r, rw, rb)
        if not return_entropy:
            return (token_kl(x, y, mask=m, tp_group=tp_group, **options),)  # type: ignore[arg-type]
        stats = token_stats(x, y, outputs=("kl", "entropy"), mask=m, tp_group=tp_group, **options)  # type: ignore[arg-type]
        assert stats.kl is not None
        assert stats.entropy is not None
        return stats.kl, stats.entropy

    step = _chunk(op, token_chunk, vocab_chunk, weight.shape[0], 2)
    pieces = []
    for i in range(0, max(1, h.shape[0]), step):
        m = None if flat_mask is None else flat_mask[i : i + step]
        pieces.append(checkpoint(part, h[i : i + step], r[i : i + step], weight, ref_weight, bias, ref_bias, m, use_reentrant=False))
    outs = [reduce(op, torch.cat(group).reshape(hidden.shape[:-1]), mask, token_weight, reduction) for group in zip(*pieces, strict=True)]
    return tuple(outs) if return_entropy else outs[0]


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
    weight = reference.wide(weight)

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
