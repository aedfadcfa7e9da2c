"""Which tap covers which parameter of a model, or the error that says which cannot be covered and
what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.fisher.local import ModuleTap, RoutingBlock
from fasttax.fisher.sums import Slot, Sums
from fasttax.fisher.taps import Conv1DTap, ConvTap, ElementwiseTap, EmbeddingTap, LinearTap, Tap

TIED = ("exact", "sum_of_squares")
LORA = ("factors", "delta_w")
Filter = Callable[[str, Tensor], bool] | Iterable[str] | None


def select(op: str, model: nn.Module, params: Filter) -> dict[str, nn.Parameter]:
    """The parameters asked for: all trainable ones, those a predicate accepts, or those that match
    names or patterns.
    """
    every = dict(model.named_parameters())
    if params is None:
        chosen = {n: p for n, p in every.items() if p.requires_grad}
    elif callable(params):
        chosen = {n: p for n, p in every.items() if params(n, p)}
    else:
        patterns = [params] if isinstance(params, str) else list(params)
        chosen = {
            n: p for n, p in every.items() if any(fnmatchcase(n, pattern) for pattern in patterns)
        }
        unused = [
            pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in every)
        ]
        if unused:
            raise checks.fail(
                op,
                "params",
                "names or patterns (with *) of the model's parameters",
                f"{unused[0]!r}, which matches none",
                "see [n for n, _ in model.named_parameters()]",
            )
    if not chosen:
        raise checks.fail(
            op,
            "params",
            "at least one parameter",
            "none",
            "unfreeze some (requires_grad_(True)) or name them in params=",
        )
    return chosen


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    by_name = (
        isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()
    )
    others = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    return (
        by_name
        and set(own) <= {"weight", "bias"}
        and all(p.dim() == 1 for p in own.values())
        and not isinstance(module, others)
    )


def kind_of(module: nn.Module) -> type[Tap] | None:
    """The tap for a module's own parameters; None where its class says nothing."""
    forward = type(module).forward
    if forward is nn.Linear.forward or (
        isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")
    ):
        return LinearTap
    if isinstance(module, nn.Embedding):
        return (
            None
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse
            else EmbeddingTap
        )
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return Conv1DTap
    if (
        forward in (nn.Conv1d.forward, nn.Conv2d.forward)
        and isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.groups == 1
    ):
        return ConvTap
    leaf = not any(True for _ in module.children())
    return ElementwiseTap if leaf and _is_norm(module) else None


def _local_problem(model: nn.Module, module: nn.Module) -> str | None:
    """Why a module cannot be differentiated on its own, example by example; None where it can."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return "batch statistics mix the examples (call model.eval())"
    if module is model:
        return "it belongs to the model itself"
    if isinstance(module, nn.Embedding):
        return "max_norm, scale_grad_by_freq or sparse"
    if any(True for _ in module.children()) and 2 * sum(
        p.numel() for p in module.parameters()
    ) > sum(p.numel() for p in model.parameters()):
        return "it holds most of the model"
    return None


def _opaque(model: nn.Module) -> dict[str, str]:
    """Modules whose children's weights are used without calling the children.

    Where -> the module that stands for them.
    """
    return {
        f"{where}.{inner}" if where else inner: where
        for where, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module is not model
        for inner, child in module.named_modules()
        if child is not module
    }


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for where, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and (
            hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A")
        ):
            yield where, module


def _base_shape(base: Any) -> torch.Size | None:
    """The weight's shape as the layer computes with it, whatever it is packed in."""
    kind = kind_of(base)
    if kind in (EmbeddingTap, Conv1DTap, ConvTap) or (
        kind is LinearTap and base.weight.is_floating_point()
    ):
        return base.weight.shape
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return torch.Size((base.out_features, base.in_features))
    return None


def delta_w(
    op: str, model: nn.Module, chosen: dict[str, nn.Parameter], sums: dict[str, Slot]
) -> dict[str, tuple[str, nn.Module, type[Tap]]]:
    """Takes the adapter factors out of `chosen` and puts the weights they add to into `sums`, by
    the base weight's name.

    Returns name -> (where, base module, tap): all that it needs are the base layer's input and
    output gradient.
    """
    found: dict[str, tuple[str, nn.Module, type[Tap]]] = {}
    for where, layer in _lora_layers(model):
        factors = [n for n in chosen if n.startswith(f"{where}.lora_")]
        if not factors:
            continue
        device, base_where = chosen[factors[0]].device, f"{where}.base_layer"
        shape = _base_shape(layer.base_layer)
        kind = kind_of(layer.base_layer) or LinearTap
        variants = getattr(layer, "use_dora", None) or {}
        additive = not any(variants.values() if isinstance(variants, dict) else [variants])
        if shape is None or not additive:
            raise checks.fail(
                op,
                "lora",
                "layers that compute base(x) + scale B A x with lora='delta_w'",
                f"{where} ({type(layer).__name__})",
                "leave it out with params=, or use lora='factors'",
            )
        for factor in factors:
            del chosen[factor]
        weight = getattr(layer.base_layer, "weight", None)
        name = f"{base_where}.weight"
        wide = isinstance(weight, Tensor) and weight.dtype == torch.float64
        users = sum(p is weight for m in model.modules() for p in m.parameters(recurse=False))
        same = (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.shape == shape
            and users == 1
        )
        sums[name] = Slot(
            shape, torch.float64 if wide else torch.float32, device, weight if same else None
        )
        found[name] = (base_where, layer.base_layer, kind)
        chosen.pop(name, None)
    if not found:
        raise checks.fail(
            op,
            "lora",
            "a model with LoRA layers among params with lora='delta_w'",
            "none",
            "use lora='factors' (the default), or params= that name the adapters",
        )
    return found


