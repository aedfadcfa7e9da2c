"""The tax of every method at equal alignment: `fasttax demo --tiny`, kept.

Writes bench/results/cpu-tax.json (without the runs' curves) and the tables of docs/ that it makes.
What else is given goes to the demo, as `--seeds 5`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import evidence, marked
from fasttax import demo
from fasttax.demo.settings import cache_folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu-tax.json"
LEFT_OUT = ("curve", "changes")  # of a point: long, and in the demo's own results.json
COMMAND = "python -m bench.bench_tax"


def keep(results: dict[str, Any], table: str, options: Sequence[str]) -> None:
    """Writes what a finished demo found into the repository."""
    points = [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in results["points"]]
    command = " ".join([COMMAND, *options])
    kept = {"command": command, **results, "points": points}
    text = json.dumps(kept, indent=1) + "\n"
    for here, name in ((f"{ROOT}/", ""), (str(cache_folder()), "~/.cache/fasttax")):
        text = text.replace(here, name)
    RESULTS.write_text(text, encoding="utf-8")
    said = "\n".join(f"- {sentence}" for sentence in results["verdicts"])
    section = f"{table.strip()} Made by `{command}`.\n\n{said}"
    marked.renew(ROOT / "docs" / "tax.md", "tax", section)


def main(options: Sequence[str]) -> int:
    """Runs the demo and keeps a complete one; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        code = demo.main(["--tiny", *options, "--output", folder])
        if code == 0:
            results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
            results["settings"]["output"] = "a temporary folder"
            keep(results, Path(folder, "table.md").read_text(encoding="utf-8"), options)
            evidence.renew()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
