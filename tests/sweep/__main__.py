"""`python -m tests.sweep`: every class of transformers that can be built tiny offline.

python -m tests.sweep --only LlamaForCausalLM FalconForCausalLM
python -m tests.sweep --jobs 2 --write docs/architectures.md
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

from tests.sweep import rows, table
from tests.sweep.models import FAMILIES, cases


def main(argv: list[str]) -> int:
    """Prints a row a class; 1 where one of them is wrong or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of classes, or patterns")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--json", type=Path, help="a file for the rows, one a line")
    options = parser.parse_args(argv)
    chosen = [
        case
        for case in cases()
        if case.family in options.family and any(fnmatchcase(case.name, p) for p in options.only)
    ]
    if not chosen:
        parser.error(f"no class of transformers matches {' '.join(options.only)}")
    rows.prepare()
    found = []
    with (options.json or Path(os.devnull)).open("w") as out:
        for row in rows.sweep(chosen, options.jobs):
            found.append(row)
            out.write(row.to_json() + "\n")
            out.flush()
            print(line(row), flush=True)
    if options.write is not None:
        command = f"python -m tests.sweep --write {options.write}"
        options.write.write_text(table.markdown(found, command))
    faults = [fault for row in found for fault in row.faults]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def line(row: rows.Row) -> str:
    """A row in the terminal."""
    if row.unbuilt:
        return f"{row.name:48s} not built: {row.unbuilt}"
    kinds = " ".join(f"{check} {row.outcomes[check].kind:8s}" for check in row.outcomes)
    return f"{row.name:48s} {row.seconds:5.1f} s  {kinds}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
