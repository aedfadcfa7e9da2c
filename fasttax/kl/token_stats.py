"""What a trainer asks about sampled tokens.

log-probs, entropy, both KLs, and Monte-Carlo estimates of the KL.

k1, k2, k3 as in Schulman 2020, "Approximating KL divergence": with r = ref_logp - logp of a token
sampled from the policy, k1 = -r, k2 = r^2/2, k3 = e^r - 1 - r; k1 and k3 are unbiased for KL(policy
|| ref).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.library import define, lib, no_double_backward
from fasttax.kl.token_kl import Tempering, check_logits, check_mask, reduce, tempering, token_kl
from fasttax.kl.transforms import differentiable, register_vmap
from fasttax.kl.vocab_parallel import merge_shards

# of what the op gives: csrc/math/kl.h, TokenStat
ROWS = (
    "logp",
    "ref_logp",
    "entropy",
    "lse",
    "kl_policy_ref",
    "kl_ref_policy",
)
OUTPUTS = (
    "logp",
    "ref_logp",
    "entropy",
    "lse",
    "kl_policy_ref",
    "kl_ref_policy",
    "kl",
    "k1",
    "k2",
    "k3",
)
NEED_IDS = ("logp", "ref_logp", "k1", "k2", "k3")
NEED_REF = ("ref_logp", "kl_policy_ref", "kl_ref_policy", "kl", "k1", "k2", "k3")
ESTIMATORS = ("k1", "k2", "k3")
GRADS = ("estimator", "reverse_kl")


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics, each (...) in float32 (or reduced); those not asked for are None."""

    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    kl_policy_ref: Tensor | None = None
    kl_ref_policy: Tensor | None = None
    kl: Tensor | None = None
    k1: Tensor | None = None
    k2: Tensor | None = None
    k3: Tensor | None = None


def check_outputs(op: str, outputs: Sequence[str], ids: Any, ref: Any) -> tuple[str, ...]:
    if isinstance(outputs, str):
        outputs = (outputs,)
    for name in outputs:
        checks.choice(op, "outputs", name, OUTPUTS)
        if name in NEED_IDS and ids is None:
            raise checks.fail(op, "ids", f"token ids, which output {name!r} needs", "None")
        if name in NEED_REF and ref is None:
            raise checks.fail(
                op, "ref_logits", f"the reference's logits, which output {name!r} needs", "None"
            )
    return tuple(outputs)


def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    outputs: Sequence[str] = ("logp",),
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
    tp_group: Any = None,
) -> TokenStats:
    """Any of `logp, ref_logp, entropy, lse, kl_policy_ref, kl_ref_policy, kl, k1, k2, k3` for every
    token, differentiable.

    Args:
        logits, ref_logits: (..., V); ref_logits may be None where no output needs it.
        ids: int64 (...), the sampled tokens (under tp_group: global ids).
        outputs: names as above. `kl` is the one that `kind` names; `lse` is of the tempered logits.
        Others as in `token_kl`. A masked token is not read: its outputs and gradients are 0.

    Raises:
        ValueError, TypeError, IndexError: an output without what it needs, ids out of range, or as
            in `token_kl`.
    """
    op = "token_stats"
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
    outputs = check_outputs(op, outputs, ids, ref_logits)
    logits, checked = check_logits(op, logits, logits if ref_logits is None else ref_logits)
    ref_logits = None if ref_logits is None else checked
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    if ids is not None:
        ids = check_ids(op, ids, logits, mask, whole=tp_group is None)
    values = _values(logits, ref_logits, ids, outputs, mask, t, options, tp_group)
    return TokenStats(
        **{name: reduce(op, values[name], mask, weight, reduction) for name in outputs}
    )


