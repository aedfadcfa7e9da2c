"""`fasttax tax REPORT.json`, `fasttax tax BASE CHECKPOINT...`: what checkpoints gained and lost.

`fasttax tax --published NAME` reads a published table in their place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fasttax.cli import _options
from fasttax.cli.commands import COMMANDS
from fasttax.tax import TaxReport, published
from fasttax.tax.published import NAMES

OP = "fasttax tax"


def main(argv: Sequence[str]) -> int:
    """Prints the report, then the name of each file that was asked for."""
    args = _options.parsed(parser(), argv)
    report = _report(args)
    said = report if args.published is None else published(args.published)
    _options.say(args, said)
    for path, write in ((args.html, report.html), (args.png, report.plot)):
        if path:
            _options.say(args, write(path))
    _options.write_json(OP, args.json, report.as_dict())
    return 0


def _report(args: argparse.Namespace) -> TaxReport:
    """Of one file of TaxReport's, of several of lm-evaluation-harness's, or a published one."""
    if bool(args.files) == (args.published is not None):
        raise ValueError(
            f"{OP}: expected REPORT, or --published with one of {', '.join(NAMES)}; not both"
        )
    one = len(args.files) == 1 and not Path(args.files[0]).is_dir()
    idle = [f"--{name}" for name in ("alignment", "metric", "task") if vars(args)[name]]
    if idle and (one or args.published is not None):
        raise ValueError(
            f"{OP}: {idle[0]}: expected with results of lm-evaluation-harness, the base's and a "
            f"checkpoint's, got {args.published or args.files[0]}, which says itself what "
            f"measures what; leave out {', '.join(idle)}"
        )
    if args.published is not None:
        return published(args.published).report
    if one:
        return TaxReport.load(args.files[0])
    metrics = dict(pair.split("=", 1) for pair in args.metric if "=" in pair)
    if len(metrics) < len(args.metric):
        raise ValueError("--metric: expected TASK=METRIC, as arc_easy=acc_norm")
    return TaxReport.from_lm_eval(
        args.files, alignment=args.alignment, metrics=metrics, tasks=args.task or None
    )


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(prog=OP, description=COMMANDS["tax"])
    parser.add_argument(
        "files",
        type=_options.Input,
        nargs="*",
        metavar="REPORT",
        help=(
            "one JSON: base and checkpoints with capability and alignment, and kl, distance, run, "
            "stage, step, se, seed, n, task_kl where measured; or results of lm-evaluation-harness "
            "(files or folders), the base's first"
        ),
    )
    parser.add_argument(
        "--published",
        metavar="NAME",
        choices=NAMES,
        help=f"a published table in place of a file: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--alignment",
        action="append",
        default=[],
        metavar="TASK",
        help="a task of the harness that measures alignment, once for each (none: no gain)",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="TASK=METRIC",
        help="another metric of a task than the first that the harness lists",
    )
    parser.add_argument(
        "--task", action="append", metavar="TASK", help="a task to read, once for each (all)"
    )
    parser.add_argument(
        "--html", type=_options.Output, metavar="FILE", help="write one self-contained page"
    )
    parser.add_argument(
        "--png", type=_options.Output, metavar="FILE", help="write the figure (needs matplotlib)"
    )
    parser.add_argument(
        "--json",
        type=_options.Output,
        metavar="FILE",
        help="write the measurements with tax, gain, frontier and fits",
    )
    return parser
