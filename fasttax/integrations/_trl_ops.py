"""TRL's fused ops on fasttax's row kernels.

Same arguments, same results, same dtypes at every step.

TRL (1.16, trl/kernels) folds tiles of tokens x 32768 columns into running sums. Here a chunk of
tokens has its whole row of logits for as long as one sweep reads it: log-prob, entropy and
divergences come out of that sweep, and the backward's out of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fasttax._base.gemm import gemm, project
from fasttax._base.library import prefer_huge_pages
from fasttax.kl.call import KINDS, Side
from fasttax.kl.gradients import held_gradients, hold_gradients
from fasttax.kl.token_kl import token_kl
from fasttax.kl.token_stats import token_stats

# of one model's logits at a time; on an accelerator TRL's own tile, 4096 x 32768 floats
CHUNK_BYTES = {"cpu": 64 << 20}
ACCELERATOR_BYTES = 512 << 20
MIN_ROWS = 64  # below it a GEMM no longer runs at its rate
LOGP, ENTROPY, LSE, KL_POLICY_REF, KL_REF_POLICY = 0, 2, 3, 4, 5  # rows of fasttax::token_stats


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """TRL's rule: autocast's dtype where it is on, else the hidden states'."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _rows_at_a_time(hidden: Tensor, V: int, models: int = 1) -> int:
    rows = CHUNK_BYTES.get(hidden.device.type, ACCELERATOR_BYTES) // (4 * V * models)
    return max(1, min(hidden.shape[0], max(MIN_ROWS, rows)))


