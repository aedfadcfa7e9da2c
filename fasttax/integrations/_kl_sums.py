"""Sums of the KL over a batch's tokens, from what the policy's own forward computed.

The reference is a model, the policy without its adapter, or a file of top-k log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from fasttax._base import checks
from fasttax.integrations._models import Head, backbone, frozen, head, hidden_states
from fasttax.integrations.reference import TopKReference
from fasttax.kl.linear import linear_token_kl
from fasttax.kl.token_stats import TokenStats, token_stats
from fasttax.kl.topk import topk_kl

ROWS = 256  # tokens whose logits exist at a time, for a top-k reference and for the log
LOGGED = ("kl_policy_ref", "kl_ref_policy", "entropy")  # outputs of token_stats


@dataclass(frozen=True)
class Forward:
    """A forward of the policy: what its backbone was given and gave, and which tokens count."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any  # the backbone's
    logits: Tensor | None  # where the model made them, (B, T, V)
    mask: Tensor  # (B, T), by the position that predicts
    batch: Tensor | None  # the same object whenever the trainer goes over this batch again

    def hidden(self) -> Tensor:
        """Hidden states (N, H) of the tokens that count."""
        return hidden_states(self.output)[self.mask]


class ModelReference:
    """A frozen model, or the policy with its adapter switched off.

    Args:
        model: a causal language model.
        autocast: the context of the policy's own forward, without which equal weights would differ.
        adapter: the PEFT model around `model`, whose adapter is off while the reference runs.
        keep: hold a batch's hidden states as long as the batch lives, for it will come again.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        adapter: Any = None,
        keep: bool = False,
    ) -> None:
        self.model, self.autocast, self.adapter = model, autocast, adapter
        self.kept: Any = WeakIdKeyDictionary() if keep else None

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else " without its adapter"
        return f"reference {type(self.model).__name__}{adapter}"

    def sums(
        self, forward: Forward, own: Head, options: Mapping[str, Any], log: bool
    ) -> dict[str, Tensor]:
        """The KL under its kind's name; both KLs and the entropy where they cost nothing, or `log`.

        Args:
            forward: the policy's.
            own: the policy's head.
            options: of `token_kl`: kind, beta, temperature.
            log: both KLs and the entropy are wanted, at the price of two more GEMMs.
        """
        logits = forward.logits
        if logits is not None and logits.shape[:-1] == forward.mask.shape:
            return self._of_logits(forward, logits, options)
        hidden = forward.hidden()
        ref_hidden, ref = self._kept_rows(forward)
        kl = linear_token_kl(
            hidden,
            own.weight,
            ref_hidden,
            ref.weight,
            bias=own.bias,
            ref_bias=ref.bias,
            softcap=own.softcap,
            ref_softcap=ref.softcap,
            logit_scale=own.logit_scale,
            ref_logit_scale=ref.logit_scale,
            reduction="sum",
            **options,
        )
        seen = _looked_at(hidden, own, ref_hidden, ref, options) if log else {}
        return {**seen, options["kind"]: kl}

    def _of_logits(
        self, forward: Forward, logits: Tensor, options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        stats = token_stats(
            logits[forward.mask],
            self._logits(forward),
            outputs=("kl", *LOGGED),
            reduction="sum",
            **options,
        )
        assert stats.kl is not None
        return {**_by_metric(stats), options["kind"]: stats.kl}

    def _logits(self, forward: Forward) -> Tensor:
        """The reference's, of the tokens that count, scaled and capped as its forward does it."""
        hidden, own = self._rows(forward)
        with torch.no_grad(), self.autocast():
            logits = nn.functional.linear(hidden, own.weight, own.bias) * own.logit_scale
        if own.softcap is None:
            return logits
        return own.softcap * torch.tanh(logits / own.softcap)

    def _kept_rows(self, forward: Forward) -> tuple[Tensor, Head]:
        """As `_rows`, with the hidden states of the batch's first time where they are kept."""
        if self.kept is None or forward.batch is None:
            return self._rows(forward)
        if forward.batch not in self.kept:
            self.kept[forward.batch] = self._rows(forward)[0]
        return self.kept[forward.batch], self._head()

    def _rows(self, forward: Forward) -> tuple[Tensor, Head]:
        """Hidden states (N, H) of the tokens that count, and the head."""
        with frozen(self.model), self._without_adapter(), self.autocast():
            output = backbone(self.model)(*forward.args, **forward.kwargs)
            return hidden_states(output)[forward.mask], self._head()

    def _head(self) -> Head:
        """Detached: the reference gets no gradient."""
        own = head(self.model)
        bias = None if own.bias is None else own.bias.detach()
        return replace(own, weight=own.weight.detach(), bias=bias)

    def _without_adapter(self) -> AbstractContextManager[Any]:
        if self.adapter is None:
            return nullcontext()
        if "ref" in self.adapter.peft_config:  # a loaded adapter's first state, which TRL keeps so
            from trl.trainer.utils import use_adapter

            with_first: AbstractContextManager[Any] = use_adapter(self.adapter, adapter_name="ref")
            return with_first
        without: AbstractContextManager[Any] = self.adapter.disable_adapter()
        return without


