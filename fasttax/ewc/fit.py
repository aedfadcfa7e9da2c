"""Fitting a Fisher to a model: names, shapes, hashes, values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, dtensor, inner
from fasttax._base.hashes import same_weights, weights_hash
from fasttax.ewc import adapters, lora
from fasttax.ewc.factors import is_packed, weight_shape
from fasttax.ewc.names import Names, renamer
from fasttax.ewc.watch import FSDP1, Watch
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.factor import problem_of
from fasttax.fisher.kronecker import KroneckerEstimate

SHOWN = 20  # differences that an error lists


@dataclass
class Target:
    """A parameter that the Fisher names.

    The parameter itself, or the LoRA layer whose update moves it.
    """

    given: str  # the Fisher's name
    name: str  # the model's, without what wrappers insert
    whole: str  # the model's
    theta: Tensor
    lora: nn.Module | None

    @property
    def of_the_adapted(self) -> bool:
        """Whether the Fisher is that of a model under adapters, as its names tell."""
        return "base_layer" in self.given.split(".")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as floats where it lies packed in 4 bits."""
        return tuple(self.theta.shape) if self.lora is None else weight_shape(self.lora)


def refuse_layout(op: str, model: nn.Module) -> None:
    """An error where parameters do not hold their own values: DeepSpeed ZeRO-3, FSDP1."""
    for p in model.parameters():
        if hasattr(p, "ds_id") and p.numel() == 0:
            raise checks.fail(
                op,
                "model",
                "parameters that hold their values",
                "DeepSpeed ZeRO-3 placeholders of size 0: outside its module's forward a "
                "parameter lies scattered over the ranks, so neither a penalty nor a gradient of "
                "it can be taken here",
                "make it while they are whole, `with deepspeed.zero.GatheredParameters("
                "list(model.parameters())):`, for fasttax.integrations.deepspeed.attach(engine, "
                "ewc) or attach(trainer, ewc=ewc); or use FSDP2 (fully_shard)",
            )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise checks.fail(op, "model", *FSDP1)


def differences(op: str, what: str, found: Sequence[str]) -> None:
    """An error that lists what does not fit, if anything."""
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"{op}: {what}: expected names and shapes of the model's parameters, got {len(found)} "
            "differences:\n  "
            + "\n  ".join(found[:SHOWN])
            + more
            + "\nestimate the Fisher on this model, or drop or rename the entries "
            "(rename={old: new})"
        )


def unlike(held: Mapping[str, Any], given: Mapping[str, Any], has: str) -> list[str]:
    """How names and shapes that are given differ from those held; `has` says whose those are."""
    own = {name: tuple(t.shape) for name, t in held.items()}
    theirs = {name: tuple(t.shape) for name, t in given.items()}
    return [
        *(f"{name}: not held here" for name in theirs if name not in own),
        *(f"{name}: missing" for name in own if name not in theirs),
        *(
            f"{name}: shape {shape}, {has} {own[name]}"
            for name, shape in theirs.items()
            if name in own and shape != own[name]
        ),
    ]


def match(
    op: str, model: nn.Module, shapes: Mapping[str, Any], rename: Mapping[str, str] | None
) -> list[Target]:
    """What of the model the Fisher names, tied weights once, after all checks.

    `shapes` maps its names to tensors.
    """
    refuse_layout(op, model)
    names = Names(model)
    new = renamer(op, rename, shapes)
    adapters.refuse_prompts(op, model, names, map(new, shapes))
    targets: list[Target] = []
    wrong: list[str] = []
    first: dict[int, str] = {}
    for given in shapes:
        name = new(given)
        whole = names.find(name)
        if whole is None:
            renamed = f" (renamed to {name})" if name != given else ""
            wrong.append(f"{given}: {names.why_not(name)}{renamed}")
            continue
        theta = names.parameters[whole]
        layer = adapters.lora_layer(op, model, names, whole)
        target = Target(given, names.short(whole), whole, theta, layer)
        _refuse_trainable_base(op, whole, target)
        found = tuple(shapes[given].shape)
        if found != target.shape:
            wrong.append(f"{given}: shape {found}, the model has {target.shape}")
            continue
        _refuse_unholdable(op, whole, target)
        _refuse_twice(op, first.setdefault(id(theta), whole), whole)
        targets.append(target)
    differences(op, "fisher", wrong)
    _refuse_free_copies(op, names, targets)
    _refuse_nothing(op, targets)
    return targets


