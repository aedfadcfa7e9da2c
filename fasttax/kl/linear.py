"""KL and log-probs from hidden states and head.

Logits exist for a chunk of tokens at a time, forward and backward.

Memory is chunk x V whatever the number of tokens. Where the tokens' weights are known up front,
each chunk's gradient is made while its logits are there: four GEMMs in all, two forward and two
back. Elsewhere a chunk is recomputed in the backward: six. For log-probs, which have no reference,
three and four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttax import reference
from fasttax._base import checks
from fasttax._base.gemm import pieces
from fasttax.kl.linear_ops import linear_token_rows, linear_token_total
from fasttax.kl.linear_sweep import KL, ROWS, Sweep, Work, wide_dtype
from fasttax.kl.token_kl import (
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
from fasttax.kl.token_stats import TokenStats, check_outputs, token_stats
from fasttax.kl.vocab_parallel import merge_parts, to_group

GRAD_MODES = ("auto", "forward", "recompute")
# at a time under tp_group, whose shards of the vocabulary are small
CPU_TOKENS, GPU_TOKENS = (
    256,
    1024,
)


def _head(op: str, prefix: str, hidden: Any, weight: Any, bias: Any) -> Tensor:
    checks.tensor(op, f"{prefix}hidden", hidden)
    checks.tensor(op, f"{prefix}weight", weight)
    if (
        hidden.dim() < 1
        or weight.dim() != 2
        or weight.shape[0] < 1
        or weight.shape[1] != hidden.shape[-1]
    ):
        raise checks.fail(
            op,
            f"{prefix}weight",
            f"shape (V, {hidden.shape[-1] if hidden.dim() else 'H'}), the head of {prefix}hidden",
            weight,
        )
    checks.same_device(op, f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            raise checks.fail(op, f"{prefix}bias", f"shape ({weight.shape[0]},)", bias)
        checks.tensor(op, f"{prefix}bias", bias)
        checks.same_device(op, f"{prefix}bias", bias, f"{prefix}hidden", hidden)
    return hidden.reshape(-1, hidden.shape[-1])


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
    grad_mode: str = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    kind: str = "policy_ref",
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "none",
    inf: str = "propagate",
    tp_group: Any = None,
) -> Any:
    """`token_kl` of hidden @ weight^T against ref_hidden @ ref_weight^T.

    The (N, V) logits never exist whole.

    Args:
        hidden: (..., H), ref_hidden: (..., H'). weight: (V, H), ref_weight: (V, H'). bias,
            ref_bias: (V,). All differentiable.
        token_weight: (...), multiplies the tokens' values (`weight` is the head).
        return_entropy: also return the policy's entropy, as (kl, entropy).
        grad_mode: "forward" makes the gradients in the forward (four GEMMs), which needs reduction
            "sum" or "mean", or heads (and biases) that do not require grad; not with
            return_entropy, vocab_chunk < V, tp_group, float16 tensors, a token_weight that requires
            grad, torch.func, or torch.compile and reduction "none". "recompute" computes the logits
            again in the backward (six GEMMs). "auto" takes "forward" where it can.
        token_chunk: tokens at a time; None keeps the logits of a chunk, both models together,
            within 60 MiB (1 GiB on a GPU), or 128 tokens if that is more.
        vocab_chunk: columns at a time: logits of token_chunk x vocab_chunk exist, and their values
            meet by the chain rule as under tp_group. For kind="jsd" and inf="mask" whole rows are
            needed: of as many tokens as keep within token_chunk x vocab_chunk logits, at least one.
                None: whole rows. Not with tp_group.
        tp_group: ranks hold consecutive rows of the heads (and biases); by default 256 tokens at a
            time (1024 on a GPU).
        Others as in `token_kl`.

    Returns:
        float32 (float64 where any tensor is), (...) or 0-d: logits and gradients are summed in
        float32 for bfloat16 and float16 tensors too, also under autocast. On a CPU such heads are
        widened once, V x H floats each; on NVIDIA GPUs GEMMs take them as they are. Masked tokens
        are left out of the GEMMs on a CPU.

    Raises:
        ValueError, TypeError: shape, dtype, device or an option does not fit; grad_mode="forward"
            where a gradient would be wrong.
        RuntimeError: a second derivative is asked for.
    """
    op = "linear_token_kl"
    options = {
        "kind": kind,
        "beta": beta,
        "temperature": temperature,
        "ref_temperature": ref_temperature,
        "softcap": softcap,
        "ref_softcap": ref_softcap,
        "logit_scale": logit_scale,
        "ref_logit_scale": ref_logit_scale,
        "inf": inf,
    }
    t = tempering(op, **options)  # type: ignore[arg-type]
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    _check_chunks(op, token_chunk, vocab_chunk, grad_mode, tp_group)
    h, r = _head(op, "", hidden, weight, bias), _head(op, "ref_", ref_hidden, ref_weight, ref_bias)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise checks.fail(
            op, "ref_hidden", f"leading shape {tuple(hidden.shape[:-1])} as hidden", ref_hidden
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise checks.fail(
            op,
            "ref_weight",
            f"a vocabulary of {weight.shape[0]} as weight",
            ref_weight,
            "policy and reference must share one tokenizer",
        )
    checks.same_device(op, "ref_hidden", ref_hidden, "hidden", hidden)
    mask = check_mask(op, mask, hidden.shape[:-1], hidden.device)
    flat_mask = None if mask is None else mask.reshape(-1)
    if flat_mask is not None:  # NaN under the mask would reach the heads' gradients through 0 * NaN
        h, r = h.masked_fill(~flat_mask[:, None], 0.0), r.masked_fill(~flat_mask[:, None], 0.0)
    tiled = (
        vocab_chunk is not None
        and vocab_chunk < weight.shape[0]
        and t.kind != reference.JSD
        and not t.inf_mask
    )
    tensors = (h, weight, r, ref_weight, bias, ref_bias)
    call = _Call(
        op,
        grad_mode,
        tensors,
        None,
        flat_mask,
        t,
        Work(not tiled, return_entropy or tiled, tiled, token_chunk, vocab_chunk),
    )
    if call.in_forward(
        token_weight,
        reduction,
        tp_group,
        "return_entropy gives two results, each with a gradient of its own"
        if return_entropy
        else "",
    ):
        return call.made_in_forward(KL, token_weight, reduction, hidden.shape[:-1])
    names = ("kl", "entropy") if return_entropy else ("kl",)
    if tp_group is not None:
        values = _over_ranks(call, names, options, tp_group)
    elif tiled:
        values = call.merged({f"kl_{kind}", *names[1:]})
        values["kl"] = values[f"kl_{kind}"]
    else:
        rows = linear_token_rows(tensors, None, flat_mask, t, call.work)
        values = {name: rows[ROWS.index(name), 0] for name in names}
    outs = tuple(
        reduce(op, values[name].reshape(hidden.shape[:-1]), mask, token_weight, reduction)
        for name in names
    )
    return outs if return_entropy else outs[0]


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: Sequence[str] = ("logp",),
    grad_mode: str = "auto",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "none",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    tp_group: Any = None,
) -> TokenStats:
    """`logp`, `entropy` and `lse` of hidden @ weight^T for the tokens `ids`, by chunks as
    `linear_token_kl`.

    Args:
        hidden: (..., H). weight: (V, H). bias: (V,). ids: int64 (...), in [0, V) where the mask is
            true.
        grad_mode: "forward" makes the gradients in the forward (three GEMMs; two with a frozen
            head), which takes a single output and reduction "sum" or "mean" or a head and bias that
            do not require grad; otherwise as in `linear_token_kl`. "recompute": four GEMMs. "auto"
            takes "forward" where it can.
        Others, result and errors as in `token_stats` and `linear_token_kl`.
    """
    op = "linear_token_logprobs"
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    t = tempering(op, **options)  # type: ignore[arg-type]
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    _check_chunks(op, token_chunk, vocab_chunk, grad_mode, tp_group)
    h, V = _head(op, "", hidden, weight, bias), weight.shape[0]
    names = check_outputs(op, outputs, ids, None)
    checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    if ids.shape != hidden.shape[:-1]:
        raise checks.fail(op, "ids", f"shape {tuple(hidden.shape[:-1])}, one id a token", ids)
    checks.same_device(op, "ids", ids, "hidden", hidden)
    mask = check_mask(op, mask, hidden.shape[:-1], hidden.device)
    ids = (ids if mask is None else ids.masked_fill(~mask, 0)).long().reshape(-1)
    if tp_group is None:
        checks.ids_in_range(op, "ids", ids, V)
    flat_mask = None if mask is None else mask.reshape(-1)
    if flat_mask is not None:
        h = h.masked_fill(~flat_mask[:, None], 0.0)
    call = _Call(
        op,
        grad_mode,
        (h, weight, None, None, bias, None),
        ids,
        flat_mask,
        t,
        Work(False, True, False, token_chunk, vocab_chunk),
    )
    several = "" if len(set(names)) == 1 else "several outputs each have a gradient of their own"
    if call.in_forward(token_weight, reduction, tp_group, several):
        return TokenStats(
            **{
                names[0]: call.made_in_forward(
                    ROWS.index(names[0]), token_weight, reduction, hidden.shape[:-1]
                )
            }
        )
    if tp_group is not None:
        values = _over_ranks(call, names, options, tp_group)
    elif call.work.columns(V) < V:
        values = call.merged(set(names))
    else:
        rows = linear_token_rows(call.tensors, ids, flat_mask, t, call.work)
        values = {name: rows[ROWS.index(name), 0] for name in names}
    return TokenStats(
        **{
            name: reduce(op, values[name].reshape(hidden.shape[:-1]), mask, token_weight, reduction)
            for name in names
        }
    )


@dataclass(frozen=True)
class _Call:
    """A checked call: tensors are (hidden, weight, ref_hidden, ref_weight, bias, ref_bias), tokens
    flattened.
    """

    op: str
    grad_mode: str
    tensors: tuple[Tensor | None, ...]
    ids: Tensor | None
    mask: Tensor | None
    t: Tempering
    work: Work

    def in_forward(
        self, token_weight: Tensor | None, reduction: str, tp_group: Any, several: str
    ) -> bool:
        """Whether the gradients are to be made in the forward.

        An error where grad_mode asks for what would be wrong.
        """
        if self.grad_mode == "recompute":
            return False
        obstacle = self._obstacle(token_weight, reduction, tp_group, several)
        if self.grad_mode == "forward" and obstacle not in ("", NO_GRAD):
            raise checks.fail(
                self.op,
                "grad_mode",
                "'auto' or 'recompute'",
                "'forward'",
                f"the forward can't make the gradients: {obstacle}",
            )
        return not obstacle

    def _obstacle(
        self, token_weight: Tensor | None, reduction: str, tp_group: Any, several: str
    ) -> str:
        _, weight, _, ref_weight, *biases = self.tensors
        assert weight is not None
        if reduction == "none" and any(
            head is not None and head.requires_grad for head in (weight, ref_weight, *biases)
        ):
            return (
                "with reduction='none' the tokens' weights are not known, and a head requires grad"
            )
        if several:
            return several
        if tp_group is not None:
            return "under tp_group it takes the other ranks' logits"
        if self.work.columns(weight.shape[0]) < weight.shape[0]:
            return "with vocab_chunk < V a gradient takes the other chunks' logits"
        return gradient_in_forward(self.tensors, token_weight, stateless=reduction != "none")

    def made_in_forward(
        self, row: int, token_weight: Tensor | None, reduction: str, shape: torch.Size
    ) -> Tensor:
        if token_weight is not None:
            token_weight = checks.per_token(
                self.op, "token_weight", token_weight, shape, self.tensors[0].device
            ).reshape(-1)  # type: ignore[union-attr]
        if torch.compiler.is_compiling():
            hidden = self.tensors[0]
            assert hidden is not None
            values = hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(*self.tensors))
            by_token = reduced_gradient(self.op, values, self.mask, token_weight, reduction)
            return linear_token_total(
                by_token, self.tensors, self.ids, self.mask, self.t, self.work, row
            )
        value: Tensor = _GradientInForward.apply(*self.tensors, self, row, token_weight, reduction)
        return value.reshape(shape) if reduction == "none" else value

    def merged(self, wanted: set[str]) -> dict[str, Tensor]:
        """The `wanted` of every token from tiles of the vocabulary."""
        weight = self.tensors[1]
        assert weight is not None
        rows = linear_token_rows(self.tensors, self.ids, self.mask, self.t, self.work)
        whole = {
            name: rows[i]
            for i, name in enumerate(ROWS)
            if name in wanted or name == "lse" or (name == "ref_lse" and self.work.pair)
        }
        if self.ids is not None:
            whole["mine"] = torch.stack(
                [
                    (self.ids >= c.start) & (self.ids < c.stop)
                    for c in pieces(0, weight.shape[0], self.work.columns(weight.shape[0]))
                ]
            )
        return merge_parts(whole, wanted, self.mask)


class _GradientInForward(torch.autograd.Function):
    """One value a token, or their sum or mean, whose forward leaves nothing to do for the backward
    but a multiplication by what comes from above: one number, or with reduction "none" one a token,
    for the hidden states alone.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        call, row, token_weight, reduction = args[6:]
        ctx.op, ctx.known = call.op, reduction != "none"
        with torch.autocast(args[0].device.type, enabled=False):
            sweep = Sweep(
                [t if t is None else t.detach() for t in args[:6]],
                call.ids,
                call.mask,
                call.t,
                call.work,
                ctx.needs_input_grad[:6],
            )
            values = sweep.rows.new_zeros(args[0].shape[0])
            by_token = reduced_gradient(
                call.op, values, call.mask, token_weight, reduction if ctx.known else "sum"
            )
            d_rows = values.new_zeros((len(ROWS), 1, values.shape[0]))
            d_rows[row, 0] = by_token
            sweep.run(d_rows)
            hold_gradients(ctx, sweep.gradients(), by_token)
            return reduce(call.op, sweep.results()[0][row, 0], call.mask, token_weight, reduction)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return *held_gradients(ctx, ctx.op, factor if ctx.known else factor[:, None]), *[None] * 4


