"""Models averaged weight by weight, streamed over safetensors.

One tensor of each model in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.merge.checkpoints import Checkpoint, Fishers, write

Model = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module
Fisher = str | os.PathLike[str] | Mapping[str, Tensor]
Combine = Callable[[str, Sequence[Tensor]], Tensor]

MISSING = ("error", "mean")


@overload
def linear(
    base: Model, aligned: Model, alpha: float, *, output: None = None, progress: bool = True
) -> dict[str, Tensor]: ...
@overload
def linear(
    base: Model,
    aligned: Model,
    alpha: float,
    *,
    output: str | os.PathLike[str],
    progress: bool = True,
) -> Path: ...
def linear(
    base: Model,
    aligned: Model,
    alpha: float,
    *,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor] | Path:
    """(1 - alpha) base + alpha aligned, weight by weight: how much of the alignment to keep.

    On the line between a model and its aligned descendant the capability that alignment cost comes
    back faster than the alignment goes (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903; for RLHF
    Lin et al. 2024, arXiv:2309.06256).

    Args:
        base, aligned: a safetensors file, a folder of them as transformers saves it (with its
            index, if there are several), a mapping of name to tensor, or a module. Names and shapes
            must be the same.
        alpha: finite; 0 is base and 1 is aligned, to the bit. Values outside [0, 1] extrapolate.
        output: a new `.safetensors` file, or a new folder, which gets base's files of weights and
            aligned's other files (config, tokenizer), so that transformers loads it. Written whole
            or not at all.
        progress: a bar on a terminal.

    Returns:
        The weights by name, or with `output` its path. Each in base's dtype, computed in float32
        (float64 for float64).

    Raises:
        ValueError: names, shapes or kinds differ (all differences are listed); integer tensors have
            different values.
        FileExistsError: output is there already.
    """
    alpha = checks.number("merge.linear", "alpha", alpha)

    def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
        first, second = tensors
        if alpha in (0, 1):
            return (first, second)[int(alpha)].to(first.dtype)
        wide = torch.promote_types(first.dtype, torch.float32)
        return ((1 - alpha) * first.to(wide) + alpha * second.to(wide)).to(first.dtype)

    facts = {"merge": "linear", "alpha": alpha}
    return _merge(
        "merge.linear",
        {"base": base, "aligned": aligned},
        combine,
        output,
        facts,
        others_of=1,
        progress=progress,
    )


@overload
def fisher_average(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    missing: str = "error",
    output: None = None,
    progress: bool = True,
) -> dict[str, Tensor]: ...
@overload
def fisher_average(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    missing: str = "error",
    output: str | os.PathLike[str],
    progress: bool = True,
) -> Path: ...
def fisher_average(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    missing: str = "error",
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor] | Path:
    """sum_k w_k F_k theta_k / sum_k w_k F_k, elementwise.

    Each weight mostly as the models have it for which it matters.

    The mode of the product of the models' Laplace approximations (Matena & Raffel 2022,
    arXiv:2111.09832). Where every F_k is 0 the plain weighted mean.

    Args:
        models: two or more, each as for `linear`.
        fishers: one for each model: a FisherEstimate, its file or sharded folder, or a mapping of
            name to tensor; finite and >= 0. "mean"-normalised estimates count models alike, "sum"
            ones by their numbers of examples.
        weights: one for each model, finite and > 0; 1 by default.
        missing: what to do with a floating-point tensor that some Fisher lacks: "error", or its
            plain weighted "mean".
        output, progress: as for `linear`; other files come from the first model.

    Returns:
        The weights by name, or with `output` its path. Each in the first model's dtype, computed in
        float32 (float64 for float64).

    Raises:
        ValueError: the numbers of models, fishers and weights differ; names or shapes differ; a
            Fisher is negative or not finite.
        FileExistsError: output is there already.
    """
    op = "merge.fisher_average"
    checks.choice(op, "missing", missing, MISSING)
    if len(models) < 2:
        raise checks.fail(op, "models", "two or more", f"{len(models)}")
    for argument, values in (("fishers", fishers), ("weights", weights)):
        if values is not None and len(values) != len(models):
            raise checks.fail(
                op, argument, f"one for each of the {len(models)} models", f"{len(values)}"
            )
    shares = [
        checks.number(op, "weights", w, low=0, open_low=True)
        for w in (weights or [1.0] * len(models))
    ]
    read = Fishers(op, fishers)

    def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
        shape, wide = tensors[0].shape, torch.promote_types(tensors[0].dtype, torch.float32)
        factors = [torch.full(shape, share, dtype=wide) for share in shares]
        if name in read:
            found = [f.to(wide) for f in read(name, shape)]
            largest = torch.stack(found).amax(0)  # divided by it first: nothing under- or overflows
            factors = [
                torch.where(largest > 0, factor * (f / largest), factor)
                for f, factor in zip(found, factors, strict=True)
            ]
        total = sum(factor * t.to(wide) for factor, t in zip(factors, tensors, strict=True))
        return torch.as_tensor(total / sum(factors)).to(tensors[0].dtype)

    named = {f"models[{k}]": model for k, model in enumerate(models)}
    facts = {"merge": "fisher_average", "weights": shares, "missing": missing}
    lacking = None if missing == "mean" else read.check
    return _merge(op, named, combine, output, facts, others_of=0, progress=progress, check=lacking)


def _merge(
    op: str,
    models: Mapping[str, Model],
    combine: Combine,
    output: str | os.PathLike[str] | None,
    facts: Mapping[str, Any],
    *,
    others_of: int,
    progress: bool,
    check: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Tensor] | Path:
    checkpoints = [Checkpoint(op, argument, model) for argument, model in models.items()]
    (name_of_first, first), *rest = zip(models, checkpoints, strict=True)
    differences = [
        line
        for argument, other in rest
        for line in first.differences(name_of_first, argument, other)
    ]
    if differences:
        raise ValueError(
            f"{op}: {' and '.join(models)} are no weights of one architecture:\n  "
            + "\n  ".join(differences[:20])
            + (f"\n  and {len(differences) - 20} more" if len(differences) > 20 else "")
        )
    if check is not None:
        check([name for name in first if first.spec(name)[0].is_floating_point])

    def merged(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensors = [checkpoint.tensor(name) for checkpoint in checkpoints]
            if tensors[0].is_floating_point():
                yield name, combine(name, tensors)
            elif all(torch.equal(tensors[0], t) for t in tensors[1:]):
                yield name, tensors[0].clone()
            else:
                raise ValueError(
                    f"{op}: {name}: expected equal values, since {tensors[0].dtype} tensors have "
                    "no average, got different ones"
                )

    with torch.no_grad():
        if output is None:
            return dict(merged([*first]))
        return write(op, output, first, merged, checkpoints[others_of], facts, progress)
