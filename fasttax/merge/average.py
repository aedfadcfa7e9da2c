"""Models averaged weight by weight, streamed over safetensors.

One tensor of each model in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.merge import alphas
from fasttax.merge.alphas import Alpha
from fasttax.merge.fishers import Fishers
from fasttax.merge.models import Models
from fasttax.merge.output import write

Model = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module
Fisher = str | os.PathLike[str] | Mapping[str, Tensor]
Combine = Callable[[str, Sequence[Tensor]], Tensor]

BLOCK = 1 << 18  # values of each tensor that are averaged at a time: 2 MB in float64
MISSING = ("error", "mean")
NORMS = ("l2",)


@overload
def linear(
    base: Model, aligned: Model, alpha: Alpha, *, output: None = None, progress: bool = True
) -> dict[str, Tensor]: ...
@overload
def linear(
    base: Model,
    aligned: Model,
    alpha: Alpha,
    *,
    output: str | os.PathLike[str],
    progress: bool = True,
) -> Path: ...
def linear(
    base: Model,
    aligned: Model,
    alpha: Alpha,
    *,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor] | Path:
    """(1 - alpha) base + alpha aligned, weight by weight: how much of the alignment to keep.

    On the line between a model and its aligned descendant the capability that alignment cost comes
    back faster than the alignment goes (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903; for RLHF
    Lin et al. 2024, arXiv:2309.06256).

    Args:
        base: a safetensors file, a folder of them as transformers saves it (with its index, if
            there are several), a mapping of name to tensor, or a module.
        aligned: any of these, of the same names and shapes.
        alpha: finite; 0 is base and 1 is aligned, to the bit. Values outside [0, 1] extrapolate.
            Or one for each pattern of names, {"*.layers.0.*": 0.2, "*.mlp.*": 0.5, "*": 0.8}: `*`
            stands for any text, the first pattern that fits a name decides, and every tensor must
            have one. Layers forget differently (Lin et al. average them differently, too).
        output: a new `.safetensors` file, or a new folder, which gets base's files of weights and
            aligned's other files (config, tokenizer; base's where aligned is no folder), so that
            transformers loads it. Written whole or not at all.
        progress: a bar on a terminal.

    Names may differ by what wrappers put into them (DDP's `module.`, torch.compile's `_orig_mod.`,
    PEFT's `base_model.model.`), by transformers' own conversion between a checkpoint and the model
    in memory (fused experts), or by a second name of a tied weight. Counters (0-d integers, as
    batch norm's num_batches_tracked) are base's.

    Returns:
        The weights by base's names, or with `output` its path. Each in base's dtype, computed in
        float64, and to the bit as it is where both have the same; a folder's config.json says that
        dtype.

    Raises:
        ValueError: names, shapes or kinds differ (all differences are listed); other integer
            tensors have different values; factors of adapters (LoRA) do, whose mean is no factor of
            the mean update; a pattern decides for no tensor, or a tensor has none.
        FileExistsError: output is there already.

    Example:
        >>> merged = fasttax.merge.linear(base, model, 0.6)
        >>> model.load_state_dict(merged)
        <All keys matched successfully>
    """
    op = "merge.linear"
    given = alphas.checked(op, alpha)
    facts = {"merge": "linear", "alpha": given}
    with closing(Models(op, {"base": base, "aligned": aligned})) as models:
        shares = alphas.by_name(op, given, models)

        def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
            (first, second), share = tensors, shares[name]
            if share in (0, 1):
                return (first, second)[int(share)].to(first.dtype)
            return _by_blocks(lambda a, b: (1 - share) * a + share * b, tensors)

        if {*shares.values()} not in ({0.0}, {1.0}):
            models.refuse_factors()
        return _merge(models, combine, output, facts, others_of=1, progress=progress)


@overload
def fisher_average(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    missing: str = "error",
    floor: float = 0.0,
    normalize: str | None = None,
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
    floor: float = 0.0,
    normalize: str | None = None,
    output: str | os.PathLike[str],
    progress: bool = True,
) -> Path: ...
def fisher_average(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    missing: str = "error",
    floor: float = 0.0,
    normalize: str | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor] | Path:
    """The mean of weights by their Fishers: sum_k w_k F_k theta_k / sum_k w_k F_k, elementwise.

    Each weight is mostly as the models have it for which it matters.

    The mode of the product of the models' Laplace approximations (Matena & Raffel 2022,
    arXiv:2111.09832). Where every F_k is 0 the plain weighted mean.

    Args:
        models: two or more, each as for `linear`.
        fishers: one for each model: a FisherEstimate, its file or sharded folder, or a mapping of
            name to tensor; finite and >= 0. "mean"-normalised estimates count models alike, "sum"
            ones by their numbers of examples. Names may differ from the models' as for `linear`; a
            tied weight is averaged once, under all of its names, by the Fisher of one.
        weights: one for each model, finite and > 0; 1 by default.
        missing: what to do with a floating-point tensor that some Fisher lacks: "error", or its
            plain weighted "mean".
        floor: Fishers below it are raised to it, before `normalize`. Where only one model has a
            Fisher, be it 1e-30, the mean is that model's weight alone; a floor makes it a plain
            mean there. Matena & Raffel take 1e-6. Off by default: that number means something on
            their scale only, and the Fishers of a large model lie below it almost everywhere, so
            that it would make a plain mean of all without a word.
        normalize: "l2" divides each model's Fisher by its Euclidean norm over all parameters, as
            Matena & Raffel do: models then count alike whatever the size of their gradients. None,
            the default, leaves the posterior that the mean is the mode of: a model that is surer,
            or has seen more ("sum"-normalised), counts for more.
        output: as for `linear`; other files come from the first model.
        progress: as for `linear`.

    Returns:
        The weights by name, or with `output` its path. Each in the first model's dtype, computed in
        float64, and to the bit as it is where all have the same.

    Raises:
        ValueError: the numbers of models, fishers and weights differ; names or shapes differ, as
            for `linear`; a Fisher is negative or not finite, or its names are none of the models'.
        FileExistsError: output is there already.

    Example:
        >>> merged = fasttax.merge.fisher_average([base, model], [base_fisher, fisher])
        >>> model.load_state_dict(merged)
        <All keys matched successfully>
    """
    op = "merge.fisher_average"
    checks.choice(op, "missing", missing, MISSING)
    floor = checks.number(op, "floor", floor, low=0)
    if normalize is not None:
        checks.choice(op, "normalize", normalize, NORMS)
    models, fishers = _listed(op, "models", models), _listed(op, "fishers", fishers)
    shares = _shares(op, models, fishers, weights)
    named = {f"models[{k}]": model for k, model in enumerate(models)}
    facts = {
        "merge": "fisher_average",
        "weights": shares,
        "missing": missing,
        "floor": floor,
        "normalize": normalize,
    }
    with closing(Models(op, named)) as each:
        each.refuse_factors()
        with closing(Fishers(op, fishers, each, missing, floor)) as found:
            scales = [1.0] * len(shares)
            if normalize is not None:
                scales = [1 / norm for norm in found.norms()]

            def combine(name: str, tensors: Sequence[Tensor]) -> Tensor:
                fishers = found.of(name, tensors[0].shape) if name in found else []

                def mean(*parts: Tensor) -> Tensor:
                    values, of_fishers = parts[: len(tensors)], parts[len(tensors) :]
                    factors = _factors(values[0], of_fishers, shares, scales)
                    products = [f * v for f, v in zip(factors, values, strict=True)]
                    return torch.stack(products).sum(0) / torch.stack(factors).sum(0)

                return _by_blocks(mean, tensors, fishers)

            return _merge(each, combine, output, facts, others_of=0, progress=progress)


def _listed(op: str, argument: str, given: Any) -> list[Any]:
    """A list's items, or another iterable's; one model or Fisher alone is none."""
    alone = isinstance(given, (nn.Module, Mapping, str)) and not isinstance(given, nn.ModuleList)
    if alone or not isinstance(given, Iterable):
        raise checks.fail(op, argument, "a list, one for each model", given, error=TypeError)
    return [*given]


def _shares(
    op: str, models: Sequence[Model], fishers: Sequence[Fisher], weights: Sequence[float] | None
) -> list[float]:
    """The models' weights, once there is one Fisher and one weight for each model."""
    if len(models) < 2:
        raise checks.fail(op, "models", "two or more", f"{len(models)}")
    shares = [1.0] * len(models) if weights is None else weights
    for argument, values in (("fishers", fishers), ("weights", shares)):
        if len(values) != len(models):
            raise checks.fail(
                op, argument, f"one for each of the {len(models)} models", f"{len(values)}"
            )
    return [checks.number(op, "weights", share, low=0, open_low=True) for share in shares]


def _factors(
    like: Tensor, fishers: Sequence[Tensor], shares: Sequence[float], scales: Sequence[float]
) -> list[Tensor]:
    """Share * scale * Fisher, one a model, but for a factor; the share where every Fisher is 0.

    An element's Fishers are divided by their largest, shares and scales by theirs: nothing
    overflows, and some factor is > 0.
    """
    plain = [torch.full_like(like, share / max(shares)) for share in shares]
    if not fishers:
        return plain
    largest = torch.stack([*fishers]).amax(0)
    return [
        torch.where(largest > 0, factor * (scale / max(scales)) * (f / largest), factor)
        for factor, scale, f in zip(plain, scales, fishers, strict=True)
    ]


def _by_blocks(
    mean: Callable[..., Tensor], tensors: Sequence[Tensor], fishers: Sequence[Tensor] = ()
) -> Tensor:
    """`mean` of the tensors' values and the Fishers', in float64, a block of them at a time.

    In the first tensor's dtype. What is equal in all of them stays so, to the bit.
    """
    flat = [t.reshape(-1) for t in (*tensors, *fishers)]
    out = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device="cpu")
    for start in range(0, out.numel(), BLOCK):
        parts = [t[start : start + BLOCK].double() for t in flat]
        first, *others = parts[: len(tensors)]
        alike = torch.stack([first == other for other in others]).all(0)
        out.view(-1)[start : start + BLOCK] = torch.where(alike, first, mean(*parts))
    return out


def _merge(
    models: Models,
    combine: Combine,
    output: str | os.PathLike[str] | None,
    facts: Mapping[str, Any],
    *,
    others_of: int,
    progress: bool,
) -> dict[str, Tensor] | Path:
    """The weights that `combine` makes, in memory or written.

    `facts` go into the metadata of what is written, with the other files of the model numbered
    `others_of`.
    """

    def merged(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensors = models.tensors(name)
            if tensors[0].is_floating_point():
                yield name, combine(name, tensors)
            else:
                yield name, _the_same(models.op, name, tensors)

    with torch.no_grad():
        if output is None:
            return dict(merged([*models.first]))
        folders = [each for each in models.weights if each.folder is not None]
        others = models.weights[others_of]
        if others.folder is None and folders:
            others = folders[0]
        return write(models.op, output, models.first, merged, others, facts, progress)


def _the_same(op: str, name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Integers, which must agree; a counter is the first model's."""
    first = tensors[0]
    if first.dim() and not all(torch.equal(first, t) for t in tensors[1:]):
        raise ValueError(
            f"{op}: {name}: expected equal values, since {first.dtype} tensors have no average, "
            "got different ones; convert them to floats, or give both models the same"
        )
    return first.clone()
