"""Sums of the KL over a batch's tokens, from what the policy's own forward computed.

The reference is a model, or the policy without its adapter (a file of top-k log-probs is in
_kl_cached.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fasttax._base import checks
from fasttax._base.choices import Reduction
from fasttax.integrations._heads import (
    ROWS,
    Head,
    Shortcut,
    Way,
    hidden_states,
    logits_of,
    replayed,
    watched,
)
from fasttax.integrations._kl_forward import Forward, in_front
from fasttax.integrations._models import frozen
from fasttax.kl.linear import linear_token_kl, linear_token_logprobs
from fasttax.kl.token_stats import TokenStats, token_stats

CHUNK = 256  # tokens whose logits exist at a time, for a top-k reference and for the log
LOGGED = ("kl_policy_ref", "kl_ref_policy", "entropy")  # outputs of token_stats
Autocast = Callable[[], AbstractContextManager[Any]]


class Asker(NamedTuple):
    """Who asks for a reference: what its errors name."""

    op: str = "FullKL"
    argument: str = "ref_model"


FULL_KL = Asker()


@dataclass(frozen=True)
class Rows:
    """One model's distributions of the N tokens that count: logits, or states under a head."""

    given: Tensor | None = None  # (N, V)
    hidden: Tensor | None = None  # (N, H)
    head: Head | None = None

    def logits(self) -> Tensor:
        """(N, V), under the autocast that is on."""
        if self.given is not None:
            return self.given
        assert self.head is not None
        assert self.hidden is not None
        return self.head.logits(self.hidden)

    @property
    def vocabulary(self) -> int:
        """V."""
        if self.given is not None:
            return self.given.shape[-1]
        assert self.head is not None
        return self.head.weight.shape[0]


class Policy:
    """The model that is trained.

    Args:
        model: a language model.
        autocast: the context of the trainer's forward.
    """

    def __init__(self, model: Any, autocast: Autocast) -> None:
        self.model, self.autocast = model, autocast
        self.shortcut = Shortcut(model)

    def rows(self, forward: Forward, recheck: bool) -> Rows:
        """Of a forward: its logits, or where it made none, those of its head or of another one.

        Args:
            forward: the policy's.
            recheck: prove the head again, for weights that are trained may have come apart from it.
        """
        if forward.logits is not None:
            return Rows(given=forward.counted(forward.logits))
        if self.shortcut.possible() and (recheck or not self.shortcut.known(forward.names)):
            self._prove(forward)
        way = self.shortcut.way(forward.names)
        if way is not None and way.module in forward.states:
            states = hidden_states(forward.states[way.module])
            return Rows(hidden=forward.counted(states), head=self.shortcut.head(way))
        with self.autocast():
            logits = logits_of(forward.again())
        if logits is None:
            raise _no_logits("trainer.model", self.model)
        return Rows(given=forward.counted(logits))

    def logp(self, rows: Rows, ids: Tensor, temperature: float, reduction: Reduction) -> Tensor:
        """Log-probs of the tokens `ids` (N,): of each, or their sum."""
        if rows.hidden is None or rows.head is None:
            stats = token_stats(
                rows.logits(),
                ids=ids,
                outputs=("logp",),
                temperature=temperature,
                reduction=reduction,
            )
        else:
            with self.autocast():  # the head is multiplied as the model's own is
                stats = linear_token_logprobs(
                    rows.hidden,
                    rows.head.weight,
                    ids,
                    bias=rows.head.bias,
                    softcap=rows.head.softcap,
                    logit_scale=rows.head.logit_scale,
                    temperature=temperature,
                    reduction=reduction,
                )
        assert stats.logp is not None
        return stats.logp

    def _prove(self, forward: Forward) -> None:
        """Has the model make logits of the states that it has computed already."""
        last = _last_columns(forward.mask)
        if last == 0:
            return
        inputs = {**forward.inputs, "logits_to_keep": last}
        found = None
        for module in self.shortcut.modules:
            if module not in forward.states or found is not None:
                continue
            output = forward.states[module]
            with frozen(self.model), self.autocast():
                logits = logits_of(replayed(self.model, module, output, inputs))
                if logits is not None:
                    found = _proven(self.shortcut, module, output, logits, forward.mask)
        self.shortcut.learn(forward.names, found)


