"""The definition itself: one example at a time through autograd.

The fallback for any model, and what the first batch is checked against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttax.fisher import batches, labels
from fasttax.fisher.passes import WAY_OUT, Pass
from fasttax.fisher.pieces import add_squares
from fasttax.fisher.taps import require_input_grads


def cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def only_these(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Gradients for `params` alone, from None.

    flags, every p.grad and the random state are put back.
    """
    everything = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(p) for p in params.values()}
    root = require_input_grads(model)
    try:
        for p, _, _ in everything:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        with (
            torch.random.fork_rng(devices=cuda_devices(model)),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for handle in root:
            handle.remove()
        for p, flag, grad in everything:
            p.requires_grad_(flag)
            p.grad = grad


def gradients(
    params: Mapping[str, Tensor], forward: Callable[[], Tensor], score: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """By .backward(), since reentrant checkpointing refuses torch.autograd.grad.

    Inside `only_these`.
    """
    for p in params.values():
        p.grad = None
    logits = forward()
    logits.backward(score(logits).to(logits.dtype))
    return {n: p.grad for n, p in params.items() if p.grad is not None}


def update(estimator: Any, batch: Any, ready: batches.Batch) -> None:
    """One batch, one example at a time."""
    for n in range(ready.examples):
        for _ in range(estimator.mc_samples):
            part = estimator._read(batches.example(batch, ready, n))

            def score(logits: Tensor, part: batches.Batch = part) -> Tensor:
                return labels.score(logits, part.settled(logits), estimator.drawing)

            with only_these(estimator.model, estimator.params):
                found = gradients(
                    estimator.params, lambda part=part: estimator._forward(part), score
                )  # type: ignore[misc]
            add_squares(
                [estimator.sums.value(name) for name in found],
                list(found.values()),
                1 / estimator.mc_samples,
            )


def verify(estimator: Any, batch: Any) -> None:
    """The taps against autograd on a few tokens of one or two examples, parameter by parameter."""
    small = estimator._read(batches.snippet(batch, 16))
    sums = estimator.sums
    state, kept, sums.values = estimator.generator.get_state(), sums.values, {}
    weight, sums.weight = sums.weight, None
    truth: dict[str, Tensor] = {}
    try:
        current = Pass(estimator.unit, small.shape, small.bounds)
        with estimator._tapped([current]):
            logits = estimator._forward(small)
            small = small.settled(logits)
            score = labels.score(logits, small, estimator.drawing)
            if not bool(small.counted.any()):
                return
            logits.backward(score.to(logits.dtype), retain_graph=estimator.labels == "exact_head")
            sums.finish(current)
            if estimator.labels == "exact_head":
                _check_head(estimator, current, logits, small, score)
        got, sums.values = sums.values, {}
        params = {
            n: s.param
            for n, s in sums.slots.items()
            if s.param is not None and not n.startswith("_")
        }
        with only_these(estimator.model, params):
            for n in range(small.examples if params else 0):
                part = estimator._read(batches.example(batches.snippet(batch, 16), small, n))
                mine = score[n : n + 1, : part.shape[1]] if score.dim() > 2 else score[n : n + 1]
                for name, g in gradients(
                    params, lambda part=part: estimator._forward(part), lambda _, mine=mine: mine
                ).items():  # type: ignore[misc]
                    truth[name] = truth.get(name, 0) + g.double() ** 2
    finally:
        sums.values, sums.weight, estimator._damaged = kept, weight, False
        estimator.generator.set_state(state)
    exact = all(
        p.dtype in (torch.float32, torch.float64) for p in params.values()
    ) and not torch.is_autocast_enabled(logits.device.type)
    wrong = []
    # a gradient that is 0 on paper (a key's bias) is rounding noise, in both
    noise = (1e-6 if exact else 1e-2) * max(
        (float(t.sum()) ** 0.5 for t in truth.values()), default=0.0
    )
    for name, p in params.items():
        expected = truth.get(
            name, torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        ).sqrt()
        found = (
            got[name].double().clamp_min(0).sqrt() if name in got else torch.zeros_like(expected)
        )
        error, size = float((found - expected).norm()), float(expected.norm())
        if estimator.unit == "example" and error > (1e-3 if exact else 0.1) * size + noise:
            wrong.append(f"{name}: off by {error / max(size, 1e-30):.1e} of its gradient's norm")
        elif (
            estimator.unit != "example"
            and max(size, float(found.norm())) > noise
            and (size > 0) != bool(found.any())
        ):
            wrong.append(
                f"{name}: {'no' if size > 0 else 'a'} gradient seen where autograd has "
                f"{'one' if size > 0 else 'none'}"
            )
    if wrong:
        raise ValueError(
            "DiagonalFisher: the layers' taps disagree with autograd on:\n  "
            + "\n  ".join(wrong[:10])
            + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            + "\nthese weights are used outside their own module's "
            f"forward (or in a way it does not show); {WAY_OUT}"
        )


def _check_head(
    estimator: Any, current: Pass, logits: Tensor, small: batches.Batch, score: Tensor
) -> None:
    """The head's closed form needs logits that depend on the head's output entry by entry.

    Its gradient is the score times a slope.
    """
    tap = estimator._head(current, logits)
    slopes: list[Tensor] = []
    current.muted = True
    try:
        tap.record = lambda current, d, x, bounds: slopes.append(d.reshape(-1, d.shape[-1]))
        for s in (score, labels.score(logits, small, estimator.generator)):
            last = len(slopes) == 1
            logits.backward(s.to(logits.dtype), retain_graph=not last)
            s = s.reshape(-1, s.shape[-1])
            same = slopes[-1].shape == s.shape
            slopes[-1] = (
                torch.where(s.abs() > 1e-6, slopes[-1].to(s.dtype) / s, 0.0) if same else slopes[-1]
            )
            if not same:
                raise ValueError(
                    "DiagonalFisher: labels: 'exact_head' needs one output of the head "
                    f"({tap.where}) for each row of logits, got gradients of "
                    f"shape {tuple(slopes[-1].shape)} for scores {tuple(s.shape)}; use "
                    "labels='sample'"
                )
    finally:
        del tap.record
    both = (slopes[0] != 0) & (slopes[1] != 0)
    slack = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.1
    if bool(((slopes[0] - slopes[1]).abs() > slack * slopes[0].abs().max())[both].any()):
        raise ValueError(
            "DiagonalFisher: labels: 'exact_head' needs logits that are the output of the head "
            f"({tap.where}) entry by entry (softcap and "
            "scale are fine), which these are not; use labels='sample'"
        )


def check_isolation(estimator: Any, batch: Any, ready: batches.Batch) -> None:
    """Packed documents are examples only where the model keeps them apart.

    a document's logits must not depend on its neighbours.
    """
    pair = batches.neighbours(ready, 8)
    if pair is None:
        return
    both, alone, start = pair
    model = estimator.model
    with torch.random.fork_rng(devices=cuda_devices(model)), torch.no_grad():
        estimator.sums.current = None
        joint, single = (estimator._logits(model(**estimator._arguments(x))) for x in (both, alone))
    error, size = (
        float((joint[:, start:].float() - single.float()).norm()),
        float(single.float().norm()),
    )
    slack = (
        1e-3
        if single.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(single.device.type)
        else 0.1
    )
    if error > slack * size and not model.training:
        raise ValueError(
            "DiagonalFisher.update: batch: expected a model whose packed documents do not see "
            "each other, got logits that change by "
            f"{error / size:.1e} with the document before; pass restarting position_ids and no "
            "attention_mask (sdpa and flash attention of "
            "transformers keep documents apart then), or one document a row, padded"
        )
