"""KL to the base of a whole model over batches of text, and its second-order form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttax._base import checks
from fasttax._base.choices import KlKind
from fasttax.fisher import batches as layout
from fasttax.fisher.task import Task, takes
from fasttax.integrations._models import frozen
from fasttax.kl.token_kl import token_kl
from fasttax.kl.token_stats import token_stats
from fasttax.reference.numbers import wide_dtype

Batch = Tensor | Mapping[str, Tensor]
_TOKENS = ("input_ids", "attention_mask", "position_ids", "cu_seqlens")  # of any model's batch


@dataclass(frozen=True)
class BothWays:
    """Means over `tokens` tokens, in nats a token.

    Example:
        >>> both = fasttax.tax.kl_both_ways(model, base, loader)
        >>> sorted(both.as_dict())
        ['policy_ref', 'ref_policy']
    """

    policy_ref: float  # KL(policy || base)
    ref_policy: float  # KL(base || policy)
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """What `TaxReport.add` takes as `task_kl`."""
        return {"ref_policy": self.ref_policy, "policy_ref": self.policy_ref}


def kl_to_base(
    model: nn.Module,
    base: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: KlKind = "policy_ref",
) -> float:
    """Mean KL(model || base) in nats a token over `batches`, exact over the whole vocabulary.

    Both models are run without dropout and without a graph, and are left as they were. Every token
    that is not padding counts, but for the last of each row, after which nothing is predicted, and
    of each document in a packed one.

    A KL is one on some text, and texts rank models differently. On general text, as the base was
    trained on, it says how far the model has moved where capability is measured; on the new task's
    text it is RL's Razor's predictor of forgetting (`kl_both_ways`). Take the same batches for
    every checkpoint of a report, and models that compute alike: one that a trainer trained in mixed
    precision goes on under autocast until `accelerator.unwrap_model(model,
    keep_fp32_wrapper=False)`, and its rounding is part of the KL.

    Args:
        model: called with input_ids and attention_mask; its result has `.logits` (N, T, V).
        base: the same, of the same vocabulary.
        batches: ids (N, T), or mappings with `input_ids`, where rows are padded `attention_mask`,
            where they are packed `position_ids` or `cu_seqlens`, and what else the model's forward
            names (`pixel_values`, ...).
        kind: as in `token_kl`.

    Raises:
        ValueError, TypeError, IndexError: no token counts, a batch has no input_ids or other ids
            than the models', or the vocabularies differ.

    Example:
        >>> nats = fasttax.tax.kl_to_base(model, base, general_text)
        >>> point = report.add("sft-300", 0.60, 0.44, kl=nats)
    """
    op = "kl_to_base"
    _check_models(op, model, base)
    total, count = 0.0, 0
    with frozen(model), frozen(base):
        for x, y, _, counts in _run(op, model, base, batches, False):
            values = token_kl(x, y, kind=kind, mask=counts)
            total += float(values.double().sum())
            count += int(counts.sum())
    return total / _some(op, count)


def kl_both_ways(
    model: nn.Module, base: nn.Module, batches: Iterable[Batch], *, answers: bool = False
) -> BothWays:
    """KL(model || base) and KL(base || model), means over the tokens, in one pass over `batches`.

    On the NEW task's text they are RL's Razor's predictors of forgetting (Shenfeld et al. 2025,
    arXiv:2509.04259, which takes KL(base || model)): `TaxReport.add(..., task_kl=this.as_dict())`.

    Args:
        model: as for `kl_to_base`, with its errors.
        base: the same.
        batches: the same; with `answers` their `labels` are read, too.
        answers: whether tokens whose label is -100, as prompts' are, do not count.

    Raises:
        ValueError, TypeError, IndexError: as `kl_to_base`.

    Example:
        >>> both = fasttax.tax.kl_both_ways(model, base, task_batches, answers=True)
        >>> point = report.add("sft-300", 0.60, 0.44, task_kl=both.as_dict())
    """
    op = "kl_both_ways"
    _check_models(op, model, base)
    forward, backward, count = 0.0, 0.0, 0
    with frozen(model), frozen(base):
        for policy_ref, ref_policy, _, counts in token_kls(op, model, base, batches, answers):
            forward += float(policy_ref[counts].double().sum())
            backward += float(ref_policy[counts].double().sum())
            count += int(counts.sum())
    count = _some(op, count)
    return BothWays(forward / count, backward / count, count)


def token_kls(
    op: str, model: nn.Module, base: nn.Module, batches: Iterable[Batch], answers: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per batch (KL(model || base), KL(base || model), ids, what counts), each (N, T - 1).

    A KL is that of the prediction of the id beside it.

    Yields:
        The four, on the model's device.
    """
    for x, y, ids, counts in _run(op, model, base, batches, answers):
        stats = token_stats(x, y, outputs=("kl_policy_ref", "kl_ref_policy"), mask=counts)
        if stats.kl_policy_ref is None or stats.kl_ref_policy is None:
            raise AssertionError(f"{op}: token_stats left out what it was asked for")
        yield stats.kl_policy_ref, stats.kl_ref_policy, ids, counts


