"""Several models' weights under one's names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax._base.mapped import Spec
from fasttax.merge.conversion import Architecture, FromMemory, Layout, ToMemory
from fasttax.merge.names import Renamed, bare, paired, shortened
from fasttax.merge.weights import Weights

FEW = 8  # names that may be a second name of another weight; more are another architecture
SAMPLE = 64  # values of a tensor that are looked at before all are
# Parts of an adapter's update that is no linear function of them, by PEFT's, kohya's and diffusers'
# names. IA3, FourierFT, WaveFT, SHiRA and C3A are linear.
FACTOR = re.compile(
    r"(?:^|\.)(?:\w*lora_|lora\.(?:down|up)\b|hada_[wt]|lokr_[wt]|p?vera_lambda|(?:b|ps)?oft_|hra_u"
    r"|hira_|road_(?:theta|alpha)|poly_router|supertuning_|peanut_|osf_svd|miss_block|bone_block"
    r"|lily_|frod_lambda|deft_[PR]|adamss_[AB])"
)


@dataclass
class Aligned:
    """A model's tensors and specs by the first model's names, but for those that do not fit.

    `extra` are names of its own that the first model lacks.
    """

    argument: str
    tensors: Mapping[str, Tensor]
    specs: dict[str, Spec]
    extra: list[str]


class Models:
    """Models as `merge` takes them; `close` gives their files back.

    Raises:
        ValueError: they are of different architectures (the differences are listed), or factors of
            adapters that differ.
    """

    def __init__(self, op: str, sources: Mapping[str, Any]) -> None:
        self.op = op
        self.weights: list[Weights] = []
        try:
            for argument, source in sources.items():
                self.weights.append(Weights(op, argument, source))
            self.first = self.weights[0]
            own = Aligned(self.first.argument, self.first, self.first.specs, [])
            self.each = [own, *(self._aligned(other) for other in self.weights[1:])]
            self._refuse_differences()
        except BaseException:
            self.close()
            raise
        self._samples: dict[tuple[int, str], bytes] = {}

    def close(self) -> None:
        """Gives all files back."""
        for each in self.weights:
            each.close()

    def floats(self) -> list[str]:
        """The first model's floating-point tensors."""
        specs = self.first.specs
        return [name for name, (dtype, _) in specs.items() if dtype.is_floating_point]

    def tensors(self, name: str) -> list[Tensor]:
        """Each model's tensor, on the CPU."""
        return [each.tensors[name] for each in self.each]

    @functools.cached_property
    def architecture(self) -> Architecture | None:
        """Of the first model that says what it is."""
        known = (Architecture.of(each.folder, each.module) for each in self.weights)
        return next((found for found in known if found is not None), None)

    @functools.cached_property
    def layout(self) -> Layout | None:
        """The first model's names, as transformers loads them."""
        if self.architecture is None:
            return None
        shapes = {bare(name): shape for name, (_, shape) in self.first.specs.items()}
        return Layout(self.architecture, shapes)

    def converted(
        self, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Mapping[str, Tensor], dict[str, list[str]]]:
        """Tensors of other names by the first model's, as far as transformers relates them.

        And the names of `source` that each is made of.
        """
        mine = {bare(name): name for name in self.first.specs}
        theirs = {bare(name): name for name in shapes}
        ambiguous = len(mine) < len(self.first.specs) or len(theirs) < len(shapes)
        if self.layout is None or ambiguous:
            return {}, {}
        layout = Layout(self.layout.architecture, {bare(n): shape for n, shape in shapes.items()})
        view = FromMemory(self.layout, ToMemory(layout, Renamed(source, theirs)))
        made_of = {
            mine[name]: [
                theirs[on_disk]
                for inner in self.layout.of[name].memory
                for on_disk in layout.memory[inner].patterns
            ]
            for name in view
        }
        return Renamed(view, {mine[name]: name for name in view}), made_of

    # --- names that differ -----------------------------------------------------------------------

    def _aligned(self, other: Weights) -> Aligned:
        names = paired(self.first.specs, other.specs)
        self._add_twins(names)
        extra = self._extra(names, other)
        specs = {name: other.specs[theirs] for name, theirs in names.items()}
        as_named = Aligned(other.argument, Renamed(other, names), specs, extra)
        if not extra and len(names) == len(self.first.specs):
            return as_named
        shapes = {n: shape for n, (_, shape) in other.specs.items()}
        view, _ = self.converted(other, shapes)
        names = {name: name for name in view}
        self._add_twins(names)
        if self.layout is None or len(names) < len(self.first.specs):
            return as_named
        theirs = Layout(self.layout.architecture, {bare(n): shape for n, shape in shapes.items()})
        extra = [n for n in shapes if not self._is_known(bare(n), theirs)]
        return Aligned(other.argument, Renamed(view, names), dict(self.first.specs), extra)

    def _add_twins(self, names: dict[str, str]) -> None:
        """Names of the first model that the other one lacks, where they are a weight's second.

        Those of one memory first, of which a model that shares layers has many.
        """
        original = {name: first for first, name in self.first.shared()}
        by_original = {original.get(name, name): theirs for name, theirs in names.items()}
        for name in self.first.specs:
            theirs = by_original.get(original.get(name, name))
            if name not in names and theirs is not None:
                names[name] = theirs
        lacking = [name for name in self.first.specs if name not in names]
        for name in lacking[:FEW]:
            twin = _first(n for n in [*names] if self.first.one(name, n))
            if twin is not None:
                names[name] = names[twin]

    def _is_known(self, name: str, theirs: Layout) -> bool:
        """Whether what a name becomes in memory is, or is tied to, something of the first model."""
        if self.layout is None or name not in theirs.of:
            return False
        tied = theirs.architecture.tied()
        twins = {b: a for a, b in tied} | {a: b for a, b in tied}
        known = self.layout.memory
        return all(n in known or twins.get(n) in known for n in theirs.of[name].memory)

    def _extra(self, names: Mapping[str, str], other: Weights) -> list[str]:
        """The names that the other model alone has, but for second names of what both have."""
        used = set(names.values())
        original = {name: first for first, name in other.shared()}
        known = {original.get(name, name) for name in used}
        extra = [n for n in other.specs if n not in used and original.get(n, n) not in known]
        if len(extra) > FEW:
            return extra
        return [n for n in extra if not any(other.one(n, theirs) for theirs in used)]

    def _refuse_differences(self) -> None:
        """An error that lists how the others' names, shapes and kinds of number differ."""
        lines = [line for other in self.each[1:] for line in self._differences(other)]
        if lines:
            arguments = " and ".join(each.argument for each in self.each)
            raise ValueError(
                f"{self.op}: {arguments} are no weights of one architecture:\n  " + shortened(lines)
            )

    def _differences(self, other: Aligned) -> list[str]:
        """How names, shapes and kinds of number differ, a line each."""
        mine, theirs = self.first.argument, other.argument
        lacking = sorted(set(self.first.specs) - set(other.specs))
        lines = [
            *(f"{name}: only in {mine}" for name in lacking),
            *(f"{name}: only in {theirs}" for name in sorted(other.extra)),
        ]
        for name in sorted(other.specs):
            (a, shape), (b, other_shape) = self.first.specs[name], other.specs[name]
            if shape != other_shape:
                lines.append(f"{name}: shape {shape} in {mine}, {other_shape} in {theirs}")
            elif a.is_floating_point != b.is_floating_point:
                lines.append(f"{name}: {a} in {mine}, {b} in {theirs}")
        return lines

    # --- what has no average, and what has one for two names -----------------------------------

    def refuse_factors(self) -> None:
        """Adapters' factors, whose mean gives another update than the mean of the updates.

        Raises:
            ValueError: a factor differs between the models.
        """
        for name in filter(FACTOR.search, self.first.specs):
            mine, *others = self.tensors(name)
            if not all(torch.equal(mine, other.to(mine.dtype)) for other in others):
                raise ValueError(
                    f"{self.op}: {name}: expected a weight, got a factor of an adapter's update; "
                    "the product of mean factors is not the mean of the products: call "
                    "merge_and_unload() on each PEFT model, and merge the models that it gives"
                )

    def twin(self, name: str, among: Iterable[str]) -> str | None:
        """The one of `among` that is the same weight as `name` in every model, if one is."""
        spec = self.first.specs[name]
        same = (n for n in among if n != name and self.first.specs[n] == spec)
        return _first(n for n in same if self._one(name, n))

    def _one(self, name: str, other: str) -> bool:
        models = range(len(self.each))
        if any(self._sample(k, name) != self._sample(k, other) for k in models):
            return False
        if not all(torch.equal(e.tensors[name], e.tensors[other]) for e in self.each):
            return False
        if self.first.one(name, other):
            return True
        tied = [] if self.architecture is None else self.architecture.tied()
        pair = bare(name), bare(other)
        return pair in tied or pair[::-1] in tied

    def _sample(self, k: int, name: str) -> bytes:
        """Some values of a model's tensor: a thing to compare before all are read again."""
        if (k, name) not in self._samples:
            some = self.each[k].tensors[name].flatten()[:SAMPLE].contiguous()
            self._samples[k, name] = some.view(torch.uint8).numpy().tobytes()
        return self._samples[k, name]


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
