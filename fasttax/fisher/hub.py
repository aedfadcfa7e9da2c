"""Fishers on the Hugging Face Hub: a file or a folder of files, and their repository's card."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fasttax._base import checks, hub

FILE, FOLDER = "fisher.safetensors", "fisher"
# of the metadata, in the card's table where they are there
FACTS = (
    *(
        "model",
        "estimator",
        "structure",
        "labels",
        "unit",
        "examples",
        "tokens",
        "normalize",
        "storage",
    ),
    *("relative_error", "kronecker_error", "scaled_by", "model_hash", "fasttax", "torch"),
)
CARD = """---
library_name: fasttax
tags:
- fasttax
- fisher-information
---

# {name}

A Fisher information estimate of [fasttax](https://pypi.org/project/fasttax): which weights matter
for what a model knows.

| | |
|---|---|
{rows}

```python
import fasttax

fisher = fasttax.{kind}.from_pretrained("{repo_id}")
ewc = fasttax.EWC(model, fisher, strength=10.0)
```
"""


E = TypeVar("E", bound="OnHub")


class OnHub(ABC):
    """An estimate that `save` writes and `load` reads, on the Hub."""

    metadata: dict[str, Any]
    _sharded = False  # whether `save` writes folders of files, too

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a path."""

    @staticmethod
    @abstractmethod
    def load(path: str | os.PathLike[str]) -> Any:
        """What `save` wrote."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        sharded: bool = False,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Saves it to a repository of the Hugging Face Hub, as one commit.

        A repository that is not there is made. One without a README gets a card with the metadata;
        another card stays as it is, so that a model's own repository can hold its Fisher. Under
        torch.distributed every rank calls it, as whole tensors need all, and rank 0 pushes.

        Args:
            repo_id: "owner/name".
            filename: in the repository; None: fisher.safetensors, or fisher where sharded.
            sharded: a folder of files, as `FisherEstimate.save` has it.
            private: of a repository that is made; None: as the owner's settings have it.
            token: None: the one that `hf auth login` or HF_TOKEN has set.
            revision: a branch, made where it is not there; None: main.
            commit_message: None: says what was added.

        Returns:
            The commit's URL; "" on ranks that don't push.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
            ValueError: there is no token, or no such name; a KroneckerEstimate in a folder of
                files.
            OSError: the Hub refuses it, or can't be reached.

        Example:
            >>> fisher.push_to_hub("me/smollm2-fisher")
            >>> fasttax.FisherEstimate.from_pretrained("me/smollm2-fisher")
        """
        kind = type(self).__name__
        op = f"{kind}.push_to_hub"
        name = (FOLDER if sharded else FILE) if filename is None else filename
        if Path(name).name != name or not name:
            raise checks.fail(op, "filename", "a name in the repository, without folders", name)
        if sharded and not self._sharded:
            raise checks.fail(op, "sharded", f"False, for a {kind} is one file", "True")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / name
            save: Any = self.save
            save(target, **({"sharded": True} if sharded else {}))
            if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
                return ""
            return hub.push(
                op,
                repo_id,
                Path(folder),
                card(kind, repo_id, self.metadata),
                private=private,
                token=token,
                revision=revision,
                message=commit_message or f"Add {name} ({kind} of fasttax)",
                replaced=[f"{name}/*"] if target.is_dir() else [],
            )

    @classmethod
    def from_pretrained(
        cls: type[E],
        source: str | os.PathLike[str],
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> E:
        """From a repository of the Hugging Face Hub, or from a folder or file here, as `load`.

        Args:
            source: "owner/name", or a path.
            filename: in the repository or folder; None: fisher.safetensors, or the folder fisher.
            revision: a branch, tag or commit.
            token: None: the one that `hf auth login` or HF_TOKEN has set.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
            FileNotFoundError: there is no such file in it.
            OSError: the Hub has no such repository, or can't be reached.
            ValueError: as `load`.

        Example:
            >>> fisher = fasttax.FisherEstimate.from_pretrained("me/smollm2-fisher")
        """
        op = f"{cls.__name__}.from_pretrained"
        names = (FILE, FOLDER) if filename is None else (filename,)
        path = hub.fetched(op, os.fspath(source), names, revision=revision, token=token)
        read: E = cls.load(path)
        return read


def card(kind: str, repo_id: str, facts: Mapping[str, Any]) -> str:
    """The README of a repository that holds an estimate, out of its metadata."""
    known = {name: facts[name] for name in FACTS if facts.get(name) is not None}
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in known.items())
    return CARD.format(name=repo_id.rpartition("/")[2], rows=rows, kind=kind, repo_id=repo_id)


def cell(value: Any) -> str:
    """A value in a row of a table, a float in four digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
