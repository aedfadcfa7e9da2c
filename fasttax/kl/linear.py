"""KL and log-probs from hidden states and head.

Logits exist for a chunk of tokens at a time, forward and backward.

Memory is chunk x V whatever the number of tokens. Where the tokens' weights are known up front,
each chunk's gradient is made while its logits are there: four GEMMs in all, two forward and two
back. Elsewhere a chunk is recomputed in the backward: six. For log-probs, which have no reference,
three and four.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, overload

import torch
from torch import Tensor

from fasttax._base import checks, inner
from fasttax._base.choices import GradMode, Infinities, KlKind, Reduction
from fasttax._base.interrupts import surfaced
from fasttax._base.modes import autocast_dtype, transforming
from fasttax._base.optional import given
from fasttax.kl.call import (
    KINDS,
    check_ids,
    check_mask,
    tempering,
)
from fasttax.kl.linear_chunks import Asked
from fasttax.kl.linear_routes import LinearCall
from fasttax.kl.linear_sweep import Inputs, Tensors
from fasttax.kl.token_stats import TokenStats, check_outputs
from fasttax.kl.weigh import weighing
from fasttax.reference.numbers import hide_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing itself from Python 3.11

GRAD_MODES = get_args(GradMode)


class LinearOptions(TypedDict, total=False):
    """Those of `linear_token_kl` but for return_entropy, for its overloads."""

    bias: Tensor | None
    ref_bias: Tensor | None
    token_weight: Tensor | None
    grad_mode: GradMode
    token_chunk: int | None
    vocab_chunk: int | None
    kind: KlKind
    beta: float
    temperature: float
    ref_temperature: float | None
    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    mask: Tensor | None
    reduction: Reduction
    scale: float | Tensor
    inf: Infinities
    tp_group: Any


@overload
def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    return_entropy: bool,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@surfaced
def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    return_entropy: bool = False,
    grad_mode: GradMode = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    kind: KlKind = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
    scale: float | Tensor = 1.0,
    inf: Infinities = "propagate",
    tp_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_kl` of hidden @ weight^T against ref_hidden @ ref_weight^T.

    The (N, V) logits never exist whole.

    Args:
        hidden: (..., H), the policy's; differentiable, as all of the first six.
        weight: (V, H), the policy's head.
        ref_hidden: (..., H'), the reference's.
        ref_weight: (V, H'), the reference's head.
        bias: (V,), of the policy's head.
        ref_bias: (V,), of the reference's.
        token_weight: (...), multiplies the tokens' values (`weight` is the head).
        return_entropy: also return the policy's entropy, as (kl, entropy).
        grad_mode: "forward" makes the gradients in the forward (four GEMMs), which needs reduction
            "sum" or "mean", or heads (and biases) that do not require grad; not with
            return_entropy, vocab_chunk < V, tp_group, float16 tensors or autocast, a token_weight
            that requires grad, torch.func, or torch.compile and reduction "none". "recompute"
            computes the logits again in the backward (six GEMMs). "auto" takes "forward" where it
            can.
        token_chunk: tokens at a time; None keeps the logits of a chunk, both models together and
            their gradients where those lie beside them, within 60 MiB (104 MiB of bfloat16 heads on
            a CPU with fast products of them, a 32nd of a GPU's memory), or 128 tokens if that is
            more.
        vocab_chunk: columns at a time: logits of token_chunk x vocab_chunk exist, and their values
            meet by the chain rule as under tp_group. For kind="jsd" and inf="mask" whole rows are
            needed: of as many tokens as keep within token_chunk x vocab_chunk logits, at least one.
            None: whole rows. Not with tp_group.
        kind: as in `token_kl`.
        beta: as in `token_kl`.
        temperature: as in `token_kl`.
        ref_temperature: as in `token_kl`.
        softcap: as in `token_kl`.
        ref_softcap: as in `token_kl`.
        logit_scale: as in `token_kl`.
        ref_logit_scale: as in `token_kl`.
        mask: as in `token_kl`. Masked tokens are left out of the GEMMs on a CPU.
        reduction: as in `token_kl`.
        scale: as in `token_kl`; multiplies the entropy too.
        inf: as in `token_kl`.
        tp_group: ranks hold consecutive rows of the heads (and biases); by default 256 tokens at a
            time (1024 on a GPU).

    Returns:
        float32 (float64 where any tensor is), (...) or 0-d, also under autocast. Gradients have
        their tensors' dtypes: float32 sums over all chunks, rounded once.

        The GEMMs take bfloat16 and float16 tensors as they are; under autocast they take float32
        ones rounded to its dtype, as `torch.nn.functional.linear` does (biases stay as they are).
        Reductions over the vocabulary are float32's. On NVIDIA GPUs the logits and their gradients
        are rounded to the operands' dtype, where both models have one. On CPUs logits stay float32;
        their gradients are rounded to meet bfloat16 where such products are faster (AMX,
        vdpbf16ps).

    Raises:
        ValueError, TypeError: shape, dtype, device or an option does not fit; grad_mode="forward"
            where a gradient would be wrong.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> kl = fasttax.linear_token_kl(
        ...     hidden, head.weight, ref_hidden, ref_head.weight, mask=mask, reduction="mean"
        ... )
        >>> kl.backward()  # to hidden and head.weight
    """
    op = "linear_token_kl"
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
    _check_chunks(op, token_chunk, vocab_chunk, grad_mode, tp_group)
    tokens, ref_tokens = (
        _tokens(op, "", hidden, weight, bias, tp_group),
        _tokens(op, "ref_", ref_hidden, ref_weight, ref_bias, tp_group),
    )
    shape, V, row = hidden.shape[:-1], weight.shape[0], KINDS[kind].row
    if ref_hidden.shape[:-1] != shape:
        raise checks.fail(op, "ref_hidden", f"leading shape {tuple(shape)} as hidden", ref_hidden)
    if ref_weight.shape[0] != V:
        raise checks.fail(
            op,
            "ref_weight",
            f"a vocabulary of {V} as weight",
            ref_weight,
            "policy and reference must share one tokenizer",
        )
    checks.same_device(op, "ref_hidden", ref_hidden, "hidden", hidden)
    mask = check_mask(op, mask, shape, hidden.device, "token_weight")
    w = weighing(op, mask, token_weight, reduction, scale, hidden, "token_weight")
    flat_mask = given(mask, lambda mask: mask.reshape(-1))
    tokens = _hidden_under(flat_mask, tokens, weight, tp_group)
    ref_tokens = _hidden_under(flat_mask, ref_tokens, ref_weight, tp_group)
    tensors = Tensors(tokens, weight, ref_tokens, ref_weight, bias, ref_bias)
    asked = _asked(tensors, token_chunk, vocab_chunk)
    if vocab_chunk is not None and vocab_chunk < V and row and not t.inf_mask:
        asked, outputs = replace(asked, stats=True, pair=True), {"kl": row}
    else:
        asked, outputs = replace(asked, kl=True, stats=return_entropy), {"kl": "kl"}
    if return_entropy:
        outputs["entropy"] = "entropy"
    call = LinearCall(
        op,
        inputs=Inputs(tensors, None, flat_mask, t, asked),
        shape=shape,
        weighing=w,
        grad_mode=grad_mode,
        tp_group=tp_group,
    )
    several = "return_entropy gives two results, each with a gradient of its own"
    values = call.run(outputs, several)
    return (values["kl"], values["entropy"]) if return_entropy else values["kl"]


