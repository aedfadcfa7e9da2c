"""Weights by name wherever they are, read tensor by tensor, and checkpoints written that way."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from fasttax._base import checks, file_parts, files, mapped
from fasttax._base.mapped import Spec
from fasttax._base.packed import Stored
from fasttax._base.version import __version__

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# weights in other clothes
NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)


class Weights(Mapping[str, Tensor]):
    """Weights by name: of a mapping, a module, a safetensors file, or a folder of them.

    `files` maps a file's name to the names of what it holds, `specs` a name to its dtype and shape;
    `folder` is where a folder's other files are. `memory` has the tensors that lie in no file.
    """

    def __init__(self, op: str, argument: str, source: Any) -> None:
        self.op, self.argument = op, argument
        self.folder: Path | None = None
        self.memory: dict[str, Tensor] = {}
        self.specs: dict[str, Spec] = {}
        self.files: dict[str, list[str]] = {}
        # one file is open at a time: its pages count as memory once they are read
        self._open: tuple[Path, Any] | None = None
        if isinstance(source, nn.Module):
            source = source.state_dict()
        if isinstance(source, Mapping):
            self._paths: dict[str, Path] = {}
            self._take(source)
        else:
            paths = self._files_of(Path(source))
            self.files = {path.name: self._survey(path) for path in paths}
            self._paths = {name: path for path in paths for name in self.files[path.name]}
        if not self.specs:
            where = source if self.folder else "it"
            raise checks.fail(op, argument, "at least one tensor", f"none in {where}")

    def _take(self, source: Mapping[str, Tensor]) -> None:
        for name, value in source.items():
            t = checks.tensor(self.op, f"{self.argument}[{name!r}]", value, mapped.CODES)
            self.memory[name] = t.detach()
            self.specs[name] = (t.dtype, tuple(t.shape))
        self.files = {WEIGHTS: [*self.memory]}

    def _files_of(self, path: Path) -> list[Path]:
        """The files of weights at `path`, itself or a folder."""
        if path.is_file():
            return [path]
        self.folder = path
        if (path / INDEX).is_file():
            return self._indexed(path)
        if (path / WEIGHTS).is_file():
            return [path / WEIGHTS]
        raise FileNotFoundError(
            f"{self.op}: {self.argument}: expected a .safetensors file, or a folder with {WEIGHTS} "
            f"or {INDEX}, got {path}; save the model with save_pretrained(folder)"
        )

    def _indexed(self, folder: Path) -> list[Path]:
        index = folder / INDEX
        try:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise checks.fail(
                self.op,
                self.argument,
                f"an index of weights in {index}",
                f"a file that has none ({error})",
            ) from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.op}: {self.argument}: {index} names {', '.join(absent)}, which {folder} "
                "lacks; copy it there"
            )
        return [folder / name for name in names]

    def _survey(self, path: Path) -> list[str]:
        """The names in a file, whose dtypes and shapes are noted without reading the values."""
        try:
            with safe_open(path, framework="pt") as file:
                names = [*file.keys()]
                for name in names:
                    entry = file.get_slice(name)
                    dtype = self._dtype_of(name, entry.get_dtype())
                    self.specs[name] = (dtype, tuple(entry.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{self.op}: {self.argument}: {path} is truncated or no safetensors file "
                f"({error}); save or copy it anew"
            ) from error
        return names

    def _dtype_of(self, name: str, code: str) -> torch.dtype:
        if code not in mapped.DTYPES:
            raise checks.fail(
                self.op,
                self.argument,
                f"tensors of {', '.join(mapped.DTYPES)}",
                f"{name} of {code}",
                "convert it first",
            )
        return mapped.DTYPES[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        if name in self.memory:
            return self.memory[name].cpu()
        path = self._paths[name]
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = path, safe_open(path, framework="pt")
        t: Tensor = self._open[1].get_tensor(name)
        return t

    def differences(self, other: Weights) -> list[str]:
        """How names, shapes and kinds of number differ, a line each."""
        mine, theirs = self.argument, other.argument
        lines = [
            *(f"{name}: only in {mine}" for name in sorted(set(self) - set(other))),
            *(f"{name}: only in {theirs}" for name in sorted(set(other) - set(self))),
        ]
        for name in sorted(set(self) & set(other)):
            (a, shape), (b, other_shape) = self.specs[name], other.specs[name]
            if shape != other_shape:
                lines.append(f"{name}: shape {shape} in {mine}, {other_shape} in {theirs}")
            elif a.is_floating_point != b.is_floating_point:
                lines.append(f"{name}: {a} in {mine}, {b} in {theirs}")
        return lines


class Fishers:
    """Fishers of several models, one parameter at a time."""

    def __init__(self, op: str, sources: Sequence[Any]) -> None:
        self.op = op
        self.each = [
            source if isinstance(source, Mapping) else FisherFiles(Path(source))
            for source in sources
        ]

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
        return f

    def check(self, names: Sequence[str]) -> None:
        """That all of them have these parameters.

        Raises:
            ValueError: those that some lack, by name.
        """
        lacking = [name for name in names if name not in self]
        if lacking:
            raise ValueError(
                f"{self.op}: fishers: expected every parameter in each, got none for:\n  "
                + shortened(lacking)
                + "\nestimate them with params=, or average these plainly with missing='mean'"
            )


def shortened(lines: Sequence[str]) -> str:
    """The first 20, a line each, and how many more there are."""
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n  ".join([*lines[:20], *more])


class FisherFiles(Mapping[str, Tensor]):
    """A FisherEstimate in its file or sharded folder, read by name."""

    def __init__(self, path: Path) -> None:
        files_of = [path]
        if path.is_dir():
            index = files.read_metadata(path / file_parts.INDEX, "FisherEstimate")
            files_of = [path / part for part in index["_parts"]]
        else:
            files.read_metadata(path, "FisherEstimate")
        self._file_of: dict[str, Path] = {}
        self._ranged: set[str] = set()  # those that have u8log's ranges
        for file in files_of:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no Mapping)
                    kind, _, name = key.partition(".")
                    if kind == "fisher":
                        self._file_of[name] = file
                    elif kind == "scales":
                        self._ranged.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            values = opened.get_tensor(f"fisher.{name}")
            if name not in self._ranged:
                return values
            return Stored(values, opened.get_tensor(f"scales.{name}")).decode()


@dataclass(frozen=True)
class Output:
    """A file, or a folder of the files of `like` and the small files of `others`."""

    path: Path
    like: Weights
    others: Weights
    metadata: Mapping[str, Any]

    def write(self, merged: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]]) -> None:
        """Made beside its place, and renamed; `merged` gives the tensors of these names."""
        if self.path.suffix == ".safetensors":
            self._write_file(self.path, [*self.like], merged)
            return
        names_of = self.like.files
        if len(names_of) == 1:
            names_of = {WEIGHTS: [*self.like]}
        with _folder(self.path) as temporary:
            size = sum(
                self._write_file(temporary / file, names, merged)
                for file, names in names_of.items()
            )
            if len(names_of) > 1:
                weight_map = {name: file for file, names in names_of.items() for name in names}
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                (temporary / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
            if self.others.folder is not None:
                _copy_others(self.others.folder, temporary)

    def _write_file(
        self,
        path: Path,
        names: Sequence[str],
        merged: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
    ) -> int:
        """Its size in bytes."""
        specs = {name: self.like.specs[name] for name in names}
        mapped.write_streamed(
            path, "merged weights", specs, self.metadata, merged(names), {"format": "pt"}
        )
        return path.stat().st_size


def _check_new(op: str, path: Path) -> None:
    """An error where `path` is there already, or its folder is not."""
    if path.exists():
        raise FileExistsError(f"{op}: output: {path} is there already; delete it or choose another")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{op}: output: cannot write {path}: folder {path.parent} does not exist; create it "
            "first"
        )


def write(
    op: str,
    output: str | os.PathLike[str],
    like: Weights,
    merged: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
    others: Weights,
    facts: Mapping[str, Any],
    progress: bool,
) -> Path:
    """`Output` at `output`, under a bar; `facts` go into the files' metadata."""
    path = Path(output)
    _check_new(op, path)
    metadata = {**facts, "fasttax": __version__, "torch": torch.__version__}
    disable = None if progress else True  # None: where there is no terminal
    with tqdm(total=len(like), unit="tensor", desc=op, disable=disable) as bar:

        def counted(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            for item in merged(names):
                yield item
                bar.update()

        Output(path, like, others, metadata).write(counted)
    return path


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, whose place it takes if the block ends well."""
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_others(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copy2(file, target / file.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
