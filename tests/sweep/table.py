"""docs/architectures.md from the rows of a sweep."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from importlib.metadata import version

from tests.sweep.result import CHECKS, CRASH, FAMILIES, NONE, REFUSED, RIGHT, WRONG, Row

HEAD = """# Every architecture of transformers, tried

Each class below was built tiny and random, in float64, and asked:

- **update**, **observe**: is the Fisher of `DiagonalFisher` the definition's, for every trainable
  parameter to a relative error of 1e-5? The definition is a loop over single examples, each
  example's own summed loss differentiated by autograd and squared.
- **FullKL, self** and **FullKL**: in a step of transformers' Trainer, is the KL to a copy of the
  policy 0, and that to another model the KL of the two models' own logits?

`right` is that. `refused` is an error of fasttax's own, before a number comes, that names the
parameter or module and a way out; where the way out of `update` is `fallback="loop"`, it was tried
and has to be right too. `-` is a check that does not apply to the class. `WRONG` (another number
without a word) and `CRASH` (any other error) are faults, of which there must be none.
"""


def markdown(rows: list[Row], command: str, listed: int) -> str:
    """The page: how it was made, counts, tables, faults, refusals, what was not built."""
    built = [r for r in rows if not r.unbuilt]
    parts = [HEAD, _made(rows, command, listed), _counts(built)]
    for family in FAMILIES:
        chosen = [r for r in built if r.family == family]
        if chosen:
            parts.append(f"## {_title(family)}\n\n{_table(chosen)}")
    parts += [_section("Faults", _grouped(built, (WRONG, CRASH)))]
    parts += [_section("Refusals", _grouped(built, (REFUSED,)))]
    unbuilt = [f"- {r.name}: {_escaped(r.unbuilt, 160)}" for r in rows if r.unbuilt]
    parts.append(_section("Not built", unbuilt))
    return "\n".join(part for part in parts if part)


def _made(rows: list[Row], command: str, listed: int) -> str:
    built = sum(not row.unbuilt for row in rows)
    day = datetime.date.today().isoformat()
    return (
        f"{built} classes built, of {len(rows)} tried and {listed} that transformers lists in "
        f"these mappings. Made by `{command}` on {day} with fasttax {version('fasttax')}, "
        f"transformers {version('transformers')}, torch {version('torch')}.\n"
    )


def _counts(built: list[Row]) -> str:
    kinds = (RIGHT, REFUSED, WRONG, CRASH)
    lines = [f"| | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for check in CHECKS:
        counts = Counter(r.outcomes[check].kind for r in built if check in r.outcomes)
        lines.append(f"| {_label(check)} | {' | '.join(str(counts[k]) for k in kinds)} |")
    return "\n".join(lines) + "\n"


def _label(check: str) -> str:
    names = {"kl_self": "FullKL, self", "kl": "FullKL", "advice": 'update, fallback="loop"'}
    return names.get(check, check)


def _title(family: str) -> str:
    mappings = (m.lower().replace("_", " ") for m in FAMILIES[family])
    return f"{family}: {', '.join(mappings)}"


def _table(rows: list[Row]) -> str:
    lines = ["| class | update | observe | FullKL, self | FullKL |", "|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: r.name.lower()):
        update = _kind(r, "update")
        if "advice" in r.outcomes:
            update += f"; loop {_kind(r, 'advice')}"
        cells = [r.name, update, *(_kind(r, check) for check in ("observe", "kl_self", "kl"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kind(row: Row, check: str) -> str:
    return row.outcomes[check].kind if check in row.outcomes else NONE


def _grouped(rows: list[Row], kinds: tuple[str, ...]) -> list[str]:
    """One line a message, numbers and names of layers aside, with the classes that it came for."""
    found: dict[str, tuple[str, list[str]]] = {}
    for r in rows:
        for check, outcome in r.outcomes.items():
            if outcome.kind in kinds:
                key = re.sub(r"[\w.]*\.[\w.]+|\d+|'\w+'", "#", outcome.detail)[:60]
                found.setdefault(key, (outcome.detail, []))[1].append(f"{r.name} ({check})")
    return [f"- {', '.join(names)}: {_escaped(text, 400)}" for text, names in found.values()]


def _escaped(text: str, length: int) -> str:
    short = text if len(text) <= length else f"{text[:length]} ..."
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""]) if lines else ""
