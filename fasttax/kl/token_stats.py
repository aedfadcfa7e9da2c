"""What a trainer asks about sampled tokens: log-probs, entropy, KLs and their estimates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks
from fasttax._base.choices import Infinities, KlKind, Reduction
from fasttax._base.interrupts import surfaced
from fasttax._base.library import define, lib, no_double_backward
from fasttax._base.modes import transforming
from fasttax.kl.call import (
    KINDS,
    SIDES,
    Kind,
    Tempering,
    check_ids,
    check_logits,
    check_mask,
    kind_of,
    tempering,
)
from fasttax.kl.gradients import only_needed
from fasttax.kl.kl_estimate import ESTIMATORS
from fasttax.kl.token_kl import kl_of_rows
from fasttax.kl.transforms import register_vmap, run
from fasttax.kl.vocab_parallel import KL_ROWS, combine_shards
from fasttax.kl.weigh import Weighing, weighing
from fasttax.reference.numbers import empty_gradient, wide_dtype
from fasttax.reference.rows import LOGP, SAVED_STATS, STATS

OUTPUTS = (*STATS, "kl", *ESTIMATORS)
NEED_IDS = ("logp", "ref_logp", *ESTIMATORS)
NEED_REF = ("ref_logp", *KL_ROWS, "kl", *ESTIMATORS)


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics, each (...) in float32 (or reduced); those not asked for are None.

    Example:
        >>> stats = fasttax.token_stats(logits, outputs=("entropy", "lse"))
        >>> stats.entropy.shape, stats.logp
        (torch.Size([2, 5]), None)
    """

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


def check_outputs(op: str, outputs: Iterable[str], ids: Any, ref: Any) -> tuple[str, ...]:
    """The outputs by name, each with what it needs.

    Raises:
        ValueError: there is no such output, or ids or the reference are missing.
    """
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in names:
        checks.choice(op, "outputs", name, OUTPUTS)
        if name in NEED_IDS and ids is None:
            raise checks.fail(op, "ids", f"token ids, which output {name!r} needs", "None")
        if name in NEED_REF and ref is None:
            raise checks.fail(
                op, "ref_logits", f"the reference's logits, which output {name!r} needs", "None"
            )
    return names


@surfaced
def token_stats(
    logits: Tensor,
    ref_logits: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    outputs: Iterable[str] = ("logp",),
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
    tp_group: Any = None,
) -> TokenStats:
    """Any of OUTPUTS for every token, differentiable.

    They are logp, ref_logp, entropy, lse, kl_policy_ref, kl_ref_policy, kl, k1, k2, k3.

    Args:
        logits: (..., V), the policy's.
        ref_logits: (..., V), the reference's; may be None where no output needs it.
        ids: int64 (...), the sampled tokens (under tp_group: global ids).
        outputs: names as above. `kl` is the one that `kind` names; `lse` is of the tempered logits.
        kind: as in `token_kl`, of `kl`.
        beta: as in `token_kl`, of `kl`.
        temperature: as in `token_kl`.
        ref_temperature: as in `token_kl`.
        softcap: as in `token_kl`.
        ref_softcap: as in `token_kl`.
        logit_scale: as in `token_kl`.
        ref_logit_scale: as in `token_kl`.
        mask: as in `token_kl`: a masked token is not read, its outputs and gradients are 0.
        weight: as in `token_kl`.
        reduction: as in `token_kl`.
        scale: as in `token_kl`; multiplies each of the outputs, log-probs too.
        inf: as in `token_kl`, of the KLs.
        tp_group: as in `token_kl`.

    Returns:
        float32 (float64 for float64 logits), each (...) or 0-d; None for those not asked for.

    Raises:
        ValueError, TypeError, IndexError: an output without what it needs, ids out of range, or as
            in `token_kl`.

    Example:
        >>> stats = fasttax.token_stats(logits, ref_logits, ids, outputs=("logp", "entropy", "kl"))
        >>> loss = (0.1 * stats.kl - stats.logp)[mask].mean()
        >>> loss.backward()  # one sweep for all of them
    """
    op = "token_stats"
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
    outputs = check_outputs(op, outputs, ids, ref_logits)
    logits, checked = check_logits(
        op,
        logits,
        logits if ref_logits is None else ref_logits,
        shards=tp_group is not None,
    )
    if ref_logits is not None:
        ref_logits = checked
    mask = check_mask(op, mask, logits.shape[:-1], logits.device)
    if ids is not None:
        ids = check_ids(op, ids, "logits", logits, mask)
        if tp_group is None:
            checks.ids_in_range(op, "ids", ids, logits.shape[-1])
    w = weighing(op, mask, weight, reduction, scale, logits)
    checks.for_backward(op, logits=logits, mask=mask, weight=w.weight)
    rows = stats_of_rows(op, logits, ref_logits, ids, mask, t, outputs, tp_group)
    results = dict(zip(outputs, rows.weighed(outputs, w), strict=True))
    inputs = [t for t in (ref_logits, w.weight) if t is not None]
    if "ref_logp" in results and not transforming() and not any(t.requires_grad for t in inputs):
        # no graph, which would keep both models' logits as long as somebody keeps this
        results["ref_logp"] = results["ref_logp"].detach()
    return TokenStats(**results)