def _chunks(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


class _Gradients:
    """float32 sums of one head's gradients, and their way back to the tensors' dtypes."""

    def __init__(self, needs: Sequence[bool], *tensors: Tensor | None) -> None:
        self.tensors = tensors
        self.sums = [
            torch.zeros(t.shape, device=t.device, dtype=torch.float32)
            if t is not None and need
            else None
            for t, need in zip(tensors, needs, strict=True)
        ]

    def add(
        self, where: Tensor | slice, d_logits: Tensor, wide: Tensor, hidden: Tensor, weight: Tensor
    ) -> None:
        """d_logits in the dtype that multiplies; `wide` before that rounding, for the bias."""
        d_hidden, d_weight, d_bias = self.sums
        if d_hidden is not None:
            part = torch.empty(
                d_logits.shape[0], weight.shape[1], device=weight.device, dtype=torch.float32
            )
            gemm(d_logits, weight, part, add=False)
            d_hidden[where] = part
        if d_weight is not None:
            gemm(d_logits.T, hidden, d_weight, add=True)
        if d_bias is not None:
            d_bias += wide.sum(0, dtype=torch.float32)

    def results(self) -> list[Tensor | None]:
        return [
            None if s is None or t is None else s.to(t.dtype)
            for s, t in zip(self.sums, self.tensors, strict=True)
        ]


def _active(*grads: Tensor | None) -> Tensor | slice:
    """The tokens that have a gradient.

    TRL projects every position on a CPU; those of the prompt come back with 0. On an accelerator it
    has left them out already, and looking would be a sync.
    """
    given = [g for g in grads if g is not None]
    if given[0].device.type != "cpu":
        return slice(None)
    nonzero = torch.stack([g != 0 for g in given]).any(0)
    return slice(None) if bool(nonzero.all()) else nonzero.nonzero().flatten()


def _pick(where: Tensor | slice, chunk: slice) -> Tensor | slice:
    return chunk if isinstance(where, slice) else where[chunk]


def _gathered(*params: Any) -> AbstractContextManager[Any]:
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    gathered: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(*params)
    return gathered


def _log_sum_squares(x: Tensor) -> Tensor:
    """Log sum p^2; relative to the maximum, for a difference of two large lse would lose its
    digits.
    """
    x = x - x.amax(-1, keepdim=True)
    return (2 * x).logsumexp(-1) - 2 * x.logsumexp(-1)


class LogProb(torch.autograd.Function):
    """(logp, entropy, log sum p^2, mean logit, target is the argmax) of hidden @ weight^T.

    Those not in `outputs` are None, and the last three have no gradient. hidden (N, H), weight (V,
    H), bias (V,) or None, targets (N,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        N, V, dtype = hidden.shape[0], weight.shape[0], compute_dtype(hidden)
        options = (
            logit_scale,
            logit_scale,
            softcap or 0.0,
            softcap or 0.0,
            1 / temperature,
            1 / temperature,
        )
        step = _rows_at_a_time(hidden, V)
        buffer = prefer_huge_pages(torch.empty(step, V, device=hidden.device, dtype=dtype))
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        values = torch.empty(5, N, device=hidden.device, dtype=torch.float32)
        top1 = torch.empty(N, device=hidden.device, dtype=torch.bool)
        kept = []
        for at in _chunks(N, step):
            logits = project(hidden[at].to(dtype), w, b, buffer[: at.stop - at.start])
            rows, stats = torch.ops.fasttax.token_stats(logits, None, targets[at], None, *options)
            kept.append(stats)
            values[0, at], values[1, at] = rows[LOGP], rows[ENTROPY]
            if "log_sum_sq_probs" in outputs:
                values[2, at] = _log_sum_squares(Side(*options[::2]).temper(logits.float()))
            if "mean_logits" in outputs:
                values[3, at] = (
                    logits.mean(-1, dtype=torch.float32) * (logit_scale / temperature)
                    if softcap is None
                    else Side(logit_scale, softcap, 1 / temperature).temper(logits.float()).mean(-1)
                )
            if "is_top1" in outputs:
                top1[at] = logits.argmax(-1) == targets[at]
        ctx.save_for_backward(
            hidden, weight, bias, targets, torch.cat(kept) if kept else values.new_empty(0)
        )
        ctx.options, ctx.dtype, ctx.step = options, dtype, step
        results = (
            values[0],
            *(
                values[i] if name in outputs else None
                for i, name in enumerate(("entropy", "log_sum_sq_probs", "mean_logits"), 1)
            ),
            top1 if "is_top1" in outputs else None,
        )
        ctx.mark_non_differentiable(*(r for r in results[2:] if r is not None))
        return results

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *others: Any) -> Any:
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        if d_logp is None and d_entropy is None:
            return (None,) * 8
        with _gathered(weight, bias):
            gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
            where = _active(d_logp, d_entropy)
            n = hidden.shape[0] if isinstance(where, slice) else where.numel()
            buffer = prefer_huge_pages(
                torch.empty(
                    min(n, ctx.step), weight.shape[0], device=hidden.device, dtype=ctx.dtype
                )
            )
            w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            for at in _chunks(n, ctx.step):
                tokens = _pick(where, at)
                h = hidden[tokens].to(ctx.dtype)
                logits = project(h, w, b, buffer[: at.stop - at.start])
                grads = torch.zeros(
                    6, at.stop - at.start, device=hidden.device, dtype=torch.float32
                )
                for row, d in ((LOGP, d_logp), (ENTROPY, d_entropy)):
                    if d is not None:
                        grads[row] = d[tokens]
                d_logits = torch.ops.fasttax.token_stats_backward(
                    grads,
                    logits,
                    None,
                    targets[tokens],
                    None,
                    stats[tokens],
                    *ctx.options,
                    True,
                    False,
                )[0]
                gradients.add(tokens, d_logits, d_logits, h, w)
        return *gradients.results(), None, None, None, None, None


class Divergence(torch.autograd.Function):
    """(divergence, student's entropy) per token.

    Beta 0 is KL(teacher || student), 1 is KL(student || teacher), else the generalised JSD. The
    gradient goes to the student; the entropy has none.

    With a token_weight (N,) the first result is the weighed sum, and its gradients are made while
    the logits are there: four GEMMs, not six.
    """

    @staticmethod
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
        ctx.set_materialize_grads(False)
        N, V = hidden.shape[0], weight.shape[0]
        tempering = (
            scale,
            teacher_scale,
            softcap or 0.0,
            teacher_softcap or 0.0,
            1 / temperature,
            1 / temperature,
        )
        own = (scale, scale, softcap or 0.0, softcap or 0.0, 1 / temperature, 1 / temperature)
        ctx.row = {0.0: KL_REF_POLICY, 1.0: KL_POLICY_REF}.get(float(beta))
        ctx.options = (
            tempering if ctx.row is not None else (KINDS["jsd"].number, beta, *tempering, False)
        )
        ctx.dtypes = compute_dtype(hidden), compute_dtype(teacher_hidden)
        ctx.step = _rows_at_a_time(hidden, V, 2)
        values = torch.empty(2, N, device=hidden.device, dtype=torch.float32)
        kept = []
        with _gathered(weight, bias), _gathered(teacher_weight, teacher_bias):
            heads = _Pair(
                ctx,
                hidden,
                weight,
                bias,
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                min(N, ctx.step),
            )
            gradients = (
                None
                if token_weight is None
                else _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
            )
            for at in _chunks(N, ctx.step):
                x, y, h = heads.logits(at)
                if ctx.row is not None:
                    rows, stats = torch.ops.fasttax.token_stats(x, y, None, None, *ctx.options)
                    values[0, at], values[1, at] = rows[ctx.row], rows[ENTROPY]
                else:
                    values[0, at], stats = torch.ops.fasttax.token_kl(x, y, None, *ctx.options)
                    values[1, at] = torch.ops.fasttax.token_stats(x, None, None, None, *own)[0][
                        ENTROPY
                    ]
                if gradients is None or token_weight is None:
                    kept.append(stats)
                else:
                    d_logits = _divergence_backward(ctx, token_weight[at], x, y, stats)
                    gradients.add(at, d_logits.to(ctx.dtypes[0]), d_logits, h, heads.weight)
        ctx.known = gradients is not None
        divergence, entropy = values.unbind()
        ctx.mark_non_differentiable(entropy)
        if gradients is not None and token_weight is not None:
            hold_gradients(ctx, gradients.results(), token_weight)
            return torch.dot(divergence, token_weight), entropy
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            torch.cat(kept) if kept else values.new_empty(0),
        )
        return divergence, entropy

    @staticmethod
    def backward(ctx: Any, d_divergence: Tensor | None, d_entropy: Any) -> Any:
        if d_divergence is None:
            return (None,) * 13
        if ctx.known:
            return *held_gradients(ctx, "patch", d_divergence), *(None,) * 10
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, stats = (
            ctx.saved_tensors
        )
        d_divergence = d_divergence.float().contiguous()
        with _gathered(weight, bias), _gathered(teacher_weight, teacher_bias):
            gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
            where = _active(d_divergence)
            n = hidden.shape[0] if isinstance(where, slice) else where.numel()
            heads = _Pair(
                ctx,
                hidden,
                weight,
                bias,
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                min(n, ctx.step),
            )
            for at in _chunks(n, ctx.step):
                tokens = _pick(where, at)
                x, y, h = heads.logits(tokens)
                d_logits = _divergence_backward(ctx, d_divergence[tokens], x, y, stats[tokens])
                gradients.add(tokens, d_logits.to(ctx.dtypes[0]), d_logits, h, heads.weight)
        return *gradients.results(), *(None,) * 10


def _divergence_backward(
    ctx: Any, d_divergence: Tensor, x: Tensor, y: Tensor, stats: Tensor
) -> Tensor:
    if ctx.row is None:
        torch.ops.fasttax.token_kl_backward_(
            d_divergence.contiguous(), x, y, None, stats, *ctx.options, False
        )
        return x
    grads = torch.zeros(6, x.shape[0], device=x.device, dtype=torch.float32)
    grads[ctx.row] = d_divergence
    d_logits: Tensor = torch.ops.fasttax.token_stats_backward(
        grads, x, y, None, None, stats, *ctx.options, True, False
    )[0]
    return d_logits


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

    student, teacher: hidden states (B, K, H), the head's weight and bias. options: as
        `Divergence`'s after the tensors.
    """
    valid = mask.reshape(-1) != 0
    count = valid.sum()
    divisor = (
        count.clamp(min=1)
        if num_items_in_batch is None
        else torch.as_tensor(num_items_in_batch, device=count.device)
    )
    tensors: list[Any] = []
    for hidden, weight, bias in (student, teacher):
        if hasattr(weight, "full_tensor"):  # FSDP2: gathered once, and in the dtype that multiplies
            weight, bias = (
                weight.full_tensor().to(hidden.dtype),
                None if bias is None else bias.full_tensor(),
            )  # type: ignore[attr-defined]
        tensors += [hidden.reshape(-1, hidden.shape[-1])[valid], weight, bias]
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3])
    if (
        trains and compute_dtype(tensors[0]) != torch.float16
    ):  # float16 gradients would underflow before the loss scale reaches them
        ones = torch.ones(tensors[0].shape[0], device=count.device, dtype=torch.float32)
        total, entropy = Divergence.apply(*tensors, *options, ones / divisor)
        return total, entropy.sum(), count
    divergence, entropy = Divergence.apply(*tensors, *options)
    return divergence.sum() / divisor, entropy.sum(), count