@surfaced
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: Iterable[str] = ("logp",),
    grad_mode: GradMode = "auto",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "none",
    scale: float | Tensor = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    tp_group: Any = None,
) -> TokenStats:
    """Log-probs, entropy and lse of hidden @ weight^T for the tokens `ids`, by chunks.

    Args:
        hidden: (..., H); differentiable, as weight and bias.
        weight: (V, H), the head.
        ids: int64 (...), in [0, V) where the mask is true.
        bias: (V,), of the head.
        outputs: of "logp", "entropy" and "lse".
        grad_mode: "forward" makes the gradients in the forward (three GEMMs; two with a frozen
            head), which takes a single output and reduction "sum" or "mean" or a head and bias that
            do not require grad; otherwise as in `linear_token_kl`. "recompute": four GEMMs. "auto"
            takes "forward" where it can.
        temperature: as in `token_kl`.
        softcap: as in `token_kl`.
        logit_scale: as in `token_kl`.
        mask: as in `linear_token_kl`.
        token_weight: as in `linear_token_kl`.
        reduction: as in `token_kl`.
        scale: as in `token_kl`; multiplies each of the outputs.
        token_chunk: as in `linear_token_kl`.
        vocab_chunk: as in `linear_token_kl`.
        tp_group: as in `linear_token_kl`; ids are global.

    Returns:
        As `token_stats`.

    Raises:
        ValueError, TypeError, IndexError: as in `token_stats` and `linear_token_kl`.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> stats = fasttax.linear_token_logprobs(hidden, head.weight, ids, mask=mask)
        >>> (-stats.logp.sum()).backward()
    """
    op = "linear_token_logprobs"
    t = tempering(op, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    _check_chunks(op, token_chunk, vocab_chunk, grad_mode, tp_group)
    tokens = _tokens(op, "", hidden, weight, bias, tp_group)
    names = check_outputs(op, outputs, ids, None)
    mask = check_mask(op, mask, hidden.shape[:-1], hidden.device, "token_weight")
    w = weighing(op, mask, token_weight, reduction, scale, hidden, "token_weight")
    ids = check_ids(op, ids, "hidden", hidden, mask).reshape(-1)
    if tp_group is None:
        checks.ids_in_range(op, "ids", ids, weight.shape[0])
    flat_mask = given(mask, lambda mask: mask.reshape(-1))
    tokens = _hidden_under(flat_mask, tokens, weight, tp_group)
    tensors = Tensors(tokens, weight, bias=bias)
    asked = replace(_asked(tensors, token_chunk, vocab_chunk), stats=True)
    call = LinearCall(
        op,
        inputs=Inputs(tensors, ids, flat_mask, t, asked),
        shape=hidden.shape[:-1],
        weighing=w,
        grad_mode=grad_mode,
        tp_group=tp_group,
    )
    several = "several outputs each have a gradient of their own"
    return TokenStats(**call.run({name: name for name in names}, several))


def _tokens(op: str, prefix: str, hidden: Any, weight: Any, bias: Any, tp_group: Any) -> Tensor:
    """One model's hidden states (N, H), checked with its head, which may be empty on a rank."""
    checks.tensor(op, f"{prefix}hidden", hidden)
    checks.tensor(op, f"{prefix}weight", weight)
    H = hidden.shape[-1] if hidden.dim() else "H"
    if H == 0:
        raise checks.fail(op, f"{prefix}hidden", "shape (..., H) with H >= 1", hidden)
    empty = weight.dim() == 2 and weight.shape[0] < 1 and tp_group is None
    if weight.dim() != 2 or empty or weight.shape[1] != H:
        expected = f"shape (V, {H}), the head of {prefix}hidden"
        raise checks.fail(op, f"{prefix}weight", expected, weight)
    if inner.lies_in_others(weight):
        raise checks.fail(
            op,
            f"{prefix}weight",
            "a head whose values lie in the tensor itself",
            f"one of class {type(weight).__name__}",
            "take token_kl or token_stats of the logits that its layer gives, or dequantize it",
            TypeError,
        )
    checks.same_device(op, f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            raise checks.fail(op, f"{prefix}bias", f"shape ({weight.shape[0]},)", bias)
        checks.tensor(op, f"{prefix}bias", bias)
        checks.same_device(op, f"{prefix}bias", bias, f"{prefix}hidden", hidden)
    tokens: Tensor = hidden.reshape(-1, H)
    return tokens


def _hidden_under(mask: Tensor | None, tokens: Tensor, weight: Tensor, tp_group: Any) -> Tensor:
    """The hidden states, 0 under the mask where NaN would reach the head's gradient by 0 * NaN.

    A frozen head has none, and on a CPU masked tokens are left out, but of ranks' chunks.
    """
    left_out = tokens.device.type == "cpu" and tp_group is None
    trains = weight.requires_grad or transforming()
    return hide_rows(tokens, mask if trains and not left_out else None)


def _asked(tensors: Tensors, token_chunk: int | None, vocab_chunk: int | None) -> Asked:
    """Of no rows yet; GEMMs in autocast's dtype where it is on, which leaves float64 alone."""
    gemm_dtype = None
    if tensors.dtype == torch.float32:
        gemm_dtype = autocast_dtype(tensors.hidden.device)
    return Asked(token_chunk=token_chunk, vocab_chunk=vocab_chunk, gemm_dtype=gemm_dtype)


def _check_chunks(
    op: str, token_chunk: Any, vocab_chunk: Any, grad_mode: Any, tp_group: Any
) -> None:
    for name, value in (("token_chunk", token_chunk), ("vocab_chunk", vocab_chunk)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise checks.fail(op, name, "None or an integer >= 1", value)
    if vocab_chunk is not None and tp_group is not None:
        raise checks.fail(
            op,
            "vocab_chunk",
            "None under tp_group",
            vocab_chunk,
            "a rank's shard is its chunk of the vocabulary; token_chunk bounds memory",
        )
    checks.choice(op, "grad_mode", grad_mode, GRAD_MODES)