class CachedReference:
    """A `TopKReference`: no model in memory, and no metric but the KL that it was asked for."""

    def __init__(self, cache: TopKReference) -> None:
        self.cache = cache

    def __repr__(self) -> str:
        return repr(self.cache)

    def sums(
        self, forward: Forward, own: Head, options: Mapping[str, Any], log: bool
    ) -> dict[str, Tensor]:
        """As `ModelReference.sums`; `log` adds nothing."""
        given = forward.args[0] if forward.args else None
        ids = forward.kwargs.get("input_ids", given)
        if ids is None:
            raise checks.fail(
                "FullKL",
                "ref_model",
                "a model: the trainer passes embeddings, not ids",
                "a cached reference",
            )
        logp, top = self.cache.rows(ids, forward.kwargs.get("attention_mask"))
        mask = forward.mask[:, :-1]
        rows = (forward.hidden(), logp[mask], top[mask])

        def part(
            hidden: Tensor, logp: Tensor, top: Tensor, weight: Tensor, bias: Tensor | None
        ) -> Tensor:
            logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
            return topk_kl(
                logits,
                logp,
                top,
                softcap=own.softcap,
                logit_scale=own.logit_scale,
                reduction="sum",
                **options,
            )

        # a chunk's logits are made again in the backward
        pieces = [
            checkpoint(part, *chunk, own.weight, own.bias, use_reentrant=False)
            for chunk in zip(*(x.split(ROWS) for x in rows), strict=True)
            if chunk[0].shape[0]
        ]
        if not pieces:  # no token counts: a zero with a graph
            return {options["kind"]: rows[0].sum() * 0}
        return {options["kind"]: torch.stack(pieces).sum()}


def _by_metric(stats: TokenStats) -> dict[str, Tensor]:
    """Both KLs and the entropy under the names of their metrics."""
    assert stats.kl_policy_ref is not None
    assert stats.kl_ref_policy is not None
    assert stats.entropy is not None
    return {
        "policy_ref": stats.kl_policy_ref,
        "ref_policy": stats.kl_ref_policy,
        "entropy": stats.entropy,
    }


@torch.no_grad()
def _looked_at(
    hidden: Tensor, own: Head, ref_hidden: Tensor, ref: Head, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Both KLs and the entropy from hidden states, for the log alone: two GEMMs, no graph."""
    sums = {
        name: torch.zeros((), device=hidden.device)
        for name in ("policy_ref", "ref_policy", "entropy")
    }
    for h, ref_h in zip(hidden.split(ROWS), ref_hidden.split(ROWS), strict=True):
        stats = token_stats(
            nn.functional.linear(h.to(own.weight.dtype), own.weight, own.bias).float(),
            nn.functional.linear(ref_h.to(ref.weight.dtype), ref.weight, ref.bias).float(),
            outputs=LOGGED,
            temperature=options["temperature"],
            softcap=own.softcap,
            ref_softcap=ref.softcap,
            logit_scale=own.logit_scale,
            ref_logit_scale=ref.logit_scale,
            reduction="sum",
        )
        for name, value in _by_metric(stats).items():
            sums[name] += value
    return sums
