"""A call as the ops over logits take it: kinds of divergence, checked options, mask, ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from fasttax import reference
from fasttax._base import checks, library
from fasttax._base.choices import Infinities
from fasttax._base.modes import HALVES
from fasttax.reference.kl import RENYI
from fasttax.reference.numbers import hide
from fasttax.reference.tempering import OPTIONS as OPTIONS
from fasttax.reference.tempering import SIDES as SIDES
from fasttax.reference.tempering import Side as Side
from fasttax.reference.tempering import Tempering as Tempering

INF = get_args(Infinities)


def share(op: str, argument: str, beta: Any) -> float:
    """`beta` as the reference's share of a mixture."""
    return checks.number(op, argument, beta, low=0, high=1)


def order(op: str, argument: str, beta: Any) -> float:
    """`beta` as the order of a Renyi divergence.

    Raises:
        ValueError: it is not positive, or 1.
    """
    expected = "an order > 0 and at least 1e-6 from 1"
    if abs(checks.positive(op, argument, beta) - 1) < 1e-6:
        way_out = "kind='policy_ref' is the limit at order 1"
        raise checks.fail(op, argument, expected, repr(beta), way_out)
    return float(beta)


@dataclass(frozen=True)
class Kind:
    """What the callers of token_kl must know of a divergence beside its formulas.

    Those are in reference/kl.py, csrc/math and triton/kl.py, by the same number.

    Attributes:
        number: what the op calls it.
        row: the row of token_stats that holds it, if any. A divergence with a row is a sum over the
            vocabulary that combines over shards by the chain rule; one without takes a sweep of
            its own, over whole rows.
        mixture: over ranks' shards it is taken as two KLs to the mixture.
        whole_rows: why it can't be had from ranks' shards, "" where it can.
        check_beta: (op, argument, beta) -> beta, or an error.
    """

    number: int
    row: str = ""
    mixture: bool = False
    whole_rows: str = ""
    check_beta: Callable[[str, str, Any], float] = share


KINDS = {
    "policy_ref": Kind(reference.POLICY_REF, row="kl_policy_ref"),
    "ref_policy": Kind(reference.REF_POLICY, row="kl_ref_policy"),
    "jsd": Kind(reference.JSD, mixture=True),
    "renyi": Kind(
        RENYI,
        whole_rows="the logarithm is of a whole row's sum, whose small terms would cancel between "
        "shards; gather the vocabulary, or take kind='policy_ref', the limit at order 1",
        check_beta=order,
    ),
}
BY_NUMBER = {kind.number: kind for kind in KINDS.values()}


def kind_of(t: Tempering) -> Kind:
    """The traits of the divergence that `t` asks for."""
    return BY_NUMBER[t.kind]


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
    """The options of a call to `op`, checked."""
    traits = KINDS[checks.choice(op, "kind", kind, KINDS)]
    if ref_temperature is None:
        ref_temperature = temperature
    return Tempering(
        kind=traits.number,
        beta=traits.check_beta(op, "beta", beta),
        policy=_side(op, "", logit_scale, softcap, temperature),
        ref=_side(op, "ref_", ref_logit_scale, ref_softcap, ref_temperature),
        inf_mask=checks.choice(op, "inf", inf, INF) == "mask",
    )


# what 1 / temperature and the scales may be: float32 has no more, and 0 times -inf is no number
_LEAST, _MOST = 1.5e-45, 3.4e38


def _side(op: str, prefix: str, scale: Any, softcap: Any, temperature: Any) -> Side:
    side = Side(
        scale=checks.positive(op, f"{prefix}logit_scale", scale),
        softcap=0.0 if softcap is None else checks.positive(op, f"{prefix}softcap", softcap),
        inv_temperature=1 / checks.positive(op, f"{prefix}temperature", temperature),
    )
    factors = {
        f"1 / {prefix}temperature": side.inv_temperature,
        f"{prefix}logit_scale": side.scale,
        f"{prefix}logit_scale / {prefix}temperature": side.scale * side.inv_temperature,
    }
    if side.softcap:
        factors[f"{prefix}softcap"] = side.softcap
        factors[f"{prefix}logit_scale / {prefix}softcap"] = side.scale / side.softcap
    for name, factor in factors.items():
        if not _LEAST <= factor <= _MOST:
            expected = f"a number from {_LEAST:g} to {_MOST:g}, which float32 has"
            raise checks.fail(op, name, expected, repr(factor))
    return side


def check_logits(op: str, logits: Any, ref_logits: Any, *, shards: bool) -> tuple[Tensor, Tensor]:
    """Both logits with a contiguous vocabulary; leading strides stay as they are.

    They get one dtype as `shards` of ranks, whose vocabulary may be empty, and where the device's
    kernels do not read each in its own.

    Raises:
        ValueError: the shapes differ, or there is no vocabulary.
    """
    checks.tensor(op, "logits", logits)
    checks.tensor(op, "ref_logits", ref_logits)
    if logits.dim() < 1 or not (logits.shape[-1] or shards):
        raise checks.fail(op, "logits", "shape (..., V) with V >= 1", logits)
    if ref_logits.dim() < 1:
        raise checks.fail(op, "ref_logits", f"shape {tuple(logits.shape)} as logits", ref_logits)
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
    if logits.dtype != ref_logits.dtype and (shards or not _own_dtypes(logits, ref_logits)):
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    return _with_contiguous_rows(logits), _with_contiguous_rows(ref_logits)


def _own_dtypes(logits: Tensor, ref_logits: Tensor) -> bool:
    dtypes = {logits.dtype, ref_logits.dtype}
    wide_and_half = torch.float32 in dtypes and not dtypes.isdisjoint(HALVES)
    return wide_and_half and logits.device.type in library.own_dtypes


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def check_mask(
    op: str,
    mask: Tensor | None,
    shape: torch.Size,
    device: torch.device,
    weight: str = "weight",
) -> Tensor | None:
    """The mask as bool of the tokens' `shape`; the op calls factors of tokens `weight`.

    Raises:
        TypeError, ValueError: as `checks.token_mask`.
    """
    if mask is None:
        return None
    return checks.token_mask(op, mask, shape, device, f"factors are {weight}=")


def check_ids(op: str, ids: Any, like: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """One int64 id a token of `tokens` (..., width), the argument `like`.

    Under the mask 0 on CPUs, where `checks.ids_in_range` looks at them; nothing else reads those.

    Raises:
        ValueError: the shape is another.
    """
    checks.tensor(op, "ids", ids, (torch.int64, torch.int32))
    if ids.shape != tokens.shape[:-1]:
        raise checks.fail(op, "ids", f"shape {tuple(tokens.shape[:-1])}, one id a token", ids)
    checks.same_device(op, "ids", ids, like, tokens)
    return hide(ids.long(), mask) if ids.device.type == "cpu" else ids.long()
