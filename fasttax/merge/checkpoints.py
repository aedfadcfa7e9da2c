"""Weights by name wherever they are, read tensor by tensor; and checkpoints written the same way."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from fasttax._base import checks, file_parts, files, mapped
from fasttax._base.packed import Stored

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# weights in other clothes
_NOT_COPIED = (
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

Spec = mapped.Spec


class Checkpoint(Mapping[str, Tensor]):
    """Weights by name: of a mapping, a module, a safetensors file, or a folder of them.

    `files`: name of a file -> what it holds.
    """

    def __init__(self, op: str, argument: str, source: Any) -> None:
        self.op, self.argument, self.folder = (
            op,
            argument,
            None if isinstance(source, (Mapping, nn.Module)) else Path(source),
        )
        self._tensors: dict[str, Tensor] = {}
        self._specs: dict[str, Spec] = {}
        self._reader: tuple[Path, Any] | None = (
            None  # one file is open at a time: its pages count as memory once they are read
        )
        if isinstance(source, (Mapping, nn.Module)):
            self._tensors = {
                n: checks.tensor(op, f"{argument}[{n!r}]", t, mapped.CODES).detach()
                for n, t in self._entries(source)
            }
            self._specs = {n: (t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}
            self.files = {WEIGHTS: [*self._tensors]}
            self._file_of: dict[str, Path] = dict.fromkeys(self._tensors, Path(WEIGHTS))
        else:
            paths = self._paths(Path(source))
            self.files = {path.name: self._survey(path) for path in paths}
            self._file_of = {name: path for path in paths for name in self.files[path.name]}
        if not self._file_of:
            raise checks.fail(
                op, argument, "at least one tensor", f"none in {source if self.folder else 'it'}"
            )

    @staticmethod
    def _entries(source: Mapping[str, Tensor] | nn.Module) -> Iterable[tuple[str, Tensor]]:
        return source.state_dict().items() if isinstance(source, nn.Module) else source.items()

    def _paths(self, path: Path) -> list[Path]:
        if path.is_file():
            self.folder = None
            return [path]
        if (path / INDEX).is_file():
            try:
                names = sorted(
                    {*json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise checks.fail(
                    self.op,
                    self.argument,
                    f"an index of weights in {path / INDEX}",
                    f"a file that has none ({error})",
                ) from error
            absent = [n for n in names if not (path / n).is_file()]
            if absent:
                raise FileNotFoundError(
                    f"{self.op}: {self.argument}: {path / INDEX} names {', '.join(absent)}, which "
                    f"{path} lacks; copy it there"
                )
            return [path / n for n in names]
        if (path / WEIGHTS).is_file():
            return [path / WEIGHTS]
        raise FileNotFoundError(
            f"{self.op}: {self.argument}: expected a .safetensors file, or a folder with {WEIGHTS} "
            f"or {INDEX}, got {path}; "
            "save the model with save_pretrained(folder)"
        )

    def _survey(self, path: Path) -> list[str]:
        """The names in a file, whose dtypes and shapes are noted without reading the values."""
        try:
            with safe_open(path, framework="pt") as file:
                names = [*file.keys()]
                for name in names:
                    entry = file.get_slice(name)
                    dtype = next(
                        (d for d, code in mapped.CODES.items() if code == entry.get_dtype()), None
                    )
                    if dtype is None:
                        known = ", ".join(mapped.CODES.values())
                        raise checks.fail(
                            self.op,
                            self.argument,
                            f"tensors of {known}",
                            f"{name} of {entry.get_dtype()}",
                            "convert it first",
                        )
                    self._specs[name] = (dtype, tuple(entry.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{self.op}: {self.argument}: {path} is truncated or no safetensors file "
                f"({error}); save or copy it anew"
            ) from error
        return names

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name].cpu()
        path = self._file_of[name]
        if self._reader is None or self._reader[0] != path:
            self._reader = None
            self._reader = path, safe_open(path, framework="pt")
        t: Tensor = self._reader[1].get_tensor(name)
        return t

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def differences(self, mine: str, theirs: str, other: Checkpoint) -> list[str]:
        lines = [f"{n}: only in {mine}" for n in sorted(set(self) - set(other))] + [
            f"{n}: only in {theirs}" for n in sorted(set(other) - set(self))
        ]
        for name in sorted(set(self) & set(other)):
            (a, shape), (b, other_shape) = self.spec(name), other.spec(name)
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
            source
            if isinstance(source, Mapping)
            else FisherFiles(op, f"fishers[{k}]", Path(source))
            for k, source in enumerate(sources)
        ]

    def __contains__(self, name: str) -> bool:
        return all(name in fisher for fisher in self.each)

    def __call__(self, name: str, shape: torch.Size) -> list[Tensor]:
        found = [
            checks.tensor(self.op, f"fishers[{k}][{name!r}]", fisher[name]).detach().cpu()
            for k, fisher in enumerate(self.each)
        ]
        for k, f in enumerate(found):
            if f.shape != shape:
                raise checks.fail(
                    self.op, f"fishers[{k}][{name!r}]", f"shape {tuple(shape)} as the weight", f
                )
            if not bool((torch.isfinite(f) & (f >= 0)).all()):
                raise checks.fail(
                    self.op,
                    f"fishers[{k}][{name!r}]",
                    "finite values >= 0",
                    "others",
                    "estimate it anew",
                )
        return found

    def check(self, names: Sequence[str]) -> None:
        lacking = [name for name in names if name not in self]
        if lacking:
            raise ValueError(
                f"{self.op}: fishers: expected every parameter in each, got none for:\n  "
                + "\n  ".join(lacking[:20])
                + (f"\n  and {len(lacking) - 20} more" if len(lacking) > 20 else "")
                + "\nestimate them with params=, or average these plainly with missing='mean'"
            )


class FisherFiles(Mapping[str, Tensor]):
    """A FisherEstimate in its file or sharded folder, read by name."""

    def __init__(self, op: str, argument: str, path: Path) -> None:
        index = path / file_parts.INDEX if path.is_dir() else path
        metadata = files.read_metadata(index, "FisherEstimate")
        self._of: dict[
            str, tuple[Path, bool]
        ] = {}  # where a parameter's Fisher is, and whether it has u8log's ranges
        for file in [path / part for part in metadata["_parts"]] if path.is_dir() else [path]:
            with safe_open(file, framework="pt") as opened:
                keys = {*opened.keys()}
            self._of |= {
                key.removeprefix("fisher."): (file, f"scales.{key.removeprefix('fisher.')}" in keys)
                for key in keys
                if key.startswith("fisher.")
            }

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, name: str) -> Tensor:
        file, scaled = self._of[name]
        with safe_open(file, framework="pt") as opened:
            return Stored(
                opened.get_tensor(f"fisher.{name}"),
                opened.get_tensor(f"scales.{name}") if scaled else None,
            ).decode()


def write(
    op: str,
    output: str | os.PathLike[str],
    like: Checkpoint,
    merged: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
    others: Checkpoint,
    facts: Mapping[str, Any],
    progress: bool,
) -> Path:
    """A file, or a folder of the files of `like` and the small files of `others`.

    Made beside `output` and renamed.
    """
    target = Path(output)
    if target.exists():
        raise FileExistsError(
            f"{op}: output: {target} is there already; delete it or choose another"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{op}: output: cannot write {target}: folder {target.parent} does not exist; create "
            "it first"
        )
    from fasttax._base.version import __version__

    metadata = {**facts, "fasttax": __version__, "torch": torch.__version__}
    with tqdm(total=len(like), unit="tensor", desc=op, disable=None if progress else True) as bar:

        def counted(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            for item in merged(names):
                yield item
                bar.update()

        def write_file(path: Path, names: Sequence[str]) -> int:
            specs = {name: like.spec(name) for name in names}
            mapped.write_streamed(
                path, "merged weights", specs, metadata, counted(names), {"format": "pt"}
            )
            return path.stat().st_size

        if target.suffix == ".safetensors":
            write_file(target, [*like])
            return target
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
        try:
            names_of = {WEIGHTS: [*like]} if len(like.files) == 1 else like.files
            size = sum(write_file(temporary / file, names) for file, names in names_of.items())
            if len(names_of) > 1:
                weight_map = {name: file for file, names in names_of.items() for name in names}
                (temporary / INDEX).write_text(
                    json.dumps(
                        {"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2
                    ),
                    encoding="utf-8",
                )
            for file in sorted(others.folder.iterdir()) if others.folder is not None else []:
                if file.is_file() and not file.name.endswith(_NOT_COPIED):
                    shutil.copy2(file, temporary / file.name)
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
