"""Fitting a Fisher to a model: names, shapes, hashes, values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, dtensor, files
from fasttax.ewc import lora

# What wrappers put into parameters' names: PEFT, torch.compile, DDP, activation checkpointing.
_INSERTED = re.compile(
    r"^base_model\.model\.|(?<![^.])(?:base_layer|_orig_mod|_checkpoint_wrapped_module)\.|\.modules_to_save\.[^.]+(?=\.)"
)


@dataclass
class Target:
    """A parameter that the Fisher names.

    The parameter itself, or the LoRA layer whose update moves it.
    """

    given: str  # the Fisher's name
    name: str  # the model's, without what wrappers insert
    theta: Tensor
    lora: nn.Module | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.theta.shape) if self.lora is None else lora.weight_shape(self.lora)


def canonical(name: str) -> str:
    return _INSERTED.sub("", name)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def refuse_layout(op: str, model: nn.Module) -> None:
    for p in model.parameters():
        if hasattr(p, "ds_id") and p.numel() == 0:
            raise checks.fail(
                op,
                "model",
                "parameters that hold their values",
                "DeepSpeed ZeRO-3 placeholders of size 0: outside its module's forward a "
                "parameter lies scattered over the ranks, so neither a penalty nor a gradient of "
                "it can be taken here",
                "use ZeRO-1 or 2 with `loss + ewc.penalty()`, or FSDP2 (fully_shard), whose shards "
                "EWC works on",
            )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise checks.fail(
            op,
            "model",
            "parameters under their own names",
            "FSDP1's flattened ones",
            "use FSDP2 (torch.distributed.fsdp.fully_shard)",
        )


def _renamer(
    op: str, rename: Mapping[str, str] | None, names: Iterable[str]
) -> Callable[[str], str]:
    """Old name -> new name.

    A key is a parameter's whole name, or a module's, which stands for all names below it; the
    longest that fits counts.
    """
    if rename is None:
        return lambda name: name
    if not isinstance(rename, Mapping):
        raise checks.fail(
            op, "rename", "a mapping of the Fisher's names to the model's", rename, error=TypeError
        )

    def key_of(name: str) -> str | None:
        fits = [key for key in rename if name == key or name.startswith(key + ".")]
        return max(fits, key=len, default=None)

    unused = sorted(set(rename) - {key_of(name) for name in names})
    if unused:
        raise checks.fail(
            op,
            "rename",
            "names that the Fisher has",
            ", ".join(map(repr, unused[:5])) + " without one",
            "drop or correct them",
        )

    def new(name: str) -> str:
        key = key_of(name)
        return name if key is None else rename[key] + name[len(key) :]

    return new


def differences(op: str, what: str, found: Sequence[str]) -> None:
    if found:
        more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(
            f"{op}: {what}: expected names and shapes of the model's parameters, got {len(found)} "
            "differences:\n  "
            + "\n  ".join(found[:20])
            + more
            + "\nestimate the Fisher on this model, or drop or rename the entries (rename={old: new})"
        )


def match(
    op: str, model: nn.Module, shapes: Mapping[str, Any], rename: Mapping[str, str] | None
) -> list[Target]:
    """What of the model the Fisher names, tied weights once, after all checks.

    `shapes` maps its names to tensors.
    """
    model = unwrap(model)
    refuse_layout(op, model)
    every: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if ".original_module." not in name or ".modules_to_save." in name:
            every[name] = every[canonical(name)] = p
    if not len(shapes):
        raise checks.fail(op, "fisher", "at least one parameter", "an empty mapping")
    adapted = {canonical(name): m for name, m in lora.layers(model).items()}
    new = _renamer(op, rename, shapes)
    targets, wrong = [], []
    seen: dict[int, str] = {}
    for given in shapes:
        name = new(given)
        if name not in every:
            wrong.append(
                f"{given}: not a parameter of the model"
                + (f" (renamed to {name})" if name != given else "")
            )
            continue
        theta, plain = every[name], canonical(name)
        module = adapted.get(plain) if not theta.requires_grad else None
        if plain in adapted and theta.requires_grad:
            raise checks.fail(
                op,
                "model",
                "the base weight under a LoRA update to be frozen",
                f"a trainable {name}",
                "freeze it, or merge the adapter",
            )
        target = Target(given, plain, theta, module)
        if tuple(shapes[given].shape) != target.shape:
            wrong.append(
                f"{given}: shape {tuple(shapes[given].shape)}, the model has {target.shape}"
            )
            continue
        if module is not None:
            lora.refuse_unsupported(op, name, module)
        elif not theta.is_floating_point():
            raise checks.fail(
                op,
                "model",
                "floating-point parameters",
                f"{name} of dtype {theta.dtype}",
                "leave it out of the Fisher",
            )
        if id(theta) in seen:
            raise checks.fail(
                op,
                "fisher",
                "tied weights once",
                f"{seen[id(theta)]} and {name}, one parameter",
                "drop one of the two",
            )
        seen[id(theta)] = name
        targets.append(target)
    differences(op, "fisher", wrong)
    return targets


def pick_anchor(
    op: str, anchor: Mapping[str, Tensor], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The given anchor by the model's names; it may use those or the Fisher's.

    LoRA's base weights are their own anchor.
    """
    out, wrong = {}, []
    for t in targets:
        value = next((anchor[n] for n in (t.given, t.name) if n in anchor), None)
        if value is None:
            if t.lora is None:
                wrong.append(f"{t.name}: missing")
        elif tuple(value.shape) != t.shape:
            wrong.append(f"{t.name}: shape {tuple(value.shape)}, the model has {t.shape}")
        else:
            out[t.name] = value
    differences(op, "anchor", wrong)
    return out


