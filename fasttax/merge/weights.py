"""Weights by name wherever they are, read tensor by tensor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks, inner, mapped, placed
from fasttax._base.mapped import Spec, TensorFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Mapping[str, Tensor]):
    """Weights by name: of a mapping, a module, a safetensors file, or a folder of them.

    `files` maps a file's name to the names of what it holds, `specs` a name to its dtype and shape;
    `folder` is where a folder's other files are, `module` the module. `memory` has the tensors that
    lie in no file. Files are open from the start, so that one that takes its place meanwhile
    changes nothing, until `close`.
    """

    def __init__(self, op: str, argument: str, source: Any) -> None:
        self.op, self.argument = op, argument
        self.folder: Path | None = None
        self.module: nn.Module | None = None
        self.memory: dict[str, Tensor] = {}
        self.specs: dict[str, Spec] = {}
        self.files: dict[str, list[str]] = {}
        self._file_of: dict[str, TensorFile] = {}
        self._stack = contextlib.ExitStack()
        if isinstance(source, nn.Module):
            self.module, source = source, source.state_dict()
        try:
            if isinstance(source, Mapping):
                self._take(source)
            else:
                expected = "a module, a mapping of names to tensors, or a path"
                self._take_files(placed.path_of(op, argument, source, expected))
            if not self.specs:
                where = source if self.folder else "it"
                raise checks.fail(op, argument, "at least one tensor", f"none in {where}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the files' descriptors back."""
        self._stack.close()

    def _take(self, source: Mapping[str, Tensor]) -> None:
        for name, value in source.items():
            t = checks.tensor(self.op, f"{self.argument}[{name!r}]", value, mapped.CODES)
            if inner.lies_in_others(t):
                raise checks.fail(
                    self.op,
                    f"{self.argument}[{name!r}]",
                    "values that lie in the tensor itself",
                    f"one of class {type(t).__name__}",
                    "merge the models that were quantised, and quantise what comes out",
                    TypeError,
                )
            if t.device.type == "meta":
                way_out = "load its weights first"
                raise checks.fail(self.op, f"{self.argument}[{name!r}]", "values", t, way_out)
            self.memory[name] = t.detach()
            self.specs[name] = (t.dtype, tuple(t.shape))
        self.files = {WEIGHTS: [*self.memory]}

    def _take_files(self, path: Path) -> None:
        """The file of weights at `path`, or those of a folder."""
        if path.is_file():
            self._survey({path.name: path}, {})
            return
        self.folder = path
        if (path / INDEX).is_file():
            listed = self._index(path / INDEX)
            self._survey({file: path / file for file in sorted({*listed.values()})}, listed)
        elif (path / WEIGHTS).is_file():
            self._survey({WEIGHTS: path / WEIGHTS}, {})
        else:
            raise FileNotFoundError(
                f"{self.op}: {self.argument}: expected a .safetensors file, or a folder with "
                f"{WEIGHTS} or {INDEX}, got {path}; save the model with save_pretrained(folder)"
            )

    def _index(self, index: Path) -> dict[str, str]:
        """The file of each name, which lies in the folder of the index or below it."""
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {PurePosixPath(file) for file in listed.values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise checks.fail(
                self.op,
                self.argument,
                f"an index of weights in {index}",
                f"a file that has none ({error})",
            ) from None
        outside = [str(file) for file in files if file.is_absolute() or ".." in file.parts]
        if outside:
            raise checks.fail(
                self.op, self.argument, f"files beside {index}", f"{sorted(outside)[0]!r} in it"
            )
        absent = [str(file) for file in files if not (index.parent / file).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.op}: {self.argument}: {index} names {', '.join(sorted(absent))}, which "
                f"{index.parent} lacks; copy it there"
            )
        return dict(listed)

    def _survey(self, paths: Mapping[str, Path], listed: Mapping[str, str]) -> None:
        """Notes dtypes and shapes without reading the values; of duplicates the index decides."""
        for key, path in paths.items():
            with self._named():
                file = self._stack.enter_context(TensorFile(path))
            lacking = sorted(name for name, at in listed.items() if at == key and name not in file)
            if lacking:
                raise ValueError(
                    f"{self.op}: {self.argument}: {path} lacks {', '.join(lacking[:5])}, which "
                    f"{INDEX} says it has; save or copy the model anew"
                )
            self.files[key] = [name for name in file if listed.get(name, key) == key]
            for name in self.files[key]:
                if name in self._file_of:
                    raise ValueError(
                        f"{self.op}: {self.argument}: {name} is in {self._file_of[name].path} and "
                        f"in {path}, and {INDEX} names neither; save the model anew"
                    )
                with self._named():
                    self.specs[name] = file.spec(name)
                self._file_of[name] = file

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A file's errors with the op and the argument."""
        try:
            yield
        except mapped.BadFileError as error:
            raise ValueError(f"{self.op}: {self.argument}: {error}; save or copy it anew") from None
        except ValueError as error:
            raise ValueError(f"{self.op}: {self.argument}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        if name in self.memory:
            return self.memory[name].cpu()
        with self._named():
            return self._file_of[name][name]

    def one(self, name: str, other: str) -> bool:
        """Whether two names hold one weight: the same memory, or equal values.

        Constants, as norms begin with, are no sign of that.
        """
        if self.specs[name] != self.specs[other]:
            return False
        if name in self.memory and _place(self.memory[name]) == _place(self.memory[other]):
            return True
        a = self[name]
        return bool((a != a.flatten()[:1]).any()) and torch.equal(a, self[other])

    def shared(self) -> list[tuple[str, str]]:
        """Pairs of names of one tensor in memory, the first of them first."""
        first: dict[Any, str] = {}
        pairs = []
        for name, t in self.memory.items():
            if t.numel() and t.device.type != "meta":
                original = first.setdefault(_place(t), name)
                if original != name:
                    pairs.append((original, name))
        return pairs


def _place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory."""
    return (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