def facts_of(metadata: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """A Fisher's metadata, the weights that it says lie as (in, out) by the model's names."""
    if "turned" not in metadata:
        return dict(metadata)
    turned = [t.name for t in targets if t.given in metadata["turned"]]
    return {**metadata, "turned": turned}


def watch_over(model: nn.Module, targets: Sequence[Target]) -> Watch:
    """What sees whether the targets stay the model's."""
    return Watch(model, {t.whole: t.theta for t in targets})


def _refuse_nothing(op: str, targets: list[Target]) -> None:
    if not targets:
        raise checks.fail(op, "fisher", "at least one parameter", "an empty mapping")


def _refuse_twice(op: str, first: str, name: str) -> None:
    if first != name:
        raise checks.fail(
            op,
            "fisher",
            "tied weights once",
            f"{first} and {name}, one parameter",
            "drop one of the two",
        )


def _refuse_free_copies(op: str, names: Names, targets: Sequence[Target]) -> None:
    """Refuses a tied weight, one of whose uses is trained as a copy that nothing holds."""
    held = {id(t.theta) for t in targets}
    for t in targets:
        for copy, theta in names.copies_of(t.whole).items():
            if id(theta) not in held:
                use = names.short(copy)
                raise checks.fail(
                    op,
                    "fisher",
                    f"every use of {t.given}, which the model ties",
                    f"one without {use}, which PEFT trains as a copy of its own (modules_to_save), "
                    "and which would move free",
                    f"name the copy too, fisher={{**fisher, {use!r}: fisher[{t.given!r}]}}, or "
                    "train the tied weight itself",
                )


def _refuse_trainable_base(op: str, name: str, target: Target) -> None:
    if target.lora is not None and target.theta.requires_grad:
        raise checks.fail(
            op,
            "model",
            "the base weight under a LoRA update to be frozen",
            f"a trainable {name}",
            "freeze it, or merge the adapter",
        )


def _refuse_unholdable(op: str, name: str, target: Target) -> None:
    checks.has_memory(op, name, target.theta)
    if target.lora is not None:
        lora.refuse_unsupported(op, name, target.lora)
        return
    coded = inner.lies_in_others(target.theta) or inner.in_four_bits(target.theta)
    if coded or not target.theta.is_floating_point():
        kind = f" and class {type(target.theta).__name__}" if coded else ""
        raise checks.fail(
            op,
            "model",
            "floating-point parameters",
            f"{name} of dtype {target.theta.dtype}{kind}",
            "leave it out of the Fisher",
        )


def refuse_wider_anchor(
    op: str, dtype: torch.dtype | str | None, targets: Sequence[Target]
) -> None:
    """An error where anchors are to be float64 beside parameters of less, in which ops compute."""
    narrow = [t for t in targets if t.lora is None and t.theta.dtype != torch.float64]
    if dtype == torch.float64 and narrow:
        raise checks.fail(
            op,
            "anchor_dtype",
            f"float32 or less for {narrow[0].name}, which is {narrow[0].theta.dtype}",
            "torch.float64",
            "leave it out: an anchor is then kept in its parameter's own dtype, float64 too",
        )


def pick_anchor(
    op: str, anchor: Mapping[str, Tensor], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The given anchor by the model's names; it may use those or the Fisher's.

    LoRA's base weights are their own anchor.

    Raises:
        TypeError: it is no mapping, or a value no tensor.
        ValueError: a name is missing, a shape another, or a value NaN or infinite.
    """
    if not isinstance(anchor, Mapping):
        expected = "a mapping of parameter names to tensors"
        way_out = "read a file with safetensors.torch.load_file, a model with model.state_dict()"
        raise checks.fail(op, "anchor", expected, anchor, way_out, TypeError)
    out, wrong = {}, []
    for t in targets:
        value = next((anchor[n] for n in (t.given, t.name) if n in anchor), None)
        if value is None:
            if t.lora is None:
                wrong.append(f"{t.name}: missing")
            continue
        if not isinstance(value, Tensor):
            raise checks.fail(op, f"anchor[{t.name!r}]", "a torch.Tensor", value, error=TypeError)
        if tuple(value.shape) != t.shape:
            wrong.append(f"{t.name}: shape {tuple(value.shape)}, the model has {t.shape}")
        else:
            out[t.name] = value
    differences(op, "anchor", wrong)
    bad = [n for n, t in out.items() if not _is_finite(dtensor.whole(t.detach()))]
    if bad:
        _refuse_values(op, "anchor", "finite values", bad, "the penalty of such is NaN")
    return out


def _is_finite(t: Tensor) -> bool:
    if t.is_floating_point() and t.element_size() == 1:
        t = t.float()  # torch.isfinite knows no float8
    return bool(torch.isfinite(t).all())


def check_hash(
    op: str, fisher: Mapping[str, Tensor], targets: Sequence[Target], anchor: Mapping[str, Tensor]
) -> None:
    """Compares the Fisher's hash with the anchor's; packed weights have none.

    Raises:
        ValueError: the Fisher was estimated at other weights.
    """
    expected = getattr(fisher, "metadata", {}).get("model_hash")
    if expected is None or any(is_packed(t.theta) for t in targets):
        return
    found = weights_hash((t.given, dtensor.whole(anchor.get(t.name, t.theta))) for t in targets)
    if not same_weights(expected, found):
        unchecked = "pass dict(fisher)"
        if isinstance(fisher, KroneckerEstimate):
            unchecked = "drop its metadata['model_hash']"
        raise ValueError(
            f"{op}: fisher: expected one estimated at the anchor's weights (hash {found}), got one "
            f"estimated at others (hash {expected}); "
            f"estimate it on this model, pass those weights as anchor=, or {unchecked} to use it "
            "all the same"
        )


@dataclass
class Recipe:
    """What is done to Fisher values before they are stored, after a survey of all of them.

    `copies`: they are the caller's own tensors, which may be written into later.
    """

    bounds: tuple[float, float] | None = None
    divisor: float = 1.0
    copies: bool = False

    def __call__(self, fisher: Tensor) -> Tensor:
        """Clamped, then divided."""
        fisher = fisher.detach()
        if self.bounds is not None:
            fisher = fisher.clamp(*self.bounds)
        elif self.divisor == 1.0 and self.copies:
            fisher = fisher.clone()
        return fisher if self.divisor == 1.0 else fisher / self.divisor

    def sides(self, sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Kronecker factors, whose product is divided; there is no clamp of them."""
        left, right = sides
        return left / self.divisor, right


def _bounds(op: str, clamp: float | Sequence[float] | None) -> tuple[float, float] | None:
    if clamp is None:
        return None
    ends = tuple(clamp) if isinstance(clamp, Sequence) else (0.0, clamp)
    if len(ends) != 2:
        raise checks.fail(op, "clamp", "a number or a pair (low, high)", clamp)
    low, high = (checks.number(op, "clamp", bound, low=0) for bound in ends)
    if low > high:
        raise checks.fail(op, "clamp", "low <= high", clamp)
    return low, high


def survey(
    op: str,
    fisher: Mapping[str, Tensor],
    names: Iterable[str],
    clamp: float | Sequence[float] | None,
    normalize: str | None,
) -> Recipe:
    """Looks at every value once, a tensor at a time."""
    recipe = Recipe(_bounds(op, clamp))
    recipe.copies = not isinstance(fisher, (FisherEstimate, KroneckerEstimate))
    bad, count, total, most = [], 0, 0.0, 0.0
    for name in names:
        _refuse_factors(op, fisher, name)
        f = dtensor.whole(fisher[name]).detach()
        if not bool((torch.isfinite(f) & (f >= 0)).all()):
            bad.append(name)
        elif normalize is not None and f.numel():
            f = recipe(f)
            count += f.numel()
            total += float(f.sum(dtype=torch.float64))
            most = max(most, float(f.max()))
    if bad:
        way_out = "estimate it again in float32 and on finite losses"
        _refuse_values(op, "fisher", "finite values >= 0", bad, way_out)
    if normalize is not None:
        recipe.divisor = {"mean": total / max(count, 1), "max": most}[normalize]
        if recipe.divisor == 0:
            raise checks.fail(
                op,
                "normalize",
                "a Fisher that is not 0 everywhere",
                repr(normalize),
                "pass normalize=None",
            )
    return recipe


def _refuse_values(op: str, argument: str, expected: str, bad: Sequence[str], rest: str) -> None:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise checks.fail(op, argument, expected, "others in " + ", ".join(bad[:5]) + more, rest)


def _refuse_factors(op: str, fisher: Mapping[str, Tensor], name: str) -> None:
    """An error where factors were written into since their estimate was made, and are none."""
    if not isinstance(fisher, KroneckerEstimate) or name not in fisher.factors:
        return
    for which, t in zip("AG", fisher.factors[name], strict=True):
        problem = problem_of(t)
        if problem:
            raise checks.fail(
                op,
                f"fisher.factors[{name!r}].{which}",
                "a symmetric matrix, its blocks or diagonal, of finite values",
                problem,
                "estimate it again, or make a KroneckerEstimate of your own factors",
            )


def shapes_of(fisher: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Names to things with a shape; a FisherEstimate's without decoding it."""
    if isinstance(fisher, KroneckerEstimate):
        return {name: shaped(fisher.shape(name)) for name in fisher}
    if not isinstance(fisher, FisherEstimate):
        return fisher
    return {name: fisher.stored(name).values for name in fisher}


def shaped(shape: Sequence[int]) -> Tensor:
    """A tensor of a shape, and nothing else."""
    return torch.empty(tuple(shape), device="meta")
