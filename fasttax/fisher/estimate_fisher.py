"""estimate_fisher: a DiagonalFisher over batches, with a progress bar and checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttax._base import checks, placed
from fasttax._base.hashes import chained
from fasttax._base.packed import STORAGES
from fasttax.fisher.diagonal import NORMALIZE, DiagonalFisher
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.kronecker import KroneckerEstimate
from fasttax.fisher.kronecker_fisher import KroneckerFisher
from fasttax.fisher.observation import one_loss
from fasttax.fisher.parts import rows_of, take
from fasttax.fisher.plan import Filter

STRUCTURES = ("diagonal", "kron")


@overload
def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor | tuple[Tensor, Tensor]],
    *,
    labels: str = ...,
    unit: str = ...,
    max_examples: int | None = ...,
    progress: bool = ...,
    params: Filter = ...,
    tied: str = ...,
    lora: str = ...,
    generator: torch.Generator | None = ...,
    mc_samples: int = ...,
    likelihood: str = ...,
    shift: bool | None = ...,
    fallback: str | None = ...,
    loss: Callable[[nn.Module, Any], Tensor] | None = ...,
    normalize: str = ...,
    storage: str = ...,
    structure: Literal["diagonal"] = ...,
    max_dim: None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    checkpoint_every: int = ...,
) -> FisherEstimate: ...
@overload
def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor | tuple[Tensor, Tensor]],
    *,
    labels: str = ...,
    unit: str = ...,
    max_examples: int | None = ...,
    progress: bool = ...,
    params: Filter = ...,
    tied: str = ...,
    lora: str = ...,
    generator: torch.Generator | None = ...,
    mc_samples: int = ...,
    likelihood: str = ...,
    shift: bool | None = ...,
    fallback: str | None = ...,
    loss: Callable[[nn.Module, Any], Tensor] | None = ...,
    normalize: str = ...,
    storage: str = ...,
    structure: Literal["kron"],
    max_dim: int | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    checkpoint_every: int = ...,
) -> KroneckerEstimate: ...
def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor | tuple[Tensor, Tensor]],
    *,
    labels: str = "sample",
    unit: str = "example",
    max_examples: int | None = None,
    progress: bool = True,
    params: Filter = None,
    tied: str = "exact",
    lora: str = "factors",
    generator: torch.Generator | None = None,
    mc_samples: int = 1,
    likelihood: str = "auto",
    shift: bool | None = None,
    fallback: str | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    normalize: str = "mean",
    storage: str = "fp32",
    structure: str = "diagonal",
    max_dim: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
) -> FisherEstimate | KroneckerEstimate:
    """The Fisher of `model` over `batches`, with a progress bar.

    Args:
        model: a decoder language model or a classifier.
        batches: an iterable of what `DiagonalFisher.update` takes.
        labels: "sample", "true" or "exact_head"; DiagonalFisher says more of this and the options
            that it has too.
        unit: what is summed before it is squared: "example", "token" or "batch".
        max_examples: stop after this many rows; the last batch is cut to fit.
        progress: show examples done, examples/s, the time left, and the estimate's own relative
            error.
        params: which parameters: None for all trainable ones, a predicate, names or patterns.
        tied: a weight that embedding and head share: "exact" or "sum_of_squares".
        lora: "factors", or "delta_w" for the base weights behind adapters.
        generator: for label sampling; None is one of its own, seeded with 0.
        mc_samples: label draws a batch.
        likelihood: of the labels: "auto" as the model's config says, "softmax", "bernoulli" or
            "gaussian".
        shift: labels of (B, T) are next tokens; None as the model's class says.
        fallback: "loop" runs example by example where a parameter has no rule.
        loss: (model, batch) -> the sum of the batch's losses, in place of a likelihood, with
            labels="true": any loss of any model, whose Fisher is then the empirical one of it. It
            is also called with one example, which `take` cuts out of the batch.
        normalize: "mean" per example (per token for unit="token"), or the "sum".
        storage: "fp32", "bf16" or "u8log".
        structure: "diagonal", or "kron": a Kronecker product A (x) G for the weight of each linear
            layer and the diagonal of what is left, a `KroneckerEstimate`, which EWC takes too. It
            keeps what the diagonal drops: how weights of a layer act together.
        max_dim: of "kron", the rows of a factor above which it is cut down to blocks on its
            diagonal; None is 8192. A layer's factors take in^2 + out^2 floats.
        checkpoint: a file that is written every `checkpoint_every` batches and removed at the end.
            Where it exists, estimation continues after the batches that it holds, to the same bits
            (with loss=, whose first batch is proven and summed apart, but for rounding);
            `batches` must be the same in the same order (a hash of them is compared), with the same
            options.
        checkpoint_every: batches between two checkpoints.

    Raises:
        ValueError, TypeError: an option or a batch does not fit, there is no batch, or the
            checkpoint is of other options or batches, or of more than are asked for.
        OSError: no file can be put where the checkpoint is to be.

    Example:
        >>> fisher = fasttax.estimate_fisher(model, loader, max_examples=256)
        >>> ewc = fasttax.EWC(model, fisher, strength=1e3)
    """
    op = "estimate_fisher"
    if max_examples is not None:
        max_examples = checks.count(op, "max_examples", max_examples)
    checkpoint_every = checks.count(op, "checkpoint_every", checkpoint_every)
    if checkpoint is not None:
        placed.for_file(f"{op}: checkpoint", checkpoint)
    one = isinstance(batches, (Mapping, Tensor))
    if one or not isinstance(batches, Iterable):
        expected = "an iterable of batches"
        way_out = "for one batch pass [batch]" if one else "the model comes first, then the batches"
        raise checks.fail(op, "batches", expected, batches, way_out, TypeError)
    estimator = _estimator(
        op,
        structure,
        max_dim,
        loss,
        model=model,
        labels=labels,
        unit=unit,
        params=params,
        tied=tied,
        lora=lora,
        generator=generator,
        mc_samples=mc_samples,
        likelihood=likelihood,
        shift=shift,
        fallback=fallback,
    )
    if loss is not None and labels != "true":
        raise checks.fail(op, "labels", "'true' with loss=, which draws no labels", repr(labels))
    checks.choice(op, "normalize", normalize, NORMALIZE)
    checks.choice(op, "storage", storage, STORAGES)
    if checkpoint is not None and os.path.exists(checkpoint):
        estimator.resume(checkpoint)
        _refuse_fewer(op, checkpoint, estimator.examples, max_examples)
    total = max_examples or _examples_in(batches)
    with tqdm(
        total=total, initial=estimator.examples, unit="ex", desc="Fisher", disable=not progress
    ) as bar:
        for batch in _left(op, batches, estimator, max_examples):
            before = estimator.examples
            if loss is None:
                estimator.update(batch)
            else:
                _observe(estimator, loss, batch)
            error = estimator.relative_error()
            if not math.isnan(error):
                bar.set_postfix_str(f"error {100 * error:.0f} %", refresh=False)
            bar.update(estimator.examples - before)
            if checkpoint is not None and estimator.batches % checkpoint_every == 0:
                estimator.checkpoint(checkpoint)
    if estimator.examples == 0:
        raise checks.fail(op, "batches", "at least one batch", "an empty iterable")
    estimate = estimator.finalize(normalize=normalize, storage=storage)
    if checkpoint is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(checkpoint)
    return estimate


def _estimator(
    op: str, structure: str, max_dim: int | None, loss: Any, **options: Any
) -> DiagonalFisher:
    checks.choice(op, "structure", structure, STRUCTURES)
    if structure == "diagonal":
        if max_dim is not None:
            raise checks.fail(op, "max_dim", "None with structure='diagonal'", max_dim)
        return DiagonalFisher(**options)
    if loss is not None:
        way_out = "use structure='diagonal'"
        raise checks.fail(op, "loss", "None with structure='kron'", "a function", way_out)
    return KroneckerFisher(max_dim=max_dim, **options)


def _observe(
    estimator: DiagonalFisher, loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> None:
    """A batch of the user's own loss."""
    model = estimator.model
    with estimator.observe(loss=lambda n: loss(model, take(batch, n, n + 1))):
        one_loss("estimate_fisher", loss(model, batch)).backward()


