"""Published measurements of the tax, as reports: InstructGPT's and Llama 2's tables.

A file of `tables/` is a report with the `sources` of its numbers and `notes` on how they compare.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fasttax._base import checks
from fasttax.tax.report import TaxReport

TABLES = Path(__file__).with_name("tables")
NAMES = tuple(sorted(path.stem for path in TABLES.glob("*.json")))


@dataclass(frozen=True)
class Published:
    """A report with where its numbers come from.

    Example:
        >>> found = fasttax.tax.published("llama2-7b")
        >>> sources, notes = found.sources, found.notes
        >>> path = found.report.html("llama2.html")
    """

    report: TaxReport
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        said = [*(f"Source: {s}" for s in self.sources), *(f"Note: {n}" for n in self.notes)]
        return "\n".join([str(self.report), "", *said])


def published(name: str) -> Published:
    """A published table, as a report with its sources.

    Args:
        name: such as "instructgpt-175b" or "llama2-7b".

    Raises:
        ValueError: another name; it lists those there are.

    Example:
        >>> print(fasttax.tax.published("instructgpt-175b"))
        InstructGPT 175B...
    """
    path = TABLES / f"{checks.choice('tax.published', 'name', name, NAMES)}.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    return Published(TaxReport.load(path), tuple(given["sources"]), tuple(given["notes"]))
