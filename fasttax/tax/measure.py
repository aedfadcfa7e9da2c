"""KL to the base of a whole model over batches of text, and its second-order form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
            counts = _counted(given)
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


def kl_quadratic(
    model: nn.Module, base: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]
) -> float:
    """1/2 d^T F d in nats a token: the KL to second order in d, model's weights minus base's.

    F is the whole Fisher of `base` over the batches' tokens, no diagonal and no factors: with J d
    the change of a token's logits along d, d^T F d is its variance under the base's p, which takes
    one forward-mode pass (Martens 2014, arXiv:1412.1193, section 9). Beside `kl_to_base` it says
    how far the quadratic holds; beside EWC's penalty, what its Fisher leaves out.

    Args:
        model: of the same parameters as `base`.
        base: where F is taken; run without dropout, and left as it was.
        batches: as in `kl_to_base`.

    Raises:
        ValueError: other parameters, or no token counts.
        NotImplementedError: an op of the model has no forward-mode derivative.
    """
    op = "kl_quadratic"
    start = {n: p.detach() for n, p in base.named_parameters()}
    policy = {n: p.detach() for n, p in model.named_parameters()}
    wrong = [n for n in {**start, **policy} if n not in start or n not in policy] or [
        n for n, p in start.items() if policy[n].shape != p.shape
    ]
    if wrong:
        expected, got = "a model of base's parameters", f"other ones: {', '.join(wrong[:5])}"
        raise checks.fail(op, "model", expected, got)
    change = {n: policy[n].to(p) - p for n, p in start.items()}
    total, count = 0.0, 0
    with frozen(base), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            given = _given(op, batch)
            counts = _counted(given)

            def logits(weights: dict[str, Tensor], given: dict[str, Tensor] = given) -> Tensor:
                return _predictions(base, given, weights)

            found = torch.func.jvp(logits, (start,), (change,))
            p = torch.softmax(found[0].float(), -1)
            moved = found[1].float()
            moved = moved - (p * moved).sum(-1, keepdim=True)
            variance = (p * moved.square()).sum(-1)
            total += float(variance[counts.to(p.device)].double().sum()) / 2
            count += int(counts.sum())
    if not count:
        raise checks.fail(op, "batches", "a token that is followed by another", "none")
    return total / count


def _counted(given: Mapping[str, Tensor]) -> Tensor:
    """(N, T - 1), the predictions that count: of real tokens after real ones."""
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    return real[:, :-1] & real[:, 1:]


def _given(op: str, batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the models are called with."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if "input_ids" not in given:
        names = ", ".join(map(str, batch)) or "an empty mapping"
        raise checks.fail(op, "batches", "ids, or mappings with input_ids", names)
    return given


def _predictions(
    model: nn.Module, given: Mapping[str, Tensor], weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Logits (N, T - 1, V) after every token but the last, by `weights` in place of the model's."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in given.items()}
    if weights is None:
        output = model(**inputs)
    else:
        output = torch.func.functional_call(model, weights, kwargs=inputs)
    logits: Tensor = output.logits
    return logits[:, :-1]
