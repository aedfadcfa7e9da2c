"""Which parameter of a model a name means, whatever wrappers have put into either's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fasttax._base import checks, wrappers

# What wrappers put into parameters' names, wherever they sit in the model.
_INSERTED = re.compile(
    r"(?<![^.])(?:"
    r"base_model\.model"  # PEFT, around the model
    r"|base_layer|token_adapter|original_module"  # PEFT, around a layer
    rf"|{'|'.join(wrappers.TORCH)}"
    r")\."
    r"|\.modules_to_save\.[^.]+(?=\.)"  # PEFT, of modules that it trains whole
)


def canonical(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return _INSERTED.sub("", name)


def active_adapters(wrapper: Any) -> list[str]:
    """The names of a PEFT wrapper's adapters that act at present."""
    if getattr(wrapper, "disable_adapters", False):
        return []
    return list(getattr(wrapper, "active_adapters", ()))


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's wrappers of modules that it trains whole, a copy an adapter, by their names."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(dict(m.named_children()).get("modules_to_save"), nn.ModuleDict)
    }


def _idle(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of copies that the model does not compute with."""
    idle: list[str] = []
    for name, wrapper in saved_modules(model).items():
        start = f"{name}." if name else ""
        copies: Any = wrapper.modules_to_save
        used = [a for a in active_adapters(wrapper) if a in copies]
        idle += [f"{start}modules_to_save.{a}." for a in copies if a not in used]
        if used:
            idle.append(f"{start}original_module.")
    return tuple(idle)


class Names:
    """The parameters that a model computes with, by their names in it."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self._alike: dict[str, list[str]] = {}  # by the names without what wrappers insert
        self._by_id: dict[int, list[str]] = {}
        # what PEFT's copies stand in for, by its names without what wrappers insert
        self._replaced: dict[str, Tensor] = {}
        self._idle = _idle(model)
        for name, p in model.named_parameters(remove_duplicate=False):
            if "original_module" in name.split(".") and name.startswith(self._idle):
                self._replaced[canonical(name)] = p
            if not name.startswith(self._idle):
                self.parameters[name] = p
                self._alike.setdefault(canonical(name), []).append(name)
                self._by_id.setdefault(id(p), []).append(name)

    def find(self, given: str) -> str | None:
        """The whole name of the one parameter that `given` means; None for none, or several.

        A name that the model has is that parameter's, any other is compared without what wrappers
        insert.
        """
        if given in self.parameters:
            return given
        if given.startswith(self._idle) and ".modules_to_save." in given:
            return None
        found = self._alike.get(canonical(given), [])
        return found[0] if len(self._parameters_of(found)) == 1 else None

    def why_not(self, given: str) -> str:
        """What `find` found wrong."""
        if given.startswith(self._idle) and ".modules_to_save." in given:
            return "of an adapter that is not active"
        found = self._alike.get(canonical(given), [])
        if not found:
            return "not a parameter of the model"
        return "may be " + " or ".join(found[:3])

    def short(self, whole: str) -> str:
        """A whole name without what wrappers insert, where that means this parameter alone."""
        name = canonical(whole)
        return name if len(self._parameters_of(self._alike[name])) == 1 else whole

    def names_of(self, theta: Tensor) -> list[str]:
        """Every whole name of a parameter: tied weights have several."""
        return self._by_id.get(id(theta), [])

    def copies_of(self, whole: str) -> dict[str, Tensor]:
        """What PEFT trains in the place of a parameter, by whole names: of a tied one in each use.

        `whole` is the parameter's own name, or that of its copy in one use.
        """
        name = canonical(whole)
        original = id(self._replaced.get(name, self.parameters[whole]))
        uses = [use for use, p in self._replaced.items() if id(p) == original]
        found = [copy for copy in map(self.find, uses) if copy is not None]
        return {copy: self.parameters[copy] for copy in found}

    def _parameters_of(self, names: Iterable[str]) -> set[int]:
        return {id(self.parameters[name]) for name in names}


def renamer(
    op: str, rename: Mapping[str, str] | None, names: Iterable[str]
) -> Callable[[str], str]:
    """Old name -> new name, by the longest key that is the name or a module above it.

    The key "" is above every name; the value "" takes the module's own name away.
    """
    if rename is not None and not isinstance(rename, Mapping):
        raise checks.fail(
            op, "rename", "a mapping of the Fisher's names to the model's", rename, error=TypeError
        )
    renames = {old.strip("."): new.strip(".") for old, new in (rename or {}).items()}

    def key_of(name: str) -> str | None:
        fits = [key for key in renames if not key or f"{name}.".startswith(f"{key}.")]
        return max(fits, key=len, default=None)

    unused = sorted(set(renames) - {key_of(name) for name in names})
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
        if key is None:
            return name
        rest = name.removeprefix(key).strip(".")
        return ".".join(part for part in (renames[key], rest) if part)

    return new
