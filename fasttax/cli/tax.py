"""`fasttax tax REPORT.json`: what checkpoints gained and lost, printed and written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fasttax.cli.commands import COMMANDS
from fasttax.tax import TaxReport


def main(argv: Sequence[str]) -> int:
    """Prints the report, then the name of each file that was asked for."""
    args = parse(argv)
    report = TaxReport.load(args.report)
    print(report)
    for path, write in (
        (args.html, report.html),
        (args.png, report.plot),
        (args.json, report.save),
    ):
        if path:
            print(write(path))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="fasttax tax", description=COMMANDS["tax"].summary)
    parser.add_argument(
        "report",
        help=(
            "JSON: base and checkpoints with capability and alignment, and kl, distance, run, "
            "stage, step where measured"
        ),
    )
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="write the figure (needs matplotlib)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the measurements with tax, gain, frontier and fits"
    )
    return parser.parse_args(argv)