@dataclass(frozen=True)
class StatsRows:
    """Rows of the tokens, in the tensors (R, ...) that hold them, and where each value is."""

    tensors: list[Tensor]
    places: dict[str, int]

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> StatsRows:
        """Each in a tensor of its own."""
        tensors = [row[None] for row in rows.values()]
        return cls(tensors, {name: i for i, name in enumerate(rows)})

    def also(self, rows: StatsRows) -> StatsRows:
        """With the rows of another."""
        before = sum(len(t) for t in self.tensors)
        places = {name: before + place for name, place in rows.places.items()}
        return StatsRows([*self.tensors, *rows.tensors], {**self.places, **places})

    def weighed(self, outputs: Sequence[str], w: Weighing) -> list[Tensor]:
        """The outputs, estimates by the log-probs."""
        if not outputs:
            return []
        codes = [ESTIMATORS.get(name, self.places.get(name, 0)) for name in outputs]
        pair: tuple[int, ...] = ()
        if any(name in ESTIMATORS for name in outputs):
            pair = (self.places["logp"], self.places["ref_logp"])
        return w.of_rows(self.tensors, codes, pair)


def stats_of_rows(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    outputs: Sequence[str],
    tp_group: Any,
) -> StatsRows:
    """What the outputs of every token are made of, of checked tensors, for `op`."""
    plan = _plan(outputs, t)
    rows = StatsRows([], {})
    if plan.wanted and tp_group is not None:
        over_ranks = combine_shards(op, logits, ref_logits, ids, mask, t, plan.wanted, tp_group)
        rows = StatsRows.of(over_ranks)
    elif plan.wanted:
        rows = _rows(op, logits, ref_logits, ids, mask, t, plan.wanted)
    named = {name: rows.places[row] for name, row in plan.rows.items()}
    rows = replace(rows, places={**rows.places, **named})
    kls = {}
    for name, number in plan.kls.items():
        assert ref_logits is not None
        which = replace(t, kind=number)
        checks.for_backward(op, logits=logits, ref_logits=ref_logits)
        kls[name] = kl_of_rows(op, logits, ref_logits, mask, which, tp_group)
    return rows.also(StatsRows.of(kls))


class _Plan(NamedTuple):
    """Where each output comes from."""

    kls: dict[str, int]  # from a sweep of token_kl's, of this kind
    rows: dict[str, str]  # from a row of token_stats
    estimates: list[str]  # of its log-probs

    @property
    def wanted(self) -> set[str]:
        """The rows that token_stats is to give."""
        return {*self.rows.values(), *(("logp", "ref_logp") if self.estimates else ())}