class ModelReference:
    """A frozen model, or the policy with its adapter switched off.

    Args:
        model: a language model.
        autocast: the context of the policy's own forward, without which equal weights would differ.
        adapter: the PEFT model around `model`, whose adapter is off while the reference runs.
        keep: hold a batch's hidden states as long as the batch lives, for it will come again.
    """

    def __init__(
        self, model: nn.Module, autocast: Autocast, *, adapter: Any = None, keep: bool = False
    ) -> None:
        self.model, self.autocast, self.adapter = model, autocast, adapter
        self.shortcut = Shortcut(model)
        self.kept: Any = WeakIdKeyDictionary() if keep else None

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else " without its adapter"
        return f"reference {type(self.model).__name__}{adapter}"

    def sums(
        self,
        forward: Forward,
        policy: Rows,
        options: Mapping[str, Any],
        scale: Tensor | float,
        log: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the KL times `scale`, and sums without a graph, by metric.

        Those are the KL under its kind's name; both KLs and the entropy where they cost nothing, or
        `log`.

        Args:
            forward: the policy's.
            policy: its rows.
            options: of `token_kl`: kind, beta, temperature.
            scale: 0-d, not 0; the gradients that the forward makes have it in them.
            log: both KLs and the entropy are wanted, at the price of two more GEMMs.
        """
        return self._values(forward, policy, options, scale, log, "sum")

    def by_token(
        self, forward: Forward, policy: Rows, options: Mapping[str, Any], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL (N,) of each token, and the sums of `sums`."""
        kl, values = self._values(forward, policy, options, 1.0, log, "none")
        return kl, {n: v.sum() for n, v in values.items()}

    def _values(
        self,
        forward: Forward,
        policy: Rows,
        options: Mapping[str, Any],
        scale: Tensor | float,
        log: bool,
        reduction: Reduction,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ref = self._kept_rows(forward)
        if ref.vocabulary != policy.vocabulary:
            raise vocabularies_differ(policy.vocabulary, ref.vocabulary)
        if policy.hidden is None or ref.hidden is None:
            return self._of_logits(policy, ref, options, scale, reduction)
        assert policy.head is not None
        assert ref.head is not None
        with self.autocast():  # the heads are multiplied as the model's own are
            kl = linear_token_kl(
                policy.hidden,
                policy.head.weight,
                ref.hidden,
                ref.head.weight,
                bias=policy.head.bias,
                ref_bias=ref.head.bias,
                softcap=policy.head.softcap,
                ref_softcap=ref.head.softcap,
                logit_scale=policy.head.logit_scale,
                ref_logit_scale=ref.head.logit_scale,
                reduction=reduction,
                scale=scale,
                **options,
            )
            seen = _looked_at(policy, ref, options["temperature"]) if log else {}
        return kl, {**seen, options["kind"]: kl.detach() / scale}

    def _of_logits(
        self,
        policy: Rows,
        ref: Rows,
        options: Mapping[str, Any],
        scale: Tensor | float,
        reduction: Reduction,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            x = policy.logits()
            with torch.no_grad():
                y = ref.logits()
        stats = token_stats(x, y, outputs=("kl", *LOGGED), reduction=reduction, **options)
        assert stats.kl is not None
        seen = {**_by_metric(stats), options["kind"]: stats.kl}
        return stats.kl * scale, {name: value.detach() for name, value in seen.items()}

    def _kept_rows(self, forward: Forward) -> Rows:
        """The reference's rows, with the hidden states of the batch's first time where kept."""
        kept = None if self.kept is None or forward.batch is None else self.kept
        if kept is not None and forward.batch in kept:
            hidden, way = kept[forward.batch]
            return Rows(hidden=hidden, head=self.shortcut.head(way).detach())
        with frozen(self.model), self._without_adapter(), self.autocast():
            rows = self._rows(forward)
        way = self.shortcut.way(forward.names)
        if kept is not None and rows.hidden is not None and way is not None:
            kept[forward.batch] = (rows.hidden, way)
        return rows

    def _rows(self, forward: Forward) -> Rows:
        """By the model's own call, of which the last logits alone are made where that is enough."""
        names, way = forward.names, self.shortcut.way(forward.names)
        known = self.shortcut.known(names)
        last = 1 if known else _last_columns(forward.mask)
        if last and self.shortcut.possible() and "labels" not in names and (way or not known):
            modules = self.shortcut.modules if way is None else [way.module]
            with watched(modules) as seen:
                logits = self._logits(forward, last)
            if way is None:
                proofs = (
                    _proven(self.shortcut, module, seen[module], logits, forward.mask)
                    for module in modules
                    if module in seen
                )
                way = next((proof for proof in proofs if proof is not None), None)
                self.shortcut.learn(names, way)
            if way is not None and way.module in seen:
                states = hidden_states(seen[way.module])
                return Rows(hidden=forward.counted(states), head=self.shortcut.head(way).detach())
        return Rows(given=forward.counted(self._logits(forward, 0)))

    def _logits(self, forward: Forward, last: int) -> Tensor:
        """The model's own, of the last positions; 0: of all."""
        keep = {"logits_to_keep": last} if last else {}
        logits = logits_of(self.model(**forward.inputs, **keep))
        if logits is None:
            raise _no_logits("ref_model", self.model)
        return logits

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """With the policy's first weights; PEFT's switches make factors trainable that were not."""
        if self.adapter is None:
            yield
            return
        flags = [(p, p.requires_grad) for p in self.adapter.parameters()]
        try:
            with self._switched():
                yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    def _switched(self) -> AbstractContextManager[Any]:
        if "ref" in self.adapter.peft_config:  # a loaded adapter's first state, which TRL keeps so
            from trl.trainer.utils import use_adapter

            with_first: AbstractContextManager[Any] = use_adapter(self.adapter, adapter_name="ref")
            return with_first
        without: AbstractContextManager[Any] = self.adapter.disable_adapter()
        return without


def vocabularies_differ(policy: int, ref: int, asker: Asker = FULL_KL) -> Exception:
    """The error of two models whose tokens are not the same."""
    return checks.fail(
        *asker,
        f"the policy's vocabulary of {policy} tokens",
        f"one of {ref}",
        "use models of one vocabulary; where the larger one is padding alone, cut it: "
        f"model.resize_token_embeddings({min(policy, ref)})",
    )


def _no_logits(argument: str, model: Any) -> Exception:
    return checks.fail(
        "FullKL",
        argument,
        "a model whose output holds logits (B, T, V), a prediction for each label",
        f"{type(model).__name__}, whose output has none",
        "use a language model",
    )


def _last_columns(mask: Tensor) -> int:
    """How many of a batch's last positions hold some that count; 0 where none does."""
    columns = mask.any(0).nonzero().flatten()
    return mask.shape[1] - int(columns[-ROWS:][0]) if columns.numel() else 0


def _proven(
    shortcut: Shortcut, module: nn.Module, output: Any, logits: Tensor, mask: Tensor
) -> Way | None:
    """The way from a module's output to the model's own last logits."""
    states = hidden_states(output)
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[0] != mask.shape[0]:
        return None
    if states.shape[1] < max(mask.shape[1], logits.shape[1]) or len(logits) != len(mask):
        return None
    return shortcut.proven(
        module, states, logits, in_front(mask, states.shape[1])[:, -logits.shape[1] :]
    )


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
def _looked_at(policy: Rows, ref: Rows, temperature: float) -> dict[str, Tensor]:
    """Both KLs and the entropy from hidden states, for the log alone: two GEMMs, no graph.

    Of autocast's operands, whose products are summed and kept in float32.
    """
    assert policy.hidden is not None
    assert policy.head is not None
    assert ref.hidden is not None
    assert ref.head is not None
    logits, ref_logits = policy.head.wide_products(), ref.head.wide_products()
    sums = {
        name: torch.zeros((), device=policy.hidden.device)
        for name in ("policy_ref", "ref_policy", "entropy")
    }
    for h, ref_h in zip(policy.hidden.split(CHUNK), ref.hidden.split(CHUNK), strict=True):
        stats = token_stats(
            logits(h),
            ref_logits(ref_h),
            outputs=LOGGED,
            temperature=temperature,
            softcap=policy.head.softcap,
            ref_softcap=ref.head.softcap,
            logit_scale=policy.head.logit_scale,
            ref_logit_scale=ref.head.logit_scale,
            reduction="sum",
        )
        for name, value in _by_metric(stats).items():
            sums[name] += value
    return sums
