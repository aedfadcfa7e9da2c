"""Fishers of several models, by the models' own names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, file_parts, placed
from fasttax._base.packed import Stored
from fasttax.merge.models import Models
from fasttax.merge.names import Renamed, bare, paired, shortened


class FisherFiles(Mapping[str, Tensor]):
    """A FisherEstimate in its file or sharded folder, read by name until `close`."""

    def __init__(self, path: Path) -> None:
        self._parts = file_parts.Parts(path, "FisherEstimate")
        keys = [key for key in self._parts if key.startswith("fisher.")]
        self._names = {key.removeprefix("fisher."): None for key in keys}

    def close(self) -> None:
        """Gives the descriptors back."""
        self._parts.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        found = self._parts.some(f"fisher.{name}", f"scales.{name}")
        return Stored(found[f"fisher.{name}"], found.get(f"scales.{name}")).decode()


class Fishers:
    """One Fisher for each model, by the names of the first model.

    Names may have wrappers' parts (`module.`, `_orig_mod.`, `base_model.model.`), be those of the
    model in memory where the weights are named as on disk, or be another name of a tied weight.
    Values below `floor` are given as it.
    """

    def __init__(
        self, op: str, sources: Sequence[Any], models: Models, missing: str, floor: float = 0.0
    ) -> None:
        self.op, self.models, self.floor = op, models, floor
        self._files: list[FisherFiles] = []
        self.each: list[Mapping[str, Tensor]] = []
        try:
            for k, source in enumerate(sources):
                self.each.append(self._fitted(k, self._opened(k, source), missing))
            self._refuse_two_of_one()
            if missing == "error":
                self._check()
        except BaseException:
            self.close()
            raise

    def _opened(self, k: int, source: Any) -> Mapping[str, Tensor]:
        if isinstance(source, Mapping):
            return source
        expected = "a FisherEstimate, a mapping of names to tensors, or a path"
        self._files.append(FisherFiles(placed.path_of(self.op, f"fishers[{k}]", source, expected)))
        return self._files[-1]

    def close(self) -> None:
        """Gives the files back."""
        for file in self._files:
            file.close()

    def __contains__(self, name: str) -> bool:
        return all(name in fisher for fisher in self.each)

    def of(self, name: str, shape: torch.Size) -> list[Tensor]:
        """Each model's Fisher of a parameter, on the CPU."""
        return [self._checked(k, name, fisher[name], shape) for k, fisher in enumerate(self.each)]

    def _checked(self, k: int, name: str, value: Any, shape: torch.Size) -> Tensor:
        argument = f"fishers[{k}][{name!r}]"
        f = checks.tensor(self.op, argument, value).detach().cpu()
        if f.shape != shape:
            raise checks.fail(self.op, argument, f"shape {tuple(shape)} as the weight", f)
        if not bool((torch.isfinite(f) & (f >= 0)).all()):
            raise checks.fail(self.op, argument, "finite values >= 0", "others", "estimate it anew")
        return f.clamp(min=self.floor) if self.floor else f

    def norms(self) -> list[float]:
        """Each Fisher's Euclidean norm over the parameters, a weight of several names once.

        Raises:
            ValueError: one is 0 everywhere.
        """
        again = {other for name, other in self.models.first.shared() if name in self}
        sums = [0.0] * len(self.each)
        for name in self.models.floats():
            if name not in self or name in again:
                continue
            for k, f in enumerate(self.of(name, torch.Size(self.models.first.specs[name][1]))):
                sums[k] += float(f.double().square().sum())
        for k, total in enumerate(sums):
            if not total:
                raise checks.fail(
                    self.op,
                    f"fishers[{k}]",
                    "a value > 0 somewhere, which its norm is made of",
                    "zeros alone",
                    "pass normalize=None, or leave the model out",
                )
        return [math.sqrt(total) for total in sums]

    # --- names -----------------------------------------------------------------------------------

    def _fitted(self, k: int, source: Mapping[str, Tensor], missing: str) -> Mapping[str, Tensor]:
        """A Fisher by the first model's names.

        Raises:
            ValueError: none of its names is a model's, or some are not and others lack.
        """
        names = paired(self.models.first.specs, source)
        used = set(names.values())
        found: dict[str, Mapping[str, Tensor]] = dict.fromkeys(names, Renamed(source, names))
        if any(name not in found for name in self.models.floats()):
            used |= self._add_converted(source, found)
            used |= self._add_tied(source, found)
        foreign = [name for name in source if name not in used]
        lacking = [name for name in self.models.floats() if name not in found]
        if not found or (missing == "mean" and foreign and lacking):
            raise ValueError(
                f"{self.op}: fishers[{k}]: expected names of the models' parameters, as "
                f"{next(iter(self.models.first.specs))}, got others:\n  {shortened(foreign)}\n"
                "rename them, or pass a mapping without those that no model has"
            )
        return _Joined(found)

    def _add_converted(
        self, source: Mapping[str, Tensor], found: dict[str, Mapping[str, Tensor]]
    ) -> set[str]:
        """What transformers' conversion relates; gives the names that it used."""
        if self.models.layout is None:
            return set()
        shapes = {name: tuple(source[name].shape) for name in source}
        view, made_of = self.models.converted(source, shapes)
        lacking = [name for name in self.models.first.specs if name not in found and name in view]
        found |= dict.fromkeys(lacking, view)
        return {used for name in lacking for used in made_of[name]}

    def _add_tied(
        self, source: Mapping[str, Tensor], found: dict[str, Mapping[str, Tensor]]
    ) -> set[str]:
        """Other names of tied weights; gives the names that it used."""
        used: set[str] = set()
        for name in self.models.floats():
            if name in found:
                continue
            same = self.models.twin(name, [*found])
            if same is not None:
                found[name] = Renamed(found[same], {name: same})
        if self.models.architecture is None:
            return used
        by_bare = {bare(name): name for name in source}
        mine = {bare(name): name for name in self.models.first.specs}
        for pair in self.models.architecture.tied():
            for here, there in (pair, pair[::-1]):
                own, other = mine.get(here), by_bare.get(there)
                # a file has one name of a tied weight, the Fisher may have another
                if own and other and own not in found and there not in mine:
                    found[own] = Renamed(source, {own: other})
                    used.add(other)
        return used

    def _refuse_two_of_one(self) -> None:
        """Different Fishers of one weight: the loaded model has but one value for both."""
        for name, other in self.models.first.shared():
            if name not in self or other not in self or self.models.twin(other, [name]) is None:
                continue
            for k, fisher in enumerate(self.each):
                if not torch.equal(fisher[name], fisher[other]):
                    raise checks.fail(
                        self.op,
                        f"fishers[{k}]",
                        f"one Fisher of {name} and {other}, which are one tensor",
                        "two that differ",
                        "pass the Fisher of the shared weight under one name",
                    )

    def _check(self) -> None:
        """That all of them have the models' parameters.

        Raises:
            ValueError: those that some lack, by name.
        """
        lacking = [name for name in self.models.floats() if name not in self]
        if lacking:
            raise ValueError(
                f"{self.op}: fishers: expected every parameter in each, got none for:\n  "
                + shortened(lacking)
                + "\nestimate them with params=, or average these plainly with missing='mean'"
            )


class _Joined(Mapping[str, Tensor]):
    """For each name the mapping that has it."""

    def __init__(self, of: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._of = of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]
