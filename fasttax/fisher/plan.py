"""Which tap covers which parameter of a model, or the error that names those that none can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fasttax._base import checks
from fasttax.fisher.rules import rule_of
from fasttax.fisher.rules.module import ModuleTap
from fasttax.fisher.rules.routing import RoutingBlock, expert_lists
from fasttax.fisher.sums import Sums
from fasttax.fisher.tap import Tap

TIED = ("exact", "sum_of_squares")
Filter = Callable[[str, Tensor], bool] | Iterable[str] | None


def select(op: str, model: nn.Module, params: Filter) -> dict[str, nn.Parameter]:
    """The parameters asked for.

    All trainable ones, those a predicate accepts, or those that match names or patterns.

    Raises:
        ValueError: a pattern matches none, or none is left.
    """
    every = dict(model.named_parameters())
    if params is None:
        chosen = {n: p for n, p in every.items() if p.requires_grad}
    elif callable(params):
        chosen = {n: p for n, p in every.items() if params(n, p)}
    else:
        chosen = _matching(op, every, params)
    if not chosen:
        raise checks.fail(
            op,
            "params",
            "at least one parameter",
            "none",
            "unfreeze some (requires_grad_(True)) or name them in params=",
        )
    return chosen


def _matching(
    op: str, every: Mapping[str, nn.Parameter], patterns: Iterable[str]
) -> dict[str, nn.Parameter]:
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {n for n in every if fnmatchcase(n, pattern)}
        if not matches:
            raise checks.fail(
                op,
                "params",
                "names or patterns (with *) of the model's parameters",
                f"{pattern!r}, which matches none",
                "see [n for n, _ in model.named_parameters()]",
            )
        chosen |= matches
    return {n: p for n, p in every.items() if n in chosen}


@dataclass(frozen=True)
class Use:
    """One place where a parameter is used.

    Attributes:
        where: the module that a tap goes behind, `module`, in the model.
        module: see where.
        own: the parameter's name there.
        rule: the module's rule; None where it has none, and must run again on its own.
    """

    where: str
    module: nn.Module
    own: str
    rule: type[Tap] | None

    def describe(self) -> str:
        """The module's class and place, for errors."""
        place = f" ({self.where})" if self.where else ""
        return type(self.module).__name__ + place


def plan(
    op: str,
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    dense: Mapping[str, Use],
    sums: Sums,
) -> tuple[list[Tap], list[RoutingBlock]]:
    """One tap for each module that owns a chosen parameter, and the blocks that route tokens.

    Args:
        op: for errors.
        model: the model.
        chosen: the parameters by name.
        dense: of lora="delta_w", the weights behind base layers by name.
        sums: the taps' sink, which learns which parameter has which taps.

    Raises:
        ValueError: parameters cannot be covered; each is named.
    """
    uses = find_uses(model, chosen)
    check_coverage(op, model, chosen, uses)
    taps = make_taps(sums, {**uses, **{name: [use] for name, use in dense.items()}})
    return taps, make_blocks(sums, model, taps)


def find_uses(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> dict[str, list[Use]]:
    """The modules that own each chosen parameter: one, or several of a shared one.

    An owner with children, no rule of its own and a sharer that has one holds the name only, as
    BERT's head its decoder's bias.
    """
    names = {id(p): n for n, p in chosen.items()}
    uses: dict[str, list[Use]] = {n: [] for n in chosen}
    stand_ins = _stand_ins(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for where, module in modules.items():
        for own, p in module.named_parameters(recurse=False):
            if id(p) in names:
                place = stand_ins.get(where, where)
                holder = modules[place]
                inner = f"{where}.{own}"[len(place) :].removeprefix(".")
                uses[names[id(p)]].append(Use(place, holder, inner, rule_of(holder)))
    for name, every in uses.items():
        ruled = [use for use in every if use.rule is not None]
        if ruled and all(_has_children(use.module) for use in every if use.rule is None):
            uses[name] = ruled
    return uses


def _stand_ins(model: nn.Module) -> dict[str, str]:
    """Modules that are never called -> the module above that uses their parameters.

    The children of nn.MultiheadAttention, and lists and dictionaries of parameters.
    """
    found: dict[str, str] = {}
    for where, module in model.named_modules():
        if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
            found.setdefault(where, where.rpartition(".")[0])
        if isinstance(module, nn.MultiheadAttention) and module is not model:
            for inner, child in module.named_modules(prefix=where):
                if child is not module:
                    found[inner] = where
    return found


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def check_coverage(
    op: str,
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    uses: Mapping[str, list[Use]],
) -> None:
    """Refuses parameters that no rule covers and that cannot run again on their own.

    Raises:
        ValueError: names them, with the way out.
    """
    problems = []
    for name, every in uses.items():
        for use in every:
            problem = None
            if use.rule is None or issubclass(use.rule, ModuleTap):
                problem = _problem(model, chosen[name], use, every)
            if problem is not None:
                no_rule = f"no exact rule for a parameter of {use.describe()}"
                problems.append(f"{name}: {no_rule}: {problem}")
                break
    if not problems:
        return
    more = ""
    if len(problems) > 10:
        more = f"\n  and {len(problems) - 10} more"
    raise ValueError(
        f"{op}: params: {len(problems)} parameters cannot be covered:\n  "
        + "\n  ".join(problems[:10])
        + f"{more}\nleave them out with params=, or pass fallback='loop' (exact, one example at a "
        "time)"
    )


def _problem(model: nn.Module, p: nn.Parameter, use: Use, every: list[Use]) -> str | None:
    """Why a use without a rule cannot run again on its own; None where it can."""
    if not p.is_floating_point():
        return f"dtype {p.dtype}"
    if len(every) > 1:
        return f"shared by {', '.join(other.where or 'the model' for other in every)}"
    return ModuleTap.problem(model, use.module)


def make_taps(sums: Sums, uses: Mapping[str, list[Use]]) -> list[Tap]:
    """One tap a module, which knows all of the module's parameters that count."""
    names: dict[str, dict[str, str]] = {}
    users: dict[str, Use] = {}
    for name, every in uses.items():
        for use in every:
            names.setdefault(use.where, {})[use.own] = name
            users[use.where] = use
    taps = []
    for where, use in users.items():
        kind = use.rule or ModuleTap
        taps.append(kind(sums, use.module, where, names[where]))
    for tap in taps:
        for name in tap.names.values():
            sums.taps.setdefault(name, []).append(tap)
    return taps


def make_blocks(sums: Sums, model: nn.Module, taps: Iterable[Tap]) -> list[RoutingBlock]:
    """The outermost blocks that route tokens to experts among `taps`.

    `sums` learns which parameters some batches may not reach.
    """
    blocks = set()
    lists = expert_lists(model)
    for tap in taps:
        for place, block in lists.items():
            if tap.where.startswith(f"{place}."):
                blocks.add(block)
                sums.routed.update(tap.names.values())
    outer = [b for b in blocks if not any(b.startswith(f"{o}.") for o in blocks)]
    return [RoutingBlock(sums, model.get_submodule(b), b) for b in sorted(outer)]
