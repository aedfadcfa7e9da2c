"""KL to the base of a whole model over batches of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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

    Both models are run without dropout and without a graph, and are left as they were. Every token
    that is not padding counts, but for the last of each row, after which nothing is predicted.

    Args:
        model: called with input_ids and attention_mask; its result has `.logits` (N, T, V).
        base: the same, of the same vocabulary.
        batches: ids (N, T), or mappings with `input_ids` and, where rows are padded,
            `attention_mask`.
        kind: as in `token_kl`.

    Raises:
        ValueError: no token counts, a batch has no input_ids, or the vocabularies differ.
    """
    op = "kl_to_base"
    total, count = 0.0, 0
    with frozen(model), frozen(base):
        for batch in batches:
            given = _given(op, batch)
            real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
            counts = real[:, :-1] & real[:, 1:]
            x, y = _predictions(model, given), _predictions(base, given)
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


def _given(op: str, batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the models are called with."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if "input_ids" not in given:
        names = ", ".join(map(str, batch)) or "an empty mapping"
        raise checks.fail(op, "batches", "ids, or mappings with input_ids", names)
    return given


def _predictions(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """Logits (N, T - 1, V) after every token but the last."""
    device = next(model.parameters()).device
    logits: Tensor = model(**{name: value.to(device) for name, value in given.items()}).logits
    return logits[:, :-1]
