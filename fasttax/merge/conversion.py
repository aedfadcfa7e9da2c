"""Names on disk and in memory, where transformers has two: by its own conversion mapping.

A checkpoint of a mixture of experts has a tensor for each expert and projection, the model one for
all. transformers says how the ones become the other; what it does is learnt from the places of the
values, so that weights and Fishers go both ways by one permutation, and a conversion that computes
new values is not taken for one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttax.merge.names import bare

Shape = tuple[int, ...]


class Architecture:
    """A transformers model, whose values are not looked at."""

    def __init__(self, model: Any) -> None:
        from transformers import core_model_loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._loading = core_model_loading
        self.model = model
        state = model.state_dict()
        self.shapes: dict[str, Shape] = {bare(n): tuple(t.shape) for n, t in state.items()}
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
        self.converters = [
            t for t in transforms if isinstance(t, core_model_loading.WeightConverter)
        ]

    @staticmethod
    def of(folder: Path | None, module: nn.Module | None) -> Architecture | None:
        """Of a folder that save_pretrained wrote, or of a module; None for others.

        None too where transformers lacks the class, as for a model of custom code.
        """
        if module is not None:
            # the model itself, under what wraps it: wrappers give out its attributes as theirs
            known = (m for m in module.modules() if hasattr(type(m), "base_model_prefix"))
            model = next(known, None)
            return None if model is None else Architecture(model)
        if folder is None or not (folder / "config.json").is_file():
            return None
        model = _skeleton(folder)
        return None if model is None else Architecture(model)

    def tied(self) -> list[tuple[str, str]]:
        """Pairs of names of one weight in memory."""
        keys = getattr(self.model, "all_tied_weights_keys", None) or {}
        return [(source, target) for target, source in keys.items()]

    def target(self, name: str) -> tuple[str, str | None]:
        """(the name in memory, or the first of them; the pattern of the converter, if any)."""
        prefix, shapes = self.model.base_model_prefix, self.shapes
        rename = self._loading.rename_source_key
        found, pattern = rename(name, self.renamings, self.converters, prefix, shapes)
        if found not in shapes and name in shapes:
            found, pattern = rename(name, [], [], prefix, shapes)
        return found, pattern

    def converted(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of a group's tensors when it loads them."""
        if not any(group.patterns.values()):
            return {group.first: tensors[next(iter(group.patterns))]}
        pattern = next(iter(group.patterns.values()))
        converter = copy.deepcopy(next(c for c in self.converters if pattern in c.source_patterns))
        for name, source in group.patterns.items():
            converter.add_tensor(group.first, name, source, tensors[name])
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def in_order(self, names: Mapping[str, Any]) -> list[str]:
        """As transformers sorts them: experts by number."""
        return sorted(names, key=self._loading.dot_natural_key)