class _Pair:
    """Student's and teacher's logits of some tokens in float32, from operands rounded to the
    compute dtype, as TRL has them.
    """

    def __init__(
        self,
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        rows: int,
    ) -> None:
        self.hidden, self.teacher_hidden, self.dtypes = hidden, teacher_hidden, ctx.dtypes
        self.weight, self.teacher_weight = (
            weight.to(ctx.dtypes[0]),
            teacher_weight.to(ctx.dtypes[1]),
        )
        self.bias, self.teacher_bias = (
            None if b is None else b.float() for b in (bias, teacher_bias)
        )
        self.buffers = [
            prefer_huge_pages(
                torch.empty(rows, weight.shape[0], device=hidden.device, dtype=torch.float32)
            )
            for _ in range(2)
        ]

    def logits(self, tokens: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        h, t = (
            self.hidden[tokens].to(self.dtypes[0]),
            self.teacher_hidden[tokens].to(self.dtypes[1]),
        )
        x = project(h, self.weight, self.bias, self.buffers[0][: h.shape[0]])
        return (
            x,
            project(t, self.teacher_weight, self.teacher_bias, self.buffers[1][: h.shape[0]]),
            h,
        )


def has_jsd(reduction: str, num_items_in_batch: Any) -> bool:
    """Whether `jsd_loss` has TRL's reduction: one to a number."""
    return num_items_in_batch is not None or reduction in ("batchmean", "sum", "mean")


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

    Gradients are made in the forward sweep.
    """
    kind = {0.0: "ref_policy", 1.0: "policy_ref"}.get(float(beta), "jsd")
    mask = None if labels is None else labels != -100
    total = token_kl(
        student_logits,
        teacher_logits,
        kind=kind,
        beta=beta,
        temperature=temperature,
        mask=mask,
        reduction="sum",
    )
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch, device=total.device)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / (
            mask.sum().clamp(min=1) if mask is not None else max(student_logits.shape[0], 1)
        )
    tokens = mask.sum() if mask is not None else student_logits[..., 0].numel()
    return total / (tokens * student_logits.shape[-1])


def selected_logp(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None
) -> Tensor:
    """selective_log_softmax for one index a token, in the logits' dtype as TRL's."""
    logp = token_stats(
        logits, None, index, outputs=("logp",), temperature=temperature, mask=row_mask
    ).logp
    assert logp is not None
    return logp.to(logits.dtype)
