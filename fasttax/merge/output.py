"""Merged weights written as a file, or as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fasttax._base import files, mapped, placed
from fasttax._base.version import __version__
from fasttax.merge.weights import INDEX, WEIGHTS, Weights

Merged = Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]]
CONFIG = "config.json"
TIED = "tie_word_embeddings"
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers' names of it in a config, new and old
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


@dataclass(frozen=True)
class Output:
    """A file, or a folder of the files of `like` and the small files of `others`."""

    path: Path
    like: Weights
    others: Weights
    metadata: Mapping[str, Any]

    def write(self, merged: Merged) -> None:
        """Made beside its place, and renamed; `merged` gives the tensors of these names."""
        if self.path.suffix == ".safetensors":
            self._write_file(self.path, [*self.like], merged)
            return
        names_of = self.like.files
        if len(names_of) == 1:
            names_of = {WEIGHTS: [*self.like]}
        with placed.folder("merge", self.path) as temporary:
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
                self._correct(temporary / CONFIG)

    def _write_file(self, path: Path, names: Sequence[str], merged: Merged) -> int:
        """Its size in bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = {name: self.like.specs[name] for name in names}
        mapped.write_streamed(
            path, "merged weights", specs, self.metadata, merged(names), {"format": "pt"}
        )
        return path.stat().st_size

    def _correct(self, path: Path) -> None:
        """Has the config say of the weights what transformers loads them by.

        Their dtype, and whether the head is tied where the weights come from.
        """
        counts: Counter[torch.dtype] = Counter()
        for dtype, shape in self.like.specs.values():
            if dtype.is_floating_point:
                counts[dtype] += max(1, torch.Size(shape).numel())
        if not counts or not path.is_file():
            return
        text = str(counts.most_common(1)[0][0]).removeprefix("torch.")
        config = _config(path)
        changed = _with_dtype(config, text)
        if self.like.folder is not None and (self.like.folder / CONFIG).is_file():
            like = _config(self.like.folder / CONFIG)
            changed = {k: v for k, v in changed.items() if k != TIED}
            changed |= {k: v for k, v in like.items() if k == TIED}
        if changed != config:
            path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    """A config, which must be one.

    Raises:
        ValueError: it is none; names the file.
    """
    return files.read_json("merge", path, "copy it anew")


def _with_dtype(config: Any, text: str) -> Any:
    """A config, and those within it, with another dtype where they say one."""
    if not isinstance(config, dict):
        return config
    return {
        key: text if key in DTYPE_KEYS and isinstance(value, str) else _with_dtype(value, text)
        for key, value in config.items()
    }


def _check_new(op: str, path: Path) -> None:
    """An error where `path` is there already, or its folder is not."""
    if path.exists():
        raise FileExistsError(f"{op}: output: {path} is there already; delete it or choose another")
    placed.for_file(f"{op}: output", path)


def write(
    op: str,
    output: str | os.PathLike[str],
    like: Weights,
    merged: Merged,
    others: Weights,
    facts: Mapping[str, Any],
    progress: bool,
) -> Path:
    """`Output` at `output`, under a bar; `facts` go into the files' metadata."""
    path = placed.path_of(op, "output", output)
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


def _copy_others(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copy2(file, target / file.name)