def _over_ranks(
    call: _Call, names: tuple[str, ...], options: dict[str, Any], group: Any
) -> dict[str, Tensor]:
    """Chunks of the tokens under activation checkpointing.

    a chunk's ops talk to the other ranks, so autograd runs them as they are.
    """
    h, weight, r, ref_weight, bias, ref_bias = call.tensors
    assert h is not None
    assert weight is not None
    h, dtype = to_group(h, group), wide_dtype(*call.tensors)
    weight = weight.to(dtype)  # widened once, so that the chunks' gradients meet in float32
    if r is not None and ref_weight is not None:
        r, ref_weight = to_group(r, group), ref_weight.to(dtype)

    def logits(hidden: Tensor, head: Tensor, offset: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(
                hidden.to(dtype), head, None if offset is None else offset.to(dtype)
            )

    def part(
        h: Tensor,
        r: Tensor | None,
        ids: Tensor | None,
        mask: Tensor | None,
        w: Tensor,
        rw: Tensor | None,
        b: Tensor | None,
        rb: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, y = logits(h, w, b), None if r is None or rw is None else logits(r, rw, rb)
        if y is not None and names == ("kl",):
            return (token_kl(x, y, mask=mask, tp_group=group, **options),)
        stats = token_stats(x, y, ids, outputs=names, mask=mask, tp_group=group, **options)
        return tuple(getattr(stats, name) for name in names)

    # the same on every rank, whatever its shard: a collective more on one of them would hang the
    # others
    step = call.work.token_chunk or (CPU_TOKENS if h.device.type == "cpu" else GPU_TOKENS)
    outs = []
    for i in pieces(0, h.shape[0], step) if h.shape[0] else [slice(0, 0)]:
        by_token = [None if t is None else t[i] for t in (h, r, call.ids, call.mask)]
        outs.append(
            checkpoint(part, *by_token, weight, ref_weight, bias, ref_bias, use_reentrant=False)
        )
    return {
        name: torch.cat(group) for name, group in zip(names, zip(*outs, strict=True), strict=True)
    }