def check_hash(
    op: str, fisher: Mapping[str, Tensor], targets: Sequence[Target], anchor: Mapping[str, Tensor]
) -> None:
    """That the Fisher was estimated at the anchor, by the hash in its metadata.

    Quantised base weights have none.
    """
    expected = getattr(fisher, "metadata", {}).get("model_hash")
    if expected is None or not all(t.theta.is_floating_point() for t in targets):
        return
    found = files.weights_hash(
        (t.given, dtensor.whole(anchor.get(t.name, t.theta))) for t in targets
    )
    if expected != found:
        raise ValueError(
            f"{op}: fisher: expected one estimated at the anchor's weights (hash {found}), got one "
            f"estimated at others (hash {expected}); "
            "estimate it on this model, pass those weights as anchor=, or pass dict(fisher) to use "
            "it all the same"
        )


@dataclass
class Recipe:
    """What is done to Fisher values before they are stored, after a survey of all of them."""

    bounds: tuple[float, float] | None = None
    divisor: float = 1.0

    def __call__(self, fisher: Tensor) -> Tensor:
        fisher = fisher.detach() if self.bounds is None else fisher.detach().clamp(*self.bounds)
        return fisher if self.divisor == 1.0 else fisher / self.divisor


def survey(
    op: str,
    fisher: Mapping[str, Tensor],
    names: Iterable[str],
    clamp: float | Sequence[float] | None,
    normalize: str | None,
) -> Recipe:
    """Looks at every value once, a tensor at a time."""
    recipe = Recipe()
    if clamp is not None:
        pair = (0.0, clamp) if not isinstance(clamp, Sequence) else tuple(clamp)
        if len(pair) != 2:
            raise checks.fail(op, "clamp", "a number or a pair (low, high)", clamp)
        low, high = (checks.number(op, "clamp", bound, low=0) for bound in pair)
        if low > high:
            raise checks.fail(op, "clamp", "low <= high", clamp)
        recipe.bounds = (low, high)
    bad, count, total, most = [], 0, 0.0, 0.0
    for name in names:
        f = dtensor.whole(fisher[name]).detach()
        if f.numel() and not bool(torch.isfinite(f).all() & (f >= 0).all()):
            bad.append(name)
        elif normalize is not None and f.numel():
            f = recipe(f)
            count, total, most = (
                count + f.numel(),
                total + float(f.sum(dtype=torch.float64)),
                max(most, float(f.max())),
            )
    if bad:
        raise checks.fail(
            op,
            "fisher",
            "finite values >= 0",
            "others in "
            + ", ".join(bad[:5])
            + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""),
            "estimate it again in float32 and on finite losses",
        )
    if normalize is not None:
        recipe.divisor = total / count if normalize == "mean" and count else most
        if recipe.divisor == 0:
            raise checks.fail(
                op,
                "normalize",
                "a Fisher that is not 0 everywhere",
                repr(normalize),
                "pass normalize=None",
            )
    return recipe
