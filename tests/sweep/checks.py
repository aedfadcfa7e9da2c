"""What is held against the definition: the Fisher by update and by observe, and FullKL."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fasttax
from fasttax import DiagonalFisher
from tests.sweep.batches import EXAMPLES, VOCABULARY, example
from tests.sweep.models import encodes
from tests.sweep.result import CRASH, NONE, REFUSED, RIGHT, WRONG, Case, Outcome

TOLERANCE = 1e-5
OWN = (ValueError, TypeError, NotImplementedError)
WAY_OUT = re.compile(
    r"params=|fallback|\bloop\b|shape=|output=|labels=|likelihood=|unit=|\bobserve\(|"
    r"\b(pass|use|call|leave|drop|freeze|choose|give|convert|build|train|make|add|instead)\b",
    re.IGNORECASE,
)
PACKAGE = os.path.dirname(fasttax.__file__)


class Unfit(Exception):
    """The sweep's own inputs do not fit the model: nothing was learned about fasttax."""


# --- the definition ------------------------------------------------------------------------------


def loss(case: Case, model: Any, batch: dict[str, Any]) -> Tensor:
    """The SUM loss of a batch, an example's being its own rows' part of it."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch.get("labels")
    if encodes(model.config) and case.family in VOCABULARY:
        inputs["labels"] = labels
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    if labels is None or logits is None or logits.shape[:-1] != labels.shape:
        return _any_loss(output)
    if labels.dim() == 2 and shifts(case, model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def shifts(case: Case, model: Any) -> bool:
    """Whether a label is the next position's."""
    return not encodes(model.config) and case.family not in ("token", "masked")


def _any_loss(output: Any) -> Tensor:
    """A curved function of every output of examples, the same for each example."""
    total: Any = 0
    for value in output.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            weight = torch.linspace(0.5, 1.5, value[0].numel(), dtype=value.dtype)
            total = total + (value.tanh() * weight.view(value.shape[1:])).sum()
    if not isinstance(total, Tensor):
        raise Unfit(f"{type(output).__name__} has no output by example")
    return total


def definition(case: Case, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The squared gradient of each example's own SUM loss, summed over the examples."""
    loss(case, model, batch)  # a batch that transformers itself refuses says nothing
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for n in range(EXAMPLES):
        value = loss(case, model, example(batch, n))
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for name, g in zip(params, found, strict=True):
            if g is not None:
                total[name] += g**2
    if not any(bool(t.any()) for t in total.values()):
        raise Unfit("no gradient reaches a parameter")
    if not all(bool(t.isfinite().all()) for t in total.values()):
        raise Unfit("a gradient is not finite")
    return total


# --- the Fisher ----------------------------------------------------------------------------------


def updated(case: Case, model: nn.Module, batch: dict[str, Any], **options: Any) -> Any:
    """`update` as the family's users call it; None where it is not the way for the family."""
    if "labels" not in batch or case.family == "other":
        return None
    shift = case.family not in ("token", "masked")  # of an encoder-decoder nothing need be said
    estimator = DiagonalFisher(model, labels="true", shift=shift, **options)
    estimator.update(batch)
    return estimator.finalize("sum")


def observed(case: Case, model: nn.Module, batch: dict[str, Any]) -> Any:
    """`observe` around the user's own forward and backward."""
    estimator = DiagonalFisher(model, labels="true")
    with estimator.observe():
        loss(case, model, batch).backward()
    return estimator.finalize("sum")


def fisher(estimate: Callable[[], Any], truth: dict[str, Tensor], model: nn.Module) -> Outcome:
    """Whether an estimate is the definition's, refused as an error should be, or neither."""
    try:
        found = estimate()
    except Exception as error:
        return refusal(error, model)
    return Outcome(NONE) if found is None else compare(found, truth)


def compare(found: Any, truth: dict[str, Tensor]) -> Outcome:
    """Relative error of every parameter; a gradient of 0 on paper is held against rounding."""
    floor = 1e-10 * max(float(t.norm()) for t in truth.values())
    wrong = []
    for name, t in truth.items():
        if name not in found:
            wrong.append((float("inf"), f"{name} is missing"))
            continue
        got = found[name].double()
        error, size = float((got - t).norm()), float(t.norm())
        if not error <= TOLERANCE * size + floor:
            ratio = error / max(size, 1e-300)
            norms = f"norm {float(got.norm()):.2e} for {size:.2e}"
            wrong.append((ratio, f"{name} off by {ratio:.1e}, {norms}"))
    if not wrong:
        return Outcome(RIGHT)
    return Outcome(WRONG, f"{len(wrong)} of {len(truth)}: {max(wrong)[1]}")


def refusal(error: Exception, model: nn.Module, own: tuple[type, ...] = OWN) -> Outcome:
    """A refusal is an error of fasttax's own that names what it means and a way out."""
    text = " ".join(str(error).split())
    detail = f"{type(error).__name__}: {text} [{_where(error)}]"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error) not in own or not raised_in.startswith(PACKAGE):
        return Outcome(CRASH, detail)
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
    names |= {type(m).__name__ for m in model.modules()} | {"batch", "labels", "params"}
    if not WAY_OUT.search(text) or not any(name in text for name in names):
        return Outcome(CRASH, f"no way out in {detail}")
    return Outcome(REFUSED, detail)


def _where(error: Exception) -> str:
    """Where it was raised, and the last line of fasttax's on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(PACKAGE)]
    last = f"{frames[-1].filename.rpartition('site-packages/')[2]}:{frames[-1].lineno}"
    if not own:
        return last
    inside = f"fasttax/{os.path.relpath(own[-1].filename, PACKAGE)}:{own[-1].lineno}"
    return inside if own[-1] is frames[-1] else f"{last} under {inside}"