def _run(
    op: str, model: nn.Module, base: nn.Module, batches: Iterable[Batch], answers: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per batch both models' logits before every token but the first, those tokens, what counts.

    Yields:
        Logits (N, T - 1, V) of model and base, and (N, T - 1) each.
    """
    for batch in _each(op, batches):
        given, counts = _given(op, batch, "model", model)
        if answers:
            if isinstance(batch, Tensor) or "labels" not in batch:
                raise checks.fail(op, "batches", "labels, with answers=True", "none in a batch")
            counts = counts & (batch["labels"][:, 1:] != -100).to(counts.device)
        x = _predictions(op, "model", model, given)
        y = _predictions(op, "base", base, _given(op, batch, "base", base)[0])
        if x.shape != y.shape:
            raise checks.fail(
                op, "base", f"a model of model's vocabulary, {x.shape[-1]}", f"{y.shape[-1]}"
            )
        ids = given["input_ids"][:, 1:]
        yield x, y.to(x.device), ids.to(x.device), counts.to(x.device)


def _check_models(op: str, model: nn.Module, base: nn.Module) -> None:
    for name, each in (("model", model), ("base", base)):
        if not isinstance(each, nn.Module):
            way_out = "load it with AutoModelForCausalLM.from_pretrained(...)"
            raise checks.fail(op, name, "a torch.nn.Module", each, way_out, TypeError)


def _check_ids(op: str, name: str, model: nn.Module, ids: Tensor) -> None:
    """That a transformers model has an embedding of every id; on a GPU a look would be a sync."""
    table: Any = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        table = model.get_input_embeddings()  # type: ignore[operator]
    count = getattr(table, "num_embeddings", None)
    if count is not None:
        checks.ids_in_range(op, "input_ids", ids, count, name)


def _some(op: str, count: int) -> int:
    """The number of tokens that count, which is not 0."""
    if not count:
        raise checks.fail(op, "batches", "a token that is followed by another", "none")
    return count


def kl_quadratic(model: nn.Module, base: nn.Module, batches: Iterable[Batch]) -> float:
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

    Example:
        >>> exact = fasttax.tax.kl_to_base(model, base, general_text)
        >>> second_order = fasttax.tax.kl_quadratic(model, base, general_text)
    """
    op = "kl_quadratic"
    _check_models(op, model, base)
    start = {n: p.detach() for n, p in base.named_parameters()}
    policy = {n: p.detach() for n, p in model.named_parameters()}
    wrong = [n for n in {**start, **policy} if n not in start or n not in policy] or [
        n for n, p in start.items() if policy[n].shape != p.shape
    ]
    if wrong:
        expected, got = "a model of base's parameters", f"other ones: {', '.join(wrong[:5])}"
        raise checks.fail(op, "model", expected, got)
    change = {n: _change(policy[n], p) for n, p in start.items()}
    total, count = 0.0, 0
    with frozen(base), sdpa_kernel(SDPBackend.MATH):
        for batch in _each(op, batches):
            given, counts = _given(op, batch, "base", base)

            def logits(weights: dict[str, Tensor], given: dict[str, Any] = given) -> Tensor:
                return _predictions(op, "base", base, given, weights)

            try:
                found = torch.func.jvp(logits, (start,), (change,))
            except RuntimeError as error:  # NotImplementedError is one
                raise _no_forward_mode(op, base, error) from error
            p = torch.softmax(found[0].float(), -1)
            moved = found[1].float()
            moved = moved - (p * moved).sum(-1, keepdim=True)
            variance = (p * moved.square()).sum(-1)
            total += float(variance[counts.to(p.device)].double().sum()) / 2
            count += int(counts.sum())
    return total / _some(op, count)


def _change(policy: Tensor, start: Tensor) -> Tensor:
    """The difference, rounded once: a trained float32 weight may differ by less than bfloat16's."""
    dtype = wide_dtype(policy, start)
    return (policy.to(start.device, dtype) - start.to(dtype)).to(start.dtype)


def _no_forward_mode(op: str, base: nn.Module, error: RuntimeError) -> Exception:
    """What a model's op says that has no forward-mode derivative; any other error as it is."""
    said = str(error)
    if "forward AD" not in said and "forward-mode" not in said and "jvp" not in said:
        return error
    expected = "a model all of whose ops have a forward-mode derivative"
    got = f"{type(base).__name__}: {said.splitlines()[0][:200]}"
    way_out = "load it with attn_implementation='eager', without gradient checkpointing"
    return checks.fail(op, "base", expected, got, way_out, NotImplementedError)


def _given(
    op: str, batch: Tensor | Mapping[str, Tensor], name: str, model: nn.Module
) -> tuple[dict[str, Any], Tensor]:
    """What a model is called with of a batch, and the predictions (N, T - 1) that count.

    Those of real tokens after real ones of the same document.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if "input_ids" not in batch:
        names = ", ".join(map(str, batch)) or "an empty mapping"
        raise checks.fail(op, "batches", "ids, or mappings with input_ids", names)
    given = {k: v for k, v in batch.items() if k in _TOKENS or (k != "labels" and takes(model, k))}
    for key in ("input_ids", "attention_mask"):
        value = given.get(key)
        if key not in given:
            continue
        argument = f"a batch's {key}"
        if not isinstance(value, Tensor):
            way_out = "tokenizer(..., return_tensors='pt', padding=True) gives tensors"
            raise checks.fail(op, argument, "a torch.Tensor", value, way_out, TypeError)
        if value.dim() != 2 or value.shape != given["input_ids"].shape:
            raise checks.fail(op, argument, "shape (N, T), one for both", value)
    _check_ids(op, name, model, given["input_ids"])
    task = Task.of(model, "softmax", shift=True)
    if task.encoder_decoder:
        way_out = "FullKL(trainer, base, beta=0) logs the KL of an encoder-decoder's labels"
        raise checks.fail(op, name, "a decoder language model", type(model).__name__, way_out)
    device, positions = next(model.parameters()).device, takes(model, "position_ids")
    read = layout.read(op, given, device, task, positions=positions)
    if task.arguments and not positions:  # they say what counts, and the model has no use for them
        read.inputs.pop("position_ids", None)
    return read.inputs, read.counted[:, :-1]


def _each(op: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches themselves, of which one alone is not an iterable.

    Raises:
        TypeError: it is a tensor, a mapping or a text.

    Yields:
        A batch.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        way_out = "for one batch pass [batch]"
        raise checks.fail(op, "batches", "an iterable of batches", batches, way_out, TypeError)
    yield from batches


def _predictions(
    op: str,
    name: str,
    model: nn.Module,
    given: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> Tensor:
    """Logits (N, T - 1, V) after every token but the last, by `weights` in place of the model's."""
    if weights is None:
        output = model(**given)
    else:
        output = torch.func.functional_call(model, weights, kwargs=given)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        expected, got = "a language model, of logits (N, T, V)", type(model).__name__
        raise checks.fail(op, name, expected, got if logits is None else f"{got}, {logits.shape}")
    return logits[:, :-1]