def _values(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    outputs: Sequence[str],
    mask: Tensor | None,
    t: Tempering,
    options: dict[str, Any],
    tp_group: Any,
) -> dict[str, Tensor]:
    """Per token.

    One sweep over both rows where a KL is asked for beside something else; one over each row where
    none is; and a sweep of their own for the KLs that differ from it: jsd, and those of rows that
    inf="mask" restricts.
    """
    values: dict[str, Tensor] = {}
    kls = {
        name: which
        for name, which in (
            ("kl_policy_ref", "policy_ref"),
            ("kl_ref_policy", "ref_policy"),
            ("kl", options["kind"]),
        )
        if name in outputs
    }
    apart = {
        name
        for name, which in kls.items()
        if which == "jsd" or t.inf_mask or (set(outputs) == {name} and tp_group is None)
    }
    for name in apart:
        assert ref_logits is not None
        values[name] = token_kl(
            logits, ref_logits, mask=mask, tp_group=tp_group, **{**options, "kind": kls[name]}
        )
    estimates = [name for name in outputs if name in ESTIMATORS]
    needs_logp, needs_ref_logp = (
        bool(estimates or "logp" in outputs),
        bool(estimates or "ref_logp" in outputs),
    )
    policy, ref = (
        (t.scale, t.softcap, t.inv_temperature),
        (t.ref_scale, t.ref_softcap, t.ref_inv_temperature),
    )
    if tp_group is not None:
        wanted = {
            f"kl_{kls[name]}" if name in kls else name
            for name in outputs
            if name not in ESTIMATORS and name not in apart
        }
        wanted |= {"logp", "ref_logp"} if estimates else set()
        rows = (
            merge_shards("token_stats", logits, ref_logits, ids, mask, t, wanted, tp_group)
            if wanted
            else {}
        )
    elif kls.keys() - apart:
        rows = dict(zip(ROWS, _op(logits, ref_logits, ids, mask, policy, ref), strict=True))
    else:
        rows = {}
        if needs_logp or {"entropy", "lse"} & set(outputs):
            rows.update(
                zip(
                    ROWS,
                    _op(logits, None, ids if needs_logp else None, mask, policy, policy),
                    strict=True,
                )
            )
        if needs_ref_logp:
            assert ref_logits is not None
            rows["ref_logp"] = _op(ref_logits, None, ids, mask, ref, ref)[0]
    rows["kl"] = rows.get(f"kl_{options['kind']}", logits)
    values.update((name, rows[name]) for name in outputs if name in rows and name not in apart)
    values.update(
        (name, kl_estimate(rows["logp"], rows["ref_logp"], kind=name)) for name in estimates
    )
    return values


def check_ids(op: str, ids: Tensor, logits: Tensor, mask: Tensor | None, whole: bool) -> Tensor:
    checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    if ids.shape != logits.shape[:-1]:
        raise checks.fail(op, "ids", f"shape {tuple(logits.shape[:-1])}, one id a token", ids)
    checks.same_device(op, "ids", ids, "logits", logits)
    ids = ids.long() if mask is None else ids.long().masked_fill(~mask, 0)
    if whole:  # the whole vocabulary's size is known here
        checks.ids_in_range(op, "ids", ids, logits.shape[-1])
    return ids


def _exp(x: Tensor, clip: float) -> Tensor:
    """e^x up to `clip`, its tangent beyond.

    Large log-ratios give large finite values and gradients, never inf or 0 * inf.
    """
    low = x.clamp(max=clip).exp()
    return low * (1 + (x - clip).clamp(min=0))


