"""The taps held against autograd, and packed documents against each other, on a first batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttax._base.modes import evaluated
from fasttax.fisher import batches, labels, loop, parts
from fasttax.fisher.layout import Layout
from fasttax.fisher.passes import Pass
from fasttax.fisher.proof import WIDE, differences, disagreement, is_exact, roots
from fasttax.fisher.sums import Sums
from fasttax.fisher.view import NoClosedForm, View, without_gradients

_TOKENS = 16  # of one or two examples


def verify(view: View, sums: Sums, drawing: torch.Generator | None, batch: Any) -> None:
    """The taps against autograd on a few tokens of one or two examples, parameter by parameter.

    By the squares of each example's gradient; where the estimate is of others (unit="token" or
    "batch", or a tied weight squared use by use), by the gradient that the taps saw in all.

    In eval mode: dropout would draw other masks for an example alone. Sums, generator and modes are
    as before at the end.

    Args:
        view: the model under its taps.
        sums: the taps' sink.
        drawing: of labels; None where they are the data's.
        batch: as `view.read` takes it.

    Raises:
        ValueError: a parameter's square is not that of its gradient, or the head's closed form
            does not apply.
    """
    part = parts.snippet(batch, _TOKENS, view.task)
    small = view.read(part)
    params = {
        n: s.param for n, s in sums.slots.items() if s.param is not None and not n.startswith("_")
    }
    with labels.unmoved(drawing), sums.scratch() as found, evaluated(view.model):
        current = Pass(Layout(view.unit, small.shape, small.bounds))
        with sums.recording([current]), view.tapped():
            with loop.explained(view, small, batch), current.explained():
                logits = view.forward(small)
            small = small.settled(logits)
            if not bool(small.counted.any()):
                return
            score = labels.score(logits, small, drawing)
            exact_head = view.labels == "exact_head"
            logits.backward(score.to(logits.dtype), retain_graph=exact_head)
            sums.finish(current)
            totals = dict(sums.totals or {})
            if exact_head:
                _check_head(view, current, logits, small, drawing)
        if not params:
            return
        gradients, squares = loop.squares(view, params, part, small, score)
    exact = is_exact(logits.device, *(p.dtype for p in params.values()))
    squared = {}
    if view.unit == "example":
        squared = {n: p for n, p in params.items() if not sums.approximates(n)}
    others = {n: p for n, p in params.items() if n not in squared}
    wrong = differences(squared, roots(found), roots(squares), exact)
    wrong += differences(others, totals, gradients, exact)
    if wrong:
        raise ValueError(disagreement("DiagonalFisher", wrong))


def _check_head(
    view: View,
    current: Pass,
    logits: Tensor,
    small: batches.Batch,
    drawing: torch.Generator | None,
) -> None:
    """The head's closed form needs logits that depend on the head's output entry by entry.

    The gradient at the head's output is then the score times a slope that no label changes.

    Raises:
        NoClosedForm: they do not.
    """
    tap = view.head(current, logits, small)
    needs = "DiagonalFisher: labels: 'exact_head' needs"
    slopes: list[Tensor] = []
    current.diverted = []
    for last in (False, True):
        score = labels.score(logits, small, drawing)
        current.head, current.score = tap, score
        logits.backward(score.to(logits.dtype), retain_graph=not last)
        s = score.reshape(-1, score.shape[-1])
        heads = [p.d for p in current.diverted if p.kind == "head"]
        d = heads[-1] if heads else score.new_empty(0)
        if d.shape != s.shape:
            raise NoClosedForm(
                f"{needs} one output of the head ({tap.where}) for each row of logits, got "
                f"gradients of shape {tuple(d.shape)} for scores {tuple(s.shape)}; use "
                "labels='sample'"
            )
        slopes.append(torch.where(s.abs() > 1e-6, d.to(s.dtype) / s, 0.0))
    first, second = slopes
    both = (first != 0) & (second != 0)
    slack = 1e-3 if logits.dtype in WIDE else 0.1
    if bool(((first - second).abs() > slack * first.abs().max())[both].any()):
        raise NoClosedForm(
            f"{needs} logits that are the output of the head ({tap.where}) entry by entry (softcap "
            "and scale are fine), which these are not; use labels='sample'"
        )


def check_isolation(view: View, ready: batches.Batch) -> None:
    """Packed documents are examples only where the model keeps them apart.

    A document's logits must not depend on its neighbours.

    Raises:
        ValueError: they do.
    """
    meeting = parts.neighbours(ready, 8)
    if meeting is None or view.model.training:
        return
    with torch.random.fork_rng(devices=view.cuda_devices):
        joint, single = without_gradients(
            lambda: [view.run(inputs).detach() for inputs in (meeting.both, meeting.alone)]
        )
    error = float((joint[:, meeting.start :].float() - single.float()).norm())
    size = float(single.float().norm())
    slack = 1e-3 if is_exact(single.device, single.dtype) else 0.1
    if error > slack * size:
        raise ValueError(
            "DiagonalFisher.update: batch: expected a model whose packed documents do not see "
            f"each other, got logits that change by {error / size:.1e} with the document before; "
            "pass restarting position_ids and no attention_mask (sdpa and flash attention of "
            "transformers keep documents apart then), or one document a row, padded"
        )