def _plan(outputs: Sequence[str], t: Tempering) -> _Plan:
    """A KL is a row of the sweep that gives the others, but where that has none like it.

    That is where the kind has no row, or inf="mask" restricts the rows; a KL that is asked for
    alone has token_kl's cheaper sweep to itself.
    """
    by_output: dict[str, Kind] = {kind.row: kind for kind in KINDS.values() if kind.row}
    by_output["kl"] = kind_of(t)
    plan = _Plan({}, {}, [name for name in outputs if name in ESTIMATORS])
    for name in outputs:
        kind = by_output.get(name)
        if kind is None:
            if name not in ESTIMATORS:
                plan.rows[name] = name
        elif not kind.row or t.inf_mask or set(outputs) == {name}:
            plan.kls[name] = kind.number
        else:
            plan.rows[name] = kind.row
    return plan


def _rows(
    op: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    t: Tempering,
    wanted: set[str],
) -> StatsRows:
    """The `wanted` rows: by one sweep over both models' where a KL is among them, else one each."""
    places = {name: i for i, name in enumerate(STATS)}
    if ids is not None:
        ids = ids.contiguous()
    if wanted & KL_ROWS:
        checks.for_backward(op, logits=logits, ref_logits=ref_logits, ids=ids)
        return StatsRows([run("token_stats", t.sides(), logits, ref_logits, ids, mask)], places)
    rows = StatsRows([], {})
    if wanted - {"ref_logp"}:
        needed = ids if "logp" in wanted else None
        checks.for_backward(op, logits=logits, ids=needed)
        alone = run("token_stats", t.alone(t.policy), logits, None, needed, mask)
        rows = StatsRows([alone], places)
    if "ref_logp" in wanted:
        assert ref_logits is not None
        alone = run("token_stats", t.alone(t.ref), ref_logits, None, ids, mask)
        rows = rows.also(StatsRows([alone], {"ref_logp": LOGP}))
    return rows


# schemas, shapes, autograd

_INPUTS = "Tensor logits, Tensor? ref_logits, Tensor? ids, Tensor? mask"


def _fake(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    *options: float,
) -> tuple[Tensor, Tensor]:
    tokens, dtype = logits.shape[:-1], wide_dtype(logits)
    values = logits.new_empty((len(STATS), *tokens), dtype=dtype)
    return values, logits.new_empty((*tokens, SAVED_STATS), dtype=dtype)


def _backward_fake(
    grads: Tensor, logits: Tensor, ref_logits: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    need_policy, need_ref = others[-2:]
    d_ref = empty_gradient(logits if ref_logits is None else ref_logits, need_ref)
    return empty_gradient(logits, need_policy), d_ref


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # zeros for `saved`, which has no gradient
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])


@surfaced
def _backward(ctx: Any, d_values: Tensor | None, d_saved: None) -> Any:
    if d_values is None:
        return (None,) * (4 + len(ctx.options))
    checks.no_tangent("token_stats", "the gradient of its results", d_values)
    needs = ctx.needs_input_grad[:2]
    gradients = torch.ops.fasttax.token_stats_backward(
        d_values.contiguous(), *ctx.saved_tensors, *ctx.options, *needs
    )
    return *only_needed(gradients, needs), None, None, *[None] * len(ctx.options)


define(f"token_stats({_INPUTS}, {SIDES}) -> (Tensor, Tensor)", reference.token_stats, _fake)
define(
    f"token_stats_backward(Tensor grads, {_INPUTS}, Tensor saved, {SIDES}, bool need_policy, "
    "bool need_ref) -> (Tensor, Tensor)",
    reference.token_stats_backward,
    _backward_fake,
)
torch.library.register_autograd("fasttax::token_stats", _backward, setup_context=_setup, lib=lib)
no_double_backward("token_stats_backward", "token_stats")
register_vmap("token_stats", tensors=4, outputs=(1, 0))
register_vmap("token_stats_backward", tensors=6, first=1)