def kl_estimate(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    kind: str = "k3",
    old_logp: Tensor | None = None,
    grad: str = "estimator",
    clip: float = 20.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Monte-Carlo estimate of KL(policy || ref) from the sampled tokens' log-probs.

    Args:
        logp, ref_logp: (...), of the tokens that were sampled.
        kind: "k1" = -r, "k2" = r^2/2, "k3" = e^r - 1 - r, with r = ref_logp - logp.
        old_logp: log-probs under the policy that sampled; multiplies by the importance ratio
            exp(logp - old_logp), differentiated.
        grad: "estimator" differentiates what is returned (k3's gradient is that of KL(ref ||
            policy), k1's is 0 on average); "reverse_kl" keeps the value and takes the gradient of
            KL(policy || ref): ratio * (logp - ref_logp) * d logp.
        clip: log-ratio above which exp goes on along its tangent.
        mask, weight, reduction: as in `token_kl`; what is under the mask may be NaN.
    """
    op = "kl_estimate"
    for name, value in (
        ("logp", logp),
        ("ref_logp", ref_logp),
        *((("old_logp", old_logp),) if old_logp is not None else ()),
    ):
        checks.tensor(op, name, value)
        if value.shape != logp.shape:
            raise checks.fail(op, name, f"shape {tuple(logp.shape)} as logp", value)
        checks.same_device(op, name, value, "logp", logp)
    checks.choice(op, "kind", kind, ESTIMATORS)
    checks.choice(op, "grad", grad, GRADS)
    clip = checks.number(op, "clip", clip, low=0, high=40, open_low=True)
    mask = check_mask(op, mask, logp.shape, logp.device)
    logp, ref_logp = reference.wide(logp), reference.wide(ref_logp)
    old = None if old_logp is None else reference.wide(old_logp)
    if mask is not None:
        logp, ref_logp = logp.masked_fill(~mask, 0.0), ref_logp.masked_fill(~mask, 0.0)
        old = None if old is None else old.masked_fill(~mask, 0.0)
    r = ref_logp - logp
    if kind == "k1":
        value = -r
    elif kind == "k2":
        value = r * r / 2
    else:
        small = r.abs() < 0.5
        value = torch.where(
            small, torch.expm1(torch.where(small, r, 0.0)) - r, _exp(r, clip) - 1 - r
        )
    ratio = torch.ones_like(logp) if old is None else _exp(logp - old, clip)
    value = value * ratio
    if grad == "reverse_kl":
        through = (ratio * -r).detach() * logp
        value = value.detach() + (through - through.detach())
    return reduce(op, value, mask, weight, reduction)


# --- schemas, shapes, autograd -----------------------------------------------------------------------------------------

_INPUTS = "Tensor logits, Tensor? ref_logits, Tensor? ids, Tensor? mask"
_OPTIONS = "float scale, float ref_scale, float softcap, float ref_softcap, float inv_temperature, float ref_inv_temperature"
STATS = 11  # what a native forward keeps of a token for its backward: csrc/math/kl.h, StatsRow


def _op(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    policy: tuple[float, float, float],
    ref: tuple[float, float, float],
) -> tuple[Tensor, ...]:
    """The six rows; `policy` and `ref` are (scale, softcap, 1 / temperature)."""
    options = tuple(value for pair in zip(policy, ref, strict=True) for value in pair)
    ids = None if ids is None else ids.contiguous()
    if torch._C._are_functorch_transforms_active():
        return differentiable("token_stats", options, logits, ref_logits, ids, mask)[0].unbind(0)
    rows: tuple[Tensor, ...] = torch.ops.fasttax.token_stats(
        logits, ref_logits, ids, mask, *options
    )[0].unbind(0)
    return rows


def _fake(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((len(ROWS), *logits.shape[:-1]), dtype=dtype), logits.new_empty(
        (*logits.shape[:-1], STATS), dtype=dtype
    )


def _backward_fake(
    grads: Tensor, logits: Tensor, ref_logits: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    need_policy, need_ref = others[-2:]
    return (
        logits.new_empty(logits.shape if need_policy else (0,)),
        logits.new_empty(logits.shape if need_ref else (0,)),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_values: Tensor, d_stats: Tensor) -> Any:
    needs = ctx.needs_input_grad[:2]
    d = torch.ops.fasttax.token_stats_backward(
        d_values.contiguous(), *ctx.saved_tensors, *ctx.options, *needs
    )
    return (
        d[0] if needs[0] else None,
        d[1] if needs[1] else None,
        None,
        None,
        *[None] * len(ctx.options),
    )


define(f"token_stats({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", reference.token_stats, _fake)
define(
    f"token_stats_backward(Tensor grads, {_INPUTS}, Tensor stats, {_OPTIONS}, bool need_policy, "
    "bool need_ref) -> (Tensor, Tensor)",
    reference.token_stats_backward,
    _backward_fake,
)
torch.library.register_autograd("fasttax::token_stats", _backward, setup_context=_setup, lib=lib)
no_double_backward("token_stats_backward", "token_stats")
register_vmap("token_stats", tensors=4, outputs=(1, 0))
register_vmap("token_stats_backward", tensors=6, first=1)
