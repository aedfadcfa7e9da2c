"""KL to the base of a whole model over batches of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.integrations._models import frozen
from fasttax.kl.token_kl import token_kl


def kl_to_base(
    model: nn.Module,
    base: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    kind: str = "policy_ref",
) -> float:
    """Mean KL(model || base) in nats a token over `batches`, exact over the whole vocabulary.

    `kind` as in token_kl.

    A batch is ids (N, T), or a mapping with `input_ids` and, where rows are padded,
    `attention_mask`. Both models are run without dropout and without a graph, and are left as they
    were. Every token that is not padding counts, but for the last of each row, after which nothing
    is predicted. Raises ValueError where no token counts, or the models' vocabularies differ.
    """
    op = "kl_to_base"
    total, count = 0.0, 0
    with frozen(model), frozen(base):
        for batch in batches:
            given: dict[str, Any] = (
                {"input_ids": batch}
                if isinstance(batch, Tensor)
                else {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
            )
            if "input_ids" not in given:
                raise checks.fail(
                    op,
                    "batches",
                    "ids, or mappings with input_ids",
                    ", ".join(map(str, batch)) or "an empty mapping",
                )
            mask = given.get("attention_mask")
            real = (
                torch.ones_like(given["input_ids"], dtype=torch.bool)
                if mask is None
                else mask.bool()
            )
            counts = real[:, :-1] & real[:, 1:]
            x, y = (
                m(**{k: v.to(next(m.parameters()).device) for k, v in given.items()}).logits[:, :-1]
                for m in (model, base)
            )
            if x.shape != y.shape:
                raise checks.fail(
                    op, "base", f"a model of model's vocabulary, {x.shape[-1]}", f"{y.shape[-1]}"
                )
            values = token_kl(x, y.to(x.device), kind=kind, mask=counts.to(x.device))
            total += float(values.double().sum())
            count += int(counts.sum())
    if not count:
        raise checks.fail(op, "batches", "a token that is followed by another", "none")
    return total / count
