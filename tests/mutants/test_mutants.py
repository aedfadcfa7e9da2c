"""The catalog of planted faults is of this source, and a sample of it is found; `make mutants`
plants them all.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import __main__ as mutants
from tests.mutants.catalog import FOLDER, Mutant, catalog, read, stale
from tests.mutants.killers import Killers, launch_of

KINDS = {"off by one", "missing barrier", "32-bit offset", "wrong merge", "dropped mask"}
CATALOG = catalog()
# what compiles in seconds: CI has no time for the rest
QUICK = [m for m in CATALOG if m.killer in ("simt fisher", "simt ewc", "simt weigh") and not m.why]
# whose faults CI plants elsewhere: FAULTS of test_cuda_*.py, and test_gpu_launches.py
ELSEWHERE = {"missing barrier", "32-bit offset"}


def test_the_catalog_is_of_this_source() -> None:
    """A kernel that is rewritten takes its faults along."""
    assert len(CATALOG) >= 100
    assert not [mutant.name for mutant in stale(CATALOG)]
    assert {m.kind for m in CATALOG} >= KINDS
    texts = Counter((m.file, m.old, m.new, m.killer) for m in CATALOG)
    assert texts.most_common(1)[0][1] == 1
    for mutant in CATALOG:
        if mutant.killer.startswith("launch"):
            launch_of(mutant)
    # of 90 %, no more than these may be without a reason that nothing finds them
    assert sum(bool(m.why) for m in CATALOG) <= len(CATALOG) // 10


def test_a_text_that_is_gone_is_stale(tmp_path: Path) -> None:
    mutant = next(m for m in CATALOG if m.file == "csrc/cuda/fisher.cuh")
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(FOLDER.parents[1] / mutant.file, path)
    assert not mutant.is_stale(tmp_path)
    mutant.plant(tmp_path)
    assert mutant.new in path.read_text()
    assert mutant.is_stale(tmp_path)
    path.unlink()
    assert mutant.is_stale(tmp_path)


def test_blocks_are_read(tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("# prose\n\n@ a/b.h | off by one | cpu kl.cpp\n- x\n-   y\n+ z\nwhy: a\nb\n")
    (mutant,) = read(file)
    assert mutant == Mutant("a/b.h", "off by one", "cpu kl.cpp", "x\n  y", "z", "a b", "some.txt:3")
    file.write_text("@ a/b.h | off by one\n- x\n")
    with pytest.raises(AssertionError, match="expected '@ file"):
        list(read(file))


def test_a_sample_has_many_kinds() -> None:
    few = mutants.sample(CATALOG, 8, seed=1)
    assert len({m.kind for m in few}) == len(few) == 8
    assert few == mutants.sample(CATALOG, 8, seed=1)
    assert few != mutants.sample(CATALOG, 8, seed=2)


def test_the_report_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    plain, said = (next(m for m in CATALOG if bool(m.why) == why) for why in (False, True))
    assert mutants.report(dict.fromkeys([plain], "found")) == 0
    assert mutants.report({plain: "survived"}) == 1
    assert "nobody says why" in capsys.readouterr().out
    assert mutants.report({said: "found"}) == 1
    found = dict.fromkeys(CATALOG[:20], "found")
    assert mutants.report({m: "found" for m in found if not m.why} | {said: "survived"}) == 0
    assert mutants.report({plain: "broken: no such thing"}) == 1


def test_one_of_each_kind_is_found(tmp_path: Path) -> None:
    """Which the catalog's own size chooses: other ones when it changes."""
    some = random.Random(len(CATALOG))
    chosen = [
        some.choice([m for m in QUICK if m.kind == kind]) for kind in sorted(KINDS - ELSEWHERE)
    ]
    killers = Killers(tmp_path)
    assert {m.name: mutants.outcome(killers, m) for m in chosen} == {
        m.name: "found" for m in chosen
    }
