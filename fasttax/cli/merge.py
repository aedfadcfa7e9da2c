"""`fasttax merge linear BASE ALIGNED` and `fasttax merge fisher MODEL...`: one model of several.

`fasttax merge config` writes what mergekit reads, `fasttax merge run` makes what such a file asks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fasttax import merge
from fasttax.cli import _options
from fasttax.cli.commands import COMMANDS
from fasttax.merge.mergekit import METHODS

OP = "fasttax merge"


def main(argv: Sequence[str]) -> int:
    """Writes the average to --output and prints what was written."""
    args = _options.parsed(parser(), argv)
    try:
        output = _merged(args)
    except (ValueError, TypeError) as error:
        # argparse lists a command's options by way; these are all that the library may advise
        raise ValueError(str(error).replace("missing='mean'", "--missing mean")) from error
    _options.say(args, output)
    given = {key: value for key, value in vars(args).items() if key not in ("json", "quiet")}
    _options.write_json(OP, args.json, {**given, "output": str(output)})
    return 0


def _merged(args: argparse.Namespace) -> Path:
    """Where the average, or the configuration, lies."""
    if args.way == "run":
        asked = merge.read_mergekit(args.config)
        if args.json is not None:
            _options.check_outputs(OP, [args.json], [str(asked.base), str(asked.aligned)])
        return merge.linear(
            asked.base,
            asked.aligned,
            asked.alpha,
            output=args.output,
            progress=_options.shown(args),
        )
    if args.way == "config":
        return merge.write_mergekit(
            args.output,
            args.base,
            args.aligned,
            _alpha(args.alpha),
            method=args.method,
            density=args.density,
        )
    if args.way == "linear":
        return merge.linear(
            args.base,
            args.aligned,
            _alpha(args.alpha),
            output=args.output,
            progress=_options.shown(args),
        )
    return merge.fisher_average(
        args.models,
        args.fisher,
        weights=args.weight,
        missing=args.missing,
        floor=args.floor,
        normalize=args.normalize,
        output=args.output,
        progress=_options.shown(args),
    )


def _alpha(words: Sequence[str]) -> float | dict[str, float]:
    """A number, or PATTERN=NUMBER for each.

    Raises:
        ValueError: neither.
    """
    pairs = [word.rpartition("=") for word in words]
    try:
        if len(words) == 1 and not pairs[0][1]:
            return float(words[0])
        if all(equals and pattern for pattern, equals, _ in pairs):
            return {pattern: float(value) for pattern, _, value in pairs}
    except ValueError:
        pass  # said below
    raise ValueError(
        f"fasttax merge linear: --alpha: expected a number, or PATTERN=NUMBER once for each "
        f"pattern, as --alpha '*.mlp.*=0.5' --alpha '*=1', got {' '.join(words)}"
    )


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments; `way` is the first of them."""
    parser = argparse.ArgumentParser(prog="fasttax merge", description=COMMANDS["merge"])
    ways = parser.add_subparsers(dest="way", metavar="TOOL", required=True)
    linear = ways.add_parser("linear", help="(1 - alpha) BASE + alpha ALIGNED")
    config = ways.add_parser("config", help="a configuration for mergekit-yaml: linear, TIES, DARE")
    for way in (linear, config):
        way.add_argument(
            "base",
            type=_options.Input,
            help="a folder of safetensors as transformers saves it, or one file",
        )
        way.add_argument("aligned", type=_options.Input, help="the same of the aligned model")
        way.add_argument(
            "--alpha",
            action="append",
            required=True,
            metavar="NUMBER or PATTERN=NUMBER",
            help="0 is BASE, 1 is ALIGNED; with patterns the first that a name fits decides",
        )
    config.add_argument(
        "--method", choices=METHODS, default="ties", help="mergekit's (default ties)"
    )
    config.add_argument(
        "--density", type=float, help="share of the task vector that is kept (default 0.5)"
    )
    config.add_argument(
        "-o",
        "--output",
        type=_options.Output,
        required=True,
        metavar="FILE",
        help="the YAML to write",
    )
    run = ways.add_parser("run", help="the merge that a mergekit configuration asks for: linear")
    run.add_argument("config", type=_options.Input, metavar="FILE", help="mergekit's YAML")
    fisher = ways.add_parser("fisher", help="sum of w F MODEL over sum of w F")
    fisher.add_argument("models", type=_options.Input, nargs="+", metavar="MODEL")
    fisher.add_argument(
        "--fisher",
        type=_options.Input,
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
        help="tensors without a Fisher: an error, or their plain mean (default error)",
    )
    fisher.add_argument(
        "--floor", type=float, default=0.0, help="Fishers below it are raised to it (default 0)"
    )
    fisher.add_argument(
        "--normalize", choices=("l2",), help="divide each Fisher by its norm over all parameters"
    )
    for way in (linear, fisher, run):
        way.add_argument(
            "-o",
            "--output",
            type=_options.NewOutput,
            metavar="PATH",
            required=True,
            help="a new folder, or a new .safetensors file",
        )
    for way in (linear, config, run, fisher):
        _options.add_json(way)
        _options.add_quiet(way)
    return parser