def _experts(model: nn.Module) -> dict[str, str]:
    """Blocks that hold a list of experts: the list's place -> the block's."""
    found = {}
    for where, module in model.named_modules():
        parent, _, last = where.rpartition(".")
        if (
            isinstance(module, (nn.ModuleList, nn.ModuleDict))
            and "expert" in last.lower()
            and where not in found
        ):
            block = model.get_submodule(parent)
            while (
                isinstance(block, (nn.ModuleList, nn.ModuleDict))
                or type(block).forward is nn.Module.forward
            ):
                parent = parent.rpartition(".")[0]
                block = model.get_submodule(parent)
            found[where] = parent
    return found


def plan(
    op: str,
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    extra: dict[str, tuple[str, nn.Module, type[Tap]]],
    sums: Sums,
) -> tuple[list[Tap], list[RoutingBlock]]:
    """One tap for each module that owns a chosen parameter, and the blocks that route tokens to
    experts.
    """
    by_id = {id(p): n for n, p in chosen.items()}
    owners: dict[str, list[tuple[str, nn.Module, str]]] = {n: [] for n in chosen}
    opaque = _opaque(model)
    for where, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) in by_id:
                stands = opaque.get(
                    where,
                    where.rpartition(".")[0]
                    if isinstance(module, (nn.ParameterDict, nn.ParameterList))
                    else None,
                )
                place = (
                    (where, module, own)
                    if stands is None
                    else (
                        stands,
                        model.get_submodule(stands),
                        f"{where}.{own}".removeprefix(f"{stands}."),
                    )
                )
                owners[by_id[id(p)]].append(place)
    problems, local = [], set()
    for name, uses in owners.items():
        if (
            len(uses) > 1
        ):  # an owner of children that has a rule's module below it holds the name only (BERT's decoder bias)
            ruled = [use for use in uses if kind_of(use[1]) is not None]
            uses[:] = (
                ruled
                if ruled
                and all(any(True for _ in use[1].children()) for use in uses if use not in ruled)
                else uses
            )
        for where, module, _ in uses:
            if kind_of(module) is None or where in opaque.values():
                problem = (
                    _local_problem(model, module)
                    if len(uses) == 1
                    else f"shared by {', '.join(at or 'the model' for at, _, _ in uses)}"
                )
                if not chosen[name].is_floating_point():
                    problem = f"dtype {chosen[name].dtype}"
                local.add(where)
                if problem is not None:
                    problems.append(
                        f"{name}: no exact rule for a parameter of {type(module).__name__}"
                        + (f" ({where})" if where else "")
                        + f": {problem}"
                    )
                    break
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{op}: params: {len(problems)} parameters cannot be covered:\n  "
            + "\n  ".join(problems[:10])
            + more
            + "\nleave them out with params=, or pass fallback='loop' (exact, one example at a time)"
        )
    names: dict[str, dict[str, str]] = {}
    modules: dict[str, tuple[nn.Module, type[Tap]]] = {}
    for name, uses in owners.items():
        for where, module, own in uses:
            names.setdefault(where, {})[own] = name
            modules[where] = (module, ModuleTap if where in local else kind_of(module) or ModuleTap)
    for name, (where, module, kind) in extra.items():
        names.setdefault(where, {})["weight"] = name
        modules[where] = (module, kind)
    taps = [kind(sums, module, where, names[where]) for where, (module, kind) in modules.items()]
    experts = _experts(model)
    for tap in taps:
        for name in tap.names.values():
            sums.taps.setdefault(name, []).append(tap)
            if any(tap.where.startswith(f"{place}.") for place in experts):
                sums.routed.add(name)
    blocks = sorted(
        {
            block
            for place, block in experts.items()
            if any(tap.where.startswith(f"{place}.") for tap in taps)
        }
    )
    outer = [b for b in blocks if not any(b.startswith(f"{o}.") for o in blocks if o != b)]
    return taps, [RoutingBlock(sums, model.get_submodule(b), b) for b in outer]
