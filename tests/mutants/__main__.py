"""Plants each fault of the catalog in a copy of the source and says who found it (`make mutants`).

Ends with 1 where fewer than 90 % are found, one that is not found has no reason, one that is found
has one, or one is stale.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutants.catalog import Mutant, catalog, stale
from tests.mutants.killers import Broken, Killers

LEAST = 0.9


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of them, as many as can be of kinds of their own."""
    shuffled = random.Random(seed).sample(mutants, len(mutants))
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int, Mutant]] = []
    for mutant in shuffled:
        turns.append((seen[mutant.kind], len(turns), mutant))
        seen[mutant.kind] += 1
    return [mutant for _, _, mutant in sorted(turns, key=lambda turn: turn[:2])[:count]]


def outcome(killers: Killers, mutant: Mutant) -> str:
    """ "found", "survived", or what is wrong with it."""
    try:
        return "found" if killers.finds(mutant) else "survived"
    except Broken as error:
        return f"broken: {error}"


def report(outcomes: dict[Mutant, str]) -> int:
    """Prints the shares and what is to be looked at; the status."""
    kinds: Counter[str] = Counter(m.kind for m in outcomes)
    found: Counter[str] = Counter(m.kind for m, said in outcomes.items() if said == "found")
    print()
    for kind, count in sorted(kinds.items()):
        print(f"{kind:22} {found[kind]:3} of {count:3}")
    share = sum(found.values()) / max(len(outcomes), 1)
    print(f"{'all':22} {sum(found.values()):3} of {len(outcomes):3} found: {100 * share:.1f} %")
    wrong = share < LEAST
    for mutant, said in outcomes.items():
        if said == "survived":
            print(f"survived: {mutant.name}\n    {mutant.why or 'nobody says why'}")
            wrong |= not mutant.why
        elif said != "found":
            print(f"{mutant.name}: {said}")
            wrong = True
        elif mutant.why:
            print(f"found, though it is said why nothing finds it: {mutant.name}")
            wrong = True
    return int(wrong)


def main() -> int:
    """Runs all, a sample, or those with a word in their names."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, help="so many, of as many kinds as there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", help="those with this in their name or killer, or with another"
    )
    given = parser.parse_args()
    left_behind = stale(catalog())
    for mutant in left_behind:
        print(f"stale, its text is not in the file once: {mutant.name}\n    {mutant.old!r}")
    words = given.only or [""]
    chosen = [
        m
        for m in catalog()
        if m not in left_behind and any(word in f"{m.name} {m.killer}" for word in words)
    ]
    if given.sample:
        chosen = sample(chosen, given.sample, given.seed)
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        killers = Killers(Path(folder))
        for mutant in chosen:
            begin = time.perf_counter()
            outcomes[mutant] = outcome(killers, mutant)
            taken = time.perf_counter() - begin
            said = outcomes[mutant].splitlines()[0]
            print(f"{said:9} {taken:5.1f} s  {mutant.name}", flush=True)
    return report(outcomes) | bool(left_behind)


if __name__ == "__main__":
    sys.exit(main())