def _refuse_fewer(
    op: str, checkpoint: str | os.PathLike[str], held: int, max_examples: int | None
) -> None:
    """A checkpoint cannot give back the examples that are too many."""
    if max_examples is not None and held > max_examples:
        raise checks.fail(
            op,
            "max_examples",
            f"at least the {held} examples that {os.fspath(checkpoint)} holds",
            f"{max_examples}",
            "delete the file to begin anew",
        )


def _left(
    op: str, batches: Iterable[Any], estimator: DiagonalFisher, max_examples: int | None
) -> Iterator[Any]:
    """The batches that are left for the estimator, until it has seen `max_examples`.

    Yields:
        Batches, the last one cut to fit; the next is not asked for then.

    Raises:
        ValueError: there are fewer than the estimator has seen, or others.
    """
    if max_examples is not None and estimator.examples >= max_examples:
        return
    coming, seen = iter(batches), estimator.batches
    passed, hashed = 0, ""
    for batch in itertools.islice(coming, seen):
        passed, hashed = passed + 1, chained(hashed, batch)
    if passed < seen:
        raise checks.fail(
            op,
            "batches",
            f"the {seen} that the checkpoint holds, and those that follow",
            f"{passed}",
            "delete the checkpoint to begin anew, or give the batches that it was made of",
        )
    expected = estimator.hashed[1]
    if expected and hashed != expected:
        raise checks.fail(
            op,
            "batches",
            f"the {seen} that the checkpoint holds (hash {expected}), in that order",
            f"others (hash {hashed})",
            "delete the checkpoint to begin anew, or give the batches that it was made of (of a "
            "DataLoader that shuffles, with a generator of the same seed)",
        )
    for batch in coming:
        hashed = chained(hashed, batch)
        estimator.hashed = estimator.batches + 1, hashed
        if max_examples is None:
            yield batch
            continue
        yield _cut(batch, max_examples - estimator.examples)
        if estimator.examples >= max_examples:
            return


def _cut(batch: Any, room: int) -> Any:
    """At most `room` rows of a batch of unpacked rows."""
    rows = rows_of(batch)
    if rows is None or rows <= room:
        return batch
    return take(batch, 0, room)


def _examples_in(batches: Any) -> int | None:
    """For the time left: of a data loader, or a list of batches of ids.

    None where it cannot be known.
    """
    if isinstance(batches, torch.utils.data.DataLoader):
        try:
            return len(batches.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
    if not isinstance(batches, (list, tuple)):
        return None
    rows = [n for n in map(rows_of, batches) if n is not None]
    return sum(rows) if len(rows) == len(batches) else None
