"""Which tap covers which parameter of a model, or the error that says which cannot be covered and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fasttax import _checks
from fasttax._taps import Conv1DTap, ElementwiseTap, EmbeddingTap, LinearTap, Sink, Tap, TiedEmbeddingTap, TiedHeadTap

TIED = ("exact", "sum_of_squares")
Filter = Callable[[str, Tensor], bool] | Iterable[str] | None


def select(op: str, model: nn.Module, params: Filter) -> dict[str, nn.Parameter]:
    """The parameters asked for: all trainable ones, those a predicate accepts, or those that match names or patterns."""
    every = dict(model.named_parameters())
    if params is None:
        chosen = {n: p for n, p in every.items() if p.requires_grad}
    elif callable(params):
        chosen = {n: p for n, p in every.items() if params(n, p)}
    else:
        patterns = [params] if isinstance(params, str) else list(params)
        chosen = {n: p for n, p in every.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
        unused = [pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in every)]
        if unused:
            raise _checks.fail(op, "params", "names or patterns (with *) of the model's parameters", f"{unused[0]!r}, which matches none",
                               "see [n for n, _ in model.named_parameters()]")  # fmt: skip
    if not chosen:
        raise _checks.fail(op, "params", "at least one parameter", "none", "unfreeze some (requires_grad_(True)) or name them in params=")
    wrong = [n for n, p in chosen.items() if not p.is_floating_point()]
    if wrong:
        raise _checks.fail(op, "params", "floating-point parameters", f"{wrong[0]} of dtype {chosen[wrong[0]].dtype}", "leave it out with params=")
    return chosen


def _kind(module: nn.Module) -> type[Tap] | None:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return LinearTap
    if forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        return None if module.max_norm is not None or module.scale_grad_by_freq or module.sparse else EmbeddingTap
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return Conv1DTap
    own = dict(module.named_parameters(recurse=False))
    elementwise = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()
    if elementwise and not any(True for _ in module.children()) and set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values()):
        return None if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)) else ElementwiseTap
    return None


def plan(op: str, model: nn.Module, chosen: dict[str, nn.Parameter], tied: str, sink: Sink) -> list[Tap]:
    """One tap for each module that owns a chosen parameter; a tied embedding and head get a pair that knows each other."""
    by_id = {id(p): n for n, p in chosen.items()}
    owners: dict[str, list[tuple[str, nn.Module, str]]] = {n: [] for n in chosen}
    for where, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) in by_id:
                owners[by_id[id(p)]].append((where, module, own))
    problems, pairs = [], {}
    for name, uses in owners.items():
        kinds = [_kind(module) for _, module, _ in uses]
        if None in kinds:
            where, module, _ = uses[kinds.index(None)]
            problems.append(f"{name}: no exact rule for a parameter of {type(module).__name__}" + (f" ({where})" if where else ""))
        elif len(uses) == 2 and {*kinds} == {EmbeddingTap, LinearTap}:
            embedding, head = sorted(uses, key=lambda use: isinstance(use[1], nn.Linear))
            pairs[name] = (embedding, head)
        elif len(uses) > 1:
            problems.append(f"{name}: shared by {', '.join(where for where, _, _ in uses)}; only an embedding tied to one head has a rule")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{op}: params: {len(problems)} parameters cannot be covered:\n  " + "\n  ".join(problems[:10]) + more
                         + "\nleave them out with params=, or pass fallback='loop' (exact, one example at a time)")  # fmt: skip
    names: dict[str, dict[str, str]] = {}
    modules: dict[str, nn.Module] = {}
    for name, uses in owners.items():
        for where, module, own in uses:
            names.setdefault(where, {})[own] = name
            modules[where] = module
    taps: dict[str, Tap] = {}
    for embedding, head in pairs.values() if tied == "exact" else ():
        first = TiedEmbeddingTap(sink, embedding[1], embedding[0], names[embedding[0]])
        taps[embedding[0]] = first
        taps[head[0]] = TiedHeadTap(sink, head[1], head[0], names[head[0]], first)
    for where, module in modules.items():
        kind = _kind(module)
        if where not in taps and kind is not None:
            taps[where] = kind(sink, module, where, names[where])
    return list(taps.values())
