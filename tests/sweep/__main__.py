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

from tests.sweep import rows, table
from tests.sweep.children import sweep
from tests.sweep.models import cases
from tests.sweep.result import FAMILIES, Row


def main(argv: list[str]) -> int:
    """Prints a row a class; 1 where one of them is wrong or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of classes, or patterns")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--rows", type=Path, help="a file that keeps the rows, one a line")
    parser.add_argument("--resume", action="store_true", help="take what --rows has as it is")
    options = parser.parse_args(argv)
    chosen = [
        case
        for case in cases()
        if case.family in options.family and any(fnmatchcase(case.name, p) for p in options.only)
    ]
    if not chosen:
        parser.error(f"no class of transformers matches {' '.join(options.only)}")
    known = _known(options.rows) if options.resume and options.rows else {}
    found = [known[case.name] for case in chosen if case.name in known]
    warnings.filterwarnings("ignore")
    rows.prepare()
    with (options.rows or Path(os.devnull)).open("w") as out:
        out.writelines(row.to_json() + "\n" for row in known.values())
        for row in sweep(rows.row, [c for c in chosen if c.name not in known], options.jobs):
            found.append(row)
            out.write(row.to_json() + "\n")
            out.flush()
            print(line(row), flush=True)
    if options.write is not None:
        command = f"python -m tests.sweep --write {options.write}"
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(table.markdown(found, command, len(cases())))
    faults = [fault for row in found for fault in row.faults]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def _known(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    found = (Row.from_json(text) for text in path.read_text().splitlines())
    return {row.name: row for row in found}


def line(row: Row) -> str:
    """A row in the terminal."""
    if row.unbuilt:
        return f"{row.name:48s} not built: {row.unbuilt}"
    kinds = " ".join(f"{check} {row.outcomes[check].kind:8s}" for check in row.outcomes)
    return f"{row.name:48s} {row.seconds:5.1f} s  {kinds}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
