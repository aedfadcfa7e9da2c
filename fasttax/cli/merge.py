"""`fasttax merge linear BASE ALIGNED` and `fasttax merge fisher MODEL...`: one model of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fasttax import merge
from fasttax.cli.commands import COMMANDS


def main(argv: Sequence[str]) -> int:
    """Writes the average to --output and prints what was written."""
    args = parser().parse_args(argv)
    try:
        print(_merged(args))
    except (ValueError, TypeError) as error:
        # argparse lists a command's options by way; these are all that the library may advise
        raise ValueError(str(error).replace("missing='mean'", "--missing mean")) from error
    return 0


def _merged(args: argparse.Namespace) -> Path:
    """Where the average lies."""
    if args.way == "linear":
        return merge.linear(args.base, args.aligned, args.alpha, output=args.output)
    return merge.fisher_average(
        args.models, args.fisher, weights=args.weight, missing=args.missing, output=args.output
    )


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments; `way` is "linear" or "fisher"."""
    parser = argparse.ArgumentParser(prog="fasttax merge", description=COMMANDS["merge"].summary)
    ways = parser.add_subparsers(dest="way", required=True)
    linear = ways.add_parser("linear", help="(1 - alpha) BASE + alpha ALIGNED")
    linear.add_argument(
        "base", help="a folder of safetensors as transformers saves it, or one file"
    )
    linear.add_argument("aligned", help="the same of the aligned model")
    linear.add_argument("--alpha", type=float, required=True, help="0 is BASE, 1 is ALIGNED")
    fisher = ways.add_parser("fisher", help="sum of w F MODEL over sum of w F")
    fisher.add_argument("models", nargs="+", metavar="MODEL")
    fisher.add_argument(
        "--fisher",
        action="append",
        required=True,
        metavar="FILE",
        help="once for each model, in order: what `fasttax fisher` wrote",
    )
    fisher.add_argument(
        "--weight", action="append", type=float, help="once for each model, or never (1)"
    )
    fisher.add_argument(
        "--missing",
        choices=("error", "mean"),
        default="error",
        help="tensors without a Fisher: an error, or their plain mean",
    )
    for way in (linear, fisher):
        way.add_argument("--output", required=True, help="a new folder, or a new .safetensors file")
    return parser
