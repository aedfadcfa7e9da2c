"""TRL's divergences between student and teacher on fasttax's row kernels.

Arguments, results and dtypes are TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax._base.choices import KlKind
from fasttax._base.gemm import pieces
from fasttax._base.interrupts import surfaced
from fasttax._base.scalars import number_on
from fasttax.integrations._trl_chunks import (
    Gradients,
    Logits,
    Tokens,
    compute_dtype,
    gathered,
    rows_at_a_time,
)
from fasttax.kl.call import KINDS, Side, Tempering
from fasttax.kl.gradients import held_gradients, hold_gradients
from fasttax.kl.token_kl import token_kl
from fasttax.reference.rows import ENTROPY, STATS

REDUCTIONS = ("batchmean", "sum", "mean")


def kind_of_beta(beta: float) -> KlKind:
    """TRL's beta 0 and 1 are KLs, every other one is the generalised JSD's."""
    ends: dict[float, KlKind] = {0.0: "ref_policy", 1.0: "policy_ref"}
    return ends.get(float(beta), "jsd")


@dataclass(frozen=True)
class OneKL:
    """A KL that is a row of token_stats, whose sweep has the student's entropy too."""

    row: int  # of token_stats
    tempering: Tempering

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(divergence, student's entropy, what the backward wants) of both logits."""
        rows, saved = torch.ops.fasttax.token_stats(x, y, None, None, *self.tempering.sides())
        return rows[self.row], rows[ENTROPY], saved

    def backward(self, d: Tensor, x: Tensor, y: Tensor, saved: Tensor) -> Tensor:
        """The gradient of the student's logits."""
        upstream = x.new_zeros((len(STATS), x.shape[0]), dtype=torch.float32)
        upstream[self.row] = d
        d_logits: Tensor = torch.ops.fasttax.token_stats_backward(
            upstream, x, y, None, None, saved, *self.tempering.sides(), True, False
        )[0]
        return d_logits


@dataclass(frozen=True)
class Mixture:
    """The generalised JSD, with a second sweep for the student's entropy."""

    tempering: Tempering

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `OneKL.forward`."""
        value, saved = torch.ops.fasttax.token_kl(x, y, None, *self.tempering.args())
        own = self.tempering.alone(self.tempering.policy)
        rows = torch.ops.fasttax.token_stats(x, None, None, None, *own)[0]
        return value, rows[ENTROPY], saved

    def backward(self, d: Tensor, x: Tensor, y: Tensor, saved: Tensor) -> Tensor:
        """As `OneKL.backward`, written over x."""
        torch.ops.fasttax.token_kl_backward_(
            d.contiguous(), x, y, None, saved, *self.tempering.args(), False
        )
        return x


def _sweep(beta: float, student: Side, teacher: Side) -> OneKL | Mixture:
    """The sweep over both logits that gives the divergence of TRL's `beta`."""
    kind = KINDS[kind_of_beta(beta)]
    tempering = Tempering(kind.number, beta, student, teacher, inf_mask=False)
    if kind.row:
        return OneKL(STATS.index(kind.row), tempering)
    return Mixture(tempering)


class Divergence(torch.autograd.Function):
    """(divergence, student's entropy) per token.

    Beta 0 is KL(teacher || student), 1 is KL(student || teacher), else the generalised JSD. The
    gradient goes to the student; the entropy has none.

    With a token_weight (N,) the first result is the weighed sum, and its gradients are made while
    the logits are there: four GEMMs, not six.
    """

    @staticmethod
    @surfaced
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float,
        scale: float,
        softcap: float | None,
        teacher_scale: float,
        teacher_softcap: float | None,
        token_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both models' logits chunk by chunk, and with a token_weight their gradients."""
        ctx.set_materialize_grads(False)
        N = hidden.shape[0]
        ctx.sweep = _sweep(
            beta,
            Side(scale, softcap or 0.0, 1 / temperature),
            Side(teacher_scale, teacher_softcap or 0.0, 1 / temperature),
        )
        ctx.dtypes = compute_dtype(hidden), compute_dtype(teacher_hidden)
        ctx.step = rows_at_a_time(hidden, weight.shape[0], models=2)
        ctx.known = token_weight is not None
        student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
        divergence, entropy = hidden.new_empty((2, N), dtype=torch.float32).unbind()
        saved = []
        with gathered(weight, bias), gathered(teacher_weight, teacher_bias):
            heads = _heads(ctx, student, teacher, N)
            gradients = Gradients(_needs(ctx), *student)
            for at in pieces(0, N, ctx.step):
                (x, h), (y, _) = (head.of(at) for head in heads)
                divergence[at], entropy[at], of_rows = ctx.sweep.forward(x, y)
                if token_weight is None:
                    saved.append(of_rows)
                    continue
                d_logits = ctx.sweep.backward(token_weight[at], x, y, of_rows)
                gradients.add(at, d_logits.to(ctx.dtypes[0]), d_logits, h, heads[0].weight)
        ctx.mark_non_differentiable(entropy)
        if token_weight is not None:
            hold_gradients(ctx, gradients.results(), token_weight)
            return torch.dot(divergence, token_weight), entropy
        of_tokens = torch.cat(saved) if saved else divergence.new_empty(0)
        ctx.save_for_backward(*student, *teacher, of_tokens)
        return divergence, entropy

    @staticmethod
    @surfaced
    def backward(ctx: Any, d_divergence: Tensor | None, d_entropy: Any) -> Any:
        """The chunks' logits again, for the tokens that have a gradient; or what is held."""
        if d_divergence is None:
            return (None,) * 13
        if ctx.known:
            return *held_gradients(ctx, "patch", d_divergence), *(None,) * 10
        *tensors, saved = ctx.saved_tensors
        student, teacher = tensors[:3], tensors[3:]
        d_divergence = d_divergence.float().contiguous()
        tokens = Tokens(d_divergence)
        with gathered(*student[1:]), gathered(*teacher[1:]):
            gradients = Gradients(ctx.needs_input_grad[:3], *student)
            heads = _heads(ctx, student, teacher, tokens.count)
            for at in tokens.chunks(ctx.step):
                (x, h), (y, _) = (head.of(at) for head in heads)
                d_logits = ctx.sweep.backward(d_divergence[at], x, y, saved[at])
                gradients.add(at, d_logits.to(ctx.dtypes[0]), d_logits, h, heads[0].weight)
        return *gradients.results(), *(None,) * 10


def _needs(ctx: Any) -> tuple[bool, ...]:
    """Which of the student's tensors get a gradient in the forward."""
    return tuple(ctx.needs_input_grad[:3]) if ctx.known else (False,) * 3


def _heads(ctx: Any, student: Any, teacher: Any, tokens: int) -> tuple[Logits, Logits]:
    """Student's and teacher's logits in float32, from rounded operands, as TRL has them."""
    rows = min(tokens, ctx.step)
    one, other = (
        Logits(*tensors, dtype=dtype, out_dtype=torch.float32, rows=rows)
        for tensors, dtype in zip((student, teacher), ctx.dtypes, strict=True)
    )
    return one, other


def divergence_loss(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor,
    num_items_in_batch: Any,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's _chunked_divergence_loss returns.

    The loss, the sum of the student's entropies, the number of tokens. Its mask and divisor are
    known here, so the gradients are made in the forward; and masked tokens are left out on every
    device.

    Args:
        student: hidden states (B, K, H), the head's weight and bias.
        teacher: the same.
        mask: (B, K), 0 for tokens that do not count.
        num_items_in_batch: the divisor, or None for the number of tokens.
        options: as `Divergence`'s after the tensors.
    """
    valid = mask.reshape(-1) != 0
    count = valid.sum()
    divisor = count.clamp(min=1)
    if num_items_in_batch is not None:
        divisor = number_on(num_items_in_batch, count.device)
    # on a GPU the one host sync: how many count, for GEMMs that leave the others out
    places = valid.nonzero()[:, 0]
    tensors = [*_counted(student, places), *_counted(teacher, places)]
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3])
    # float16 gradients would underflow before the loss scale reaches them
    if trains and compute_dtype(tensors[0]) != torch.float16:
        ones = torch.ones(tensors[0].shape[0], device=count.device, dtype=torch.float32)
        total, entropy = Divergence.apply(*tensors, *options, ones / divisor)
        return total, entropy.sum(), count
    divergence, entropy = Divergence.apply(*tensors, *options)
    return divergence.sum() / divisor, entropy.sum(), count


def _counted(model: tuple[Any, Any, Any], places: Tensor) -> list[Any]:
    """The hidden states of the tokens at the places that count, the head's weight and bias.

    FSDP2's heads are gathered once, the weight in the dtype that multiplies.
    """
    hidden, weight, bias = model
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor().to(hidden.dtype)
        bias = None if bias is None else bias.full_tensor()
    return [hidden.reshape(-1, hidden.shape[-1])[places], weight, bias]


def has_jsd(reduction: str, num_items_in_batch: Any) -> bool:
    """Whether `jsd_loss` has TRL's reduction: one to a number."""
    return num_items_in_batch is not None or reduction in REDUCTIONS


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Any,
) -> Tensor:
    """GKD's and GOLD's generalized_jsd_loss for a reduction to one number.

    Gradients are made in the forward sweep, with the divisor in them.
    """
    mask = None if labels is None else labels != -100
    scale: float | Tensor = 1.0
    if num_items_in_batch is not None:
        scale = number_on(num_items_in_batch, student_logits.device).reciprocal()
    elif reduction == "batchmean" and mask is None:
        scale = 1 / max(student_logits.shape[0], 1)
    by_tokens = num_items_in_batch is None and reduction == "batchmean" and mask is not None
    total = token_kl(
        student_logits,
        teacher_logits,
        kind=kind_of_beta(beta),
        beta=beta,
        temperature=temperature,
        mask=mask,
        reduction="mean" if by_tokens else "sum",
        scale=scale,
    )
    if num_items_in_batch is not None or reduction != "mean":
        return total
    # NaN of no tokens, as TRL's is
    tokens = student_logits[..., 0].numel() if mask is None else mask.sum()
    return total / (tokens * student_logits.shape[-1])