def _skeleton(folder: Path) -> Any:
    """The model of a folder's config, without values; None where it can't be made.

    Callers then find names that they cannot relate, and say so.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        made = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return None if made is None else made(config)
    # whatever a config that this transformers does not know makes its code raise
    except Exception:  # noqa: BLE001
        return None


@dataclass
class Group:
    """Names on disk that become one tensor in memory, or several, together."""

    first: str
    patterns: dict[str, str | None] = field(default_factory=dict)  # a name's on disk: converter's
    memory: dict[str, Shape] = field(default_factory=dict)


class Layout:
    """Names and shapes of a checkpoint, in groups; `of` and `memory` find a name's group."""

    def __init__(self, architecture: Architecture, shapes: Mapping[str, Shape]) -> None:
        self.architecture, self.shapes = architecture, shapes
        groups: dict[str, Group] = {}
        for name in architecture.in_order(shapes):
            first, pattern = architecture.target(name)
            groups.setdefault(first, Group(first)).patterns[name] = pattern
        self.of: dict[str, Group] = {}
        self.memory: dict[str, Group] = {}
        for group in groups.values():
            if None in group.patterns.values() and len(group.patterns) > 1:
                continue  # two names on disk for one in memory
            group.memory = self._made_of(group)
            known = architecture.shapes
            wrong = any(n in known and known[n] != shape for n, shape in group.memory.items())
            if wrong or not group.memory:
                continue  # a part of the experts alone
            self.of |= dict.fromkeys(group.patterns, group)
            self.memory |= dict.fromkeys(group.memory, group)

    def _made_of(self, group: Group) -> dict[str, Shape]:
        """The shapes in memory, by tensors without values; none where transformers makes none."""
        meta = {n: torch.empty(self.shapes[n], device="meta") for n in group.patterns}
        try:
            made = self.architecture.converted(group, meta)
        except (RuntimeError, ValueError, LookupError):  # torch's, of lists without a tensor
            return {}
        return {n: tuple(t.shape) for n, t in made.items()}

    def places(self, group: Group) -> dict[str, Tensor]:
        """For each name in memory the places of its values in the group's, end to end as on disk.

        Raises:
            ValueError: the conversion is no permutation of the values.
        """
        numbers, total = {}, 0
        for name in group.patterns:
            count = math.prod(self.shapes[name])
            numbers[name] = torch.arange(total, total + count, device="cpu").view(self.shapes[name])
            total += count
        places = self.architecture.converted(group, numbers)
        seen = torch.zeros(total, dtype=torch.bool, device="cpu")
        whole = all(p.dtype == torch.int64 for p in places.values())
        whole = whole and sum(p.numel() for p in places.values()) == total
        for place in places.values() if whole else ():
            seen[place.flatten()] = True
        if not whole or not bool(seen.all()):
            raise ValueError(
                f"merge: transformers computes {group.first} from {', '.join(group.patterns)}, "
                "which has no way back; load the models and merge them in memory"
            )
        return places


class ToMemory(Mapping[str, Tensor]):
    """Tensors that are named as on disk, by their names in memory."""

    def __init__(self, layout: Layout, source: Mapping[str, Tensor]) -> None:
        self.layout, self.source = layout, source
        self._group = functools.lru_cache(maxsize=4)(self._made)

    def _made(self, first: str) -> dict[str, Tensor]:
        group = self.layout.memory[first]
        values = torch.cat([self.source[name].flatten() for name in group.patterns])
        return {name: values[place] for name, place in self.layout.places(group).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.memory)

    def __len__(self) -> int:
        return len(self.layout.memory)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.memory

    def __getitem__(self, name: str) -> Tensor:
        group = self.layout.memory[name]
        if not any(group.patterns.values()):
            return self.source[next(iter(group.patterns))]
        return self._group(next(iter(group.memory)))[name]


class FromMemory(Mapping[str, Tensor]):
    """Tensors that are named as in memory, by their names on disk; those that are whole there."""

    def __init__(self, layout: Layout, source: Mapping[str, Tensor]) -> None:
        self.layout, self.source = layout, source
        self._names = [
            name
            for name, group in layout.of.items()
            if all(inner in source for inner in group.memory)
        ]
        self._group = functools.lru_cache(maxsize=4)(self._made)

    def _made(self, first: str) -> dict[str, Tensor]:
        group = self.layout.memory[first]
        made: dict[str, Tensor] = {}
        places = self.layout.places(group)
        values = torch.empty(0, device="cpu")
        for name, place in places.items():
            part = self.source[name]
            if part.shape != place.shape:
                raise ValueError(
                    f"merge: {name}: expected shape {tuple(place.shape)} as the weight, got "
                    f"{tuple(part.shape)}; estimate it of this model"
                )
            if not values.numel():
                count = sum(p.numel() for p in places.values())
                values = torch.empty(count, dtype=part.dtype, device="cpu")
            values[place.flatten()] = part.flatten()
        end = 0
        for name in group.patterns:
            shape = self.layout.shapes[name]
            begin, end = end, end + math.prod(shape)
            made[name] = values[begin:end].view(shape)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._name_set

    @functools.cached_property
    def _name_set(self) -> set[str]:
        return set(self._names)

    def __getitem__(self, name: str) -> Tensor:
        group = self.layout.of[name]
        if not any(group.patterns.values()):
            return self.source[group.first]
        return self._group(next(iter(group.memory)))[name]
