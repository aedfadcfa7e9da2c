"""Models on the line between a base and its aligned descendant, each measured: `merge.sweep`."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.merge import alphas as by_pattern
from fasttax.merge.alphas import Alpha
from fasttax.merge.average import Model, linear
from fasttax.tax.report import TaxReport

OP = "merge.sweep"
MEASURED = (
    "kl",
    "distance",
    "se",
    "n",
    "task_kl",
    "quadratic",
)  # beside the scores, as TaxReport.add takes it

Measure = Callable[[Any], Any]


def sweep(
    base: Model,
    aligned: Model,
    alphas: Sequence[Alpha],
    measure: Measure,
    *,
    run: str = "merge.linear",
    lower_is_better: Iterable[str] = (),
    title: str = "Merging base and aligned",
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TaxReport:
    """Measures `linear(base, aligned, alpha)` for each alpha: a TaxReport with every point.

    The base itself (alpha 0) is measured first. One merged model exists at a time.

    Args:
        base: as for `linear`.
        aligned: as for `linear`.
        alphas: numbers, or patterns with numbers, as for `linear`; each once.
        measure: called with a merged model of base's kind: a module (a copy of base, whose weights
            are the merged ones: its eval mode and device are base's), a folder or file that
            is deleted afterwards, or a mapping of names to tensors. Returns (capability,
            alignment), or a mapping of those two and what else of kl, distance, se, n, task_kl,
            quadratic `TaxReport.add` takes.
        run: the report's.
        lower_is_better: the report's.
        title: the report's.
        folder: where merged files lie while they are measured, on a disk with room for one model;
            the system's folder for temporary files by default.
        progress: as for `linear`.

    Returns:
        The report; a checkpoint is named "alpha 0.5", or by its patterns.

    Raises:
        ValueError: no alphas, one twice, or a result that is none of the forms; and as `linear`.

    Example:
        >>> def measure(merged):
        ...     return capability(merged), alignment(merged)
        >>> report = fasttax.merge.sweep(base, model, [0.3, 0.6, 1.0], measure)
    """
    named: dict[str, Alpha] = {}
    for alpha in alphas:
        name = _name(by_pattern.checked(OP, alpha))
        if name in named:
            raise checks.fail(OP, "alphas", "each once", f"{name!r} twice")
        named[name] = alpha
    if not named:
        raise checks.fail(OP, "alphas", "one or more", "none")
    with _merging(base, aligned, folder, progress) as merged:
        start = _measured(measure, merged(0.0))
        errors = {key: start[key] for key in ("se", "n") if key in start}
        report = TaxReport(
            start["capability"],
            start["alignment"],
            lower_is_better=lower_is_better,
            title=title,
            **errors,
        )
        for name, alpha in named.items():
            found = start
            if alpha != 0:
                found = _measured(measure, merged(alpha))
            report.add(name, run=run, **found)
    return report


@contextmanager
def _merging(
    base: Model, aligned: Model, folder: str | os.PathLike[str] | None, progress: bool
) -> Iterator[Callable[[Alpha], Any]]:
    """What makes the model of an alpha, of base's kind, in the place of the one before."""
    if isinstance(base, nn.Module):
        yield _in_module(base, aligned, progress)
    elif isinstance(base, Mapping):
        yield lambda alpha: linear(base, aligned, alpha, progress=progress)
    else:
        with tempfile.TemporaryDirectory(prefix="fasttax-sweep-", dir=folder) as place:
            target = Path(place) / ("model.safetensors" if Path(base).is_file() else "model")

            def written(alpha: Alpha) -> Path:
                if target.is_dir():
                    shutil.rmtree(target)
                target.unlink(missing_ok=True)
                return linear(base, aligned, alpha, output=target, progress=progress)

            yield written


def _in_module(base: nn.Module, aligned: Model, progress: bool) -> Callable[[Alpha], nn.Module]:
    """Merged weights in a copy of the base."""
    model = copy.deepcopy(base)
    own = model.state_dict(keep_vars=True)

    def loaded(alpha: Alpha) -> nn.Module:
        merged: dict[str, Tensor] = linear(base, aligned, alpha, progress=progress)
        with torch.no_grad():
            for name, value in merged.items():
                own[name].copy_(value)
        return model

    return loaded


def _measured(measure: Measure, model: Any) -> dict[str, Any]:
    """What `measure` says of a model, as arguments of TaxReport.add."""
    found = measure(model)
    if isinstance(found, tuple) and len(found) == 2:
        return {"capability": found[0], "alignment": found[1]}
    if isinstance(found, Mapping) and {"capability", "alignment"} <= {*found}:
        strange = [key for key in found if key not in ("capability", "alignment", *MEASURED)]
        if not strange:
            return dict(found)
    raise checks.fail(
        OP,
        "measure",
        "(capability, alignment), or a mapping of those and of any of " + ", ".join(MEASURED),
        found,
    )


def _name(alpha: float | dict[str, float]) -> str:
    """What a checkpoint is called."""
    if isinstance(alpha, float):
        return f"alpha {alpha:.6g}"
    return "alpha " + ", ".join(f"{pattern} {value:.6g}" for pattern, value in alpha.items())
