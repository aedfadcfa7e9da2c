"""Fishers on the Hugging Face Hub: a file or a folder of files, and their repository's card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def push(
    op: str,
    repo_id: str,
    save: Callable[[Path], None],
    facts: Mapping[str, Any],
    filename: str,
    options: Mapping[str, Any],
) -> str:
    """What `save` writes, under `filename` in a repository; returns the commit's URL.

    Under torch.distributed every rank saves, as whole tensors need all, and rank 0 pushes; others
    return "".
    """
    if Path(filename).name != filename or not filename:
        raise checks.fail(op, "filename", "a name in the repository, without folders", filename)
    kind = op.partition(".")[0]
    message = options.get("commit_message") or f"Add {filename} ({kind} of fasttax)"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / filename
        save(target)
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return ""
        return hub.push(
            op,
            repo_id,
            Path(folder),
            card(kind, repo_id, facts),
            private=options.get("private"),
            token=options.get("token"),
            revision=options.get("revision"),
            message=message,
            replaced=[f"{filename}/*"] if target.is_dir() else [],
        )


def card(kind: str, repo_id: str, facts: Mapping[str, Any]) -> str:
    """The README of a repository that holds an estimate, out of its metadata."""
    known = {name: facts[name] for name in FACTS if facts.get(name) is not None}
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in known.items())
    return CARD.format(name=repo_id.rpartition("/")[2], rows=rows, kind=kind, repo_id=repo_id)


def cell(value: Any) -> str:
    """A value in a row of a table, a float in four digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def fetched(
    op: str,
    source: str | os.PathLike[str],
    filename: str | None,
    revision: str | None,
    token: str | None,
) -> Path:
    """Where an estimate lies, downloaded if it is the Hub's."""
    names = (FILE, FOLDER) if filename is None else (filename,)
    return hub.fetched(op, os.fspath(source), names, revision=revision, token=token)
