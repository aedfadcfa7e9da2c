"""A file of top-k log-probs as FullKL's reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttax._base import checks
from fasttax.integrations._heads import vocabulary
from fasttax.integrations._kl_forward import Forward
from fasttax.integrations._kl_sums import CHUNK, FULL_KL, Asker, Autocast, Rows, vocabularies_differ
from fasttax.integrations.reference import TopKReference
from fasttax.kl.topk import topk_kl

PACKED_ROWS = 8  # of a packed data set, looked up before training begins


class CachedReference:
    """A `TopKReference`: no model in memory, and no metric but the KL that it was asked for.

    Args:
        cache: the file's contents.
        policy: the language model that is trained.
        temperature: of both distributions.
        autocast: the context of the policy's own forward.
        asker: who asks for it, for errors.

    Raises:
        ValueError: the cache is of another vocabulary or temperature, or no cache can serve.
    """

    def __init__(
        self,
        cache: TopKReference,
        policy: Any,
        temperature: float,
        autocast: Autocast,
        asker: Asker = FULL_KL,
    ) -> None:
        self.cache, self.temperature, self.autocast = cache, temperature, autocast
        self.asker = asker
        self.V = vocabulary(policy)
        if getattr(policy.config, "is_encoder_decoder", False):
            raise self._no_cache(f"{type(policy).__name__}, an encoder-decoder", "encoder's inputs")
        if self.V is not None:
            self._check_vocabulary(self.V)
        if temperature != cache.temperature and self.V is not None and cache.k < self.V:
            raise self._other_temperature(self.V)

    def _other_temperature(self, V: int) -> Exception:
        cache = self.cache
        return checks.fail(
            *self.asker,
            f"log-probs at the temperature {self.temperature:g}, to which the {cache.k} largest of "
            f"{V} do not lead from another one",
            f"a cache made at {cache.temperature:g}",
            f"make it with TopKReference.make(..., temperature={self.temperature:g}), or with k = "
            f"{V}",
        )

    def __repr__(self) -> str:
        return repr(self.cache)

    def check_packing(self, trainer: Any) -> None:
        """Refuses a packed data set whose rows are not made of whole cached sequences.

        Raises:
            ValueError: a packed row has a part that the cache does not know.
        """
        rows: Any = getattr(trainer, "train_dataset", None)
        if not getattr(trainer.args, "packing", False) or not hasattr(rows, "__getitem__"):
            return
        for i in range(min(PACKED_ROWS, len(rows))):
            ids = torch.as_tensor(rows[i]["input_ids"])
            for part in ids.split(list(rows[i].get("seq_lengths", [len(ids)]))):
                if len(part) > 1 and part not in self.cache:
                    raise checks.fail(
                        *self.asker,
                        "a cache of the sequences that are packed",
                        f"a packed row with {len(part)} tokens that are none of them",
                        "pack whole sequences: packing_strategy='bfd', max_length not below the "
                        "longest cached one; or pass packing=False",
                    )

    def sums(
        self,
        forward: Forward,
        policy: Rows,
        options: Mapping[str, Any],
        scale: Tensor | float,
        log: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ModelReference.sums`; `log` adds nothing."""
        self._check_inputs(forward)
        if policy.vocabulary != self.V:
            self._check_vocabulary(policy.vocabulary)
        found, top = self.cache.rows(
            forward.inputs["input_ids"],
            forward.inputs.get("attention_mask"),
            forward.inputs.get("position_ids"),
        )
        logp, top = found[forward.places], top[forward.places]
        if options["temperature"] != self.cache.temperature:  # of the whole vocabulary: as checked
            if bool((logp == -torch.inf).any()):  # but for lists that are filled up
                raise self._other_temperature(policy.vocabulary)
            ratio = self.cache.temperature / options["temperature"]
            logp = (logp.double() * ratio).log_softmax(-1).to(logp.dtype)

        def part(x: Tensor, logp: Tensor, top: Tensor, *head: Any) -> Tensor:
            logits = x
            if policy.head is not None:
                weight, bias = head
                with self.autocast():  # the head is multiplied as the model's own is
                    logits = replace(policy.head, weight=weight, bias=bias).logits(x)
            return topk_kl(logits, logp, top, reduction="sum", **options)

        x = policy.given
        weights: tuple[Tensor | None, ...] = ()
        if x is None:
            assert policy.hidden is not None
            assert policy.head is not None
            x, weights = policy.hidden, (policy.head.weight, policy.head.bias)
        # what a chunk keeps of its logits is made again in the backward
        pieces = [
            checkpoint(part, *chunk, *weights, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*(rows.split(CHUNK) for rows in (x, logp, top)), strict=True)
            if chunk[0].shape[0]
        ]
        # where no token counts, a zero with a graph
        kl = torch.stack(pieces).sum() if pieces else x.sum() * 0
        return kl * scale, {options["kind"]: kl.detach()}

    def _check_inputs(self, forward: Forward) -> None:
        """Refuses what a cache of token ids cannot know.

        Raises:
            ValueError: an image or sound, embeddings, or labels that are not the next tokens.
        """
        if "input_ids" not in forward.inputs:
            raise self._no_cache(f"{sorted(forward.names)} without input_ids", "inputs but ids")
        for name, value in forward.inputs.items():
            of_numbers = isinstance(value, Tensor) and value.is_floating_point()
            if of_numbers and value.dim() > 2 and not name.endswith("mask"):
                raise self._no_cache(f"{name} beside input_ids", f"{name} but ids")
        if not forward.shifted and bool(forward.mask[:, -1].any()):
            missing = "prediction after the last id"
            raise self._no_cache("labels that the model does not shift", missing)

    def _check_vocabulary(self, V: int) -> None:
        cache = self.cache
        made_of = cache.vocabulary
        if made_of is not None and made_of != V:
            raise vocabularies_differ(V, made_of, self.asker)
        if cache.highest_id >= V:
            raise checks.fail(
                *self.asker,
                f"ids of the policy's vocabulary of {V} tokens",
                f"the id {cache.highest_id}",
                "make the cache with a model of the policy's vocabulary",
            )

    def _no_cache(self, came: str, missing: str) -> Exception:
        return checks.fail(
            *self.asker,
            f"a model: a cache holds no {missing}",
            f"a cached reference, and {came}",
            "pass the reference model itself",
        )
