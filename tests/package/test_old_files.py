"""Files that releases wrote are read by this one, to the same numbers.

`python -m tests.package.test_old_files` adds this release's to tests/package/written, once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttax import EWC, FisherEstimate, KroneckerEstimate, __version__
from fasttax.integrations.reference import TopKReference
from fasttax.tax import TaxReport
from tests.faults.written import KINDS, Model

WRITTEN = Path(__file__).parent / "written"
KEPT = [kind for kind in KINDS if kind != "checkpoint"]  # of a run, which ends under one release
FACTS = "facts.json"


def totals(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Of each tensor, whose shape is in its name, a sum in which every place counts for itself."""
    out = {}
    for name, t in tensors.items():
        places = torch.arange(1, t.numel() + 1, dtype=torch.float64)
        out[f"{name} {list(t.shape)}"] = float((t.double().flatten() * places).sum())
    return out


def facts(read: Any) -> dict[str, Any]:
    """What a file says, as JSON has it."""
    if isinstance(read, FisherEstimate):
        return {**totals(dict(read)), "examples": read.metadata["examples"]}
    if isinstance(read, KroneckerEstimate):
        pairs = {f"{n} {i}": t for n, pair in read.factors.items() for i, t in enumerate(pair)}
        return {**totals(pairs), **totals(dict(read.diagonal))}
    if isinstance(read, EWC):
        moved = Model()
        with torch.no_grad():
            for p in moved.parameters():
                p.mul_(1.5)
        penalty = float(read.on(moved).penalty().detach())
        return {**totals(read.anchor), "strength": read.strength, "penalty": penalty}
    if isinstance(read, TopKReference):
        return totals({"ids": read.ids, "logp": read.logp, "tokens": read.tokens})
    if isinstance(read, TaxReport):
        return dict(read.as_dict())
    return totals(read)


def releases() -> list[Path]:
    return sorted(path.parent for path in WRITTEN.glob(f"*/{FACTS}"))


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("release", releases(), ids=lambda path: path.name)
def test_reads_what_a_release_wrote(release: Path, kind: str) -> None:
    said = json.loads((release / FACTS).read_text())[kind]
    found = json.loads(json.dumps(facts(KINDS[kind].read(release / kind))))
    assert found.keys() == said.keys()
    for name, value in said.items():
        expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert found[name] == expected, name


def test_every_release_that_was_has_files() -> None:
    assert releases(), WRITTEN


def main() -> None:
    """Writes this release's, if it has none."""
    folder = WRITTEN / __version__
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    said = {}
    for kind in KEPT:
        KINDS[kind].write(folder / kind)
        said[kind] = facts(KINDS[kind].read(folder / kind))
    (folder / FACTS).write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
