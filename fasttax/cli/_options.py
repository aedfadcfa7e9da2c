"""What commands have in common: options, files that they write, the library's advice in words."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttax._base import checks, json_results, placed
from fasttax._base.json_results import STDOUT

ARGUMENT = re.compile(r"\b(?P<name>[a-z]+(?:_[a-z]+)*)=(?:'(?P<value>[^'\s]*)')?(?=[\s,;:.()]|$)")


def in_options(text: str, parser: argparse.ArgumentParser) -> str:
    """`text` with each `name=` or `name='value'` that is an option of the command as that option.

    >>> in_options("leave them out with params=, or pass fallback='loop'", parser)
    "leave them out with --params, or pass --fallback loop"
    """
    # the formatter's usage lists exactly the options that a user can give
    offered = set(re.findall(r"--[a-z-]+", parser.format_usage()))

    def option(found: re.Match[str]) -> str:
        flag = "--" + found["name"].replace("_", "-")
        if flag not in offered:
            return found[0]
        return " ".join(part for part in (flag, found["value"]) if part)

    return ARGUMENT.sub(option, text)


class Input(str):
    """A file, folder or Hub id that a command reads: `type=Input` of its argument."""


class Output(str):
    """A file that it writes: `type=Output`."""


class NewOutput(Output):
    """A file or folder that it makes where none is."""


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, whose outputs can be written and are none of the inputs.

    Every command asks for its own here, before it reads anything.

    Raises:
        OSError: a folder is not there, or takes no file; an output is a folder's name.
        ValueError: an output is another output or what is read.
    """
    args = parser.parse_args(argv)
    op = getattr(args, "parser", parser).prog  # of a tool of `fasttax kl` its own
    check_outputs(op, _of(Output, args), _of(Input, args))
    return args


def _of(kind: type[str], args: argparse.Namespace) -> Iterator[str]:
    """The arguments of a kind, lists' too."""
    for value in vars(args).values():
        yield from (
            one for one in (value if isinstance(value, list) else [value]) if isinstance(one, kind)
        )


def add_output(parser: argparse.ArgumentParser, default: str, meaning: str) -> None:
    """`--output`, the file that a command writes."""
    parser.add_argument(
        "-o",
        "--output",
        type=Output,
        default=default,
        metavar="FILE",
        help=f"{meaning} (default {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, which `write_json` writes."""
    parser.add_argument(
        "--json", type=Output, metavar="FILE", help="write the result as JSON, too; - prints it"
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, which `shown` reads."""
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bars, of which files get none anyway"
    )


def check_least(op: str, args: argparse.Namespace, **least: int) -> None:
    """That options, by their names in `args`, are at least so much where they are given.

    Raises:
        ValueError: one is less.
    """
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise checks.fail(op, f"--{name.replace('_', '-')}", f"at least {low}", value)


def shown(args: argparse.Namespace) -> bool:
    """Whether to show progress: on a terminal, unless asked not to."""
    return not args.quiet and sys.stderr.isatty()


def say(args: argparse.Namespace, text: object) -> None:
    """Prints what a person reads: to stderr where --json takes stdout for itself."""
    print(text, file=sys.stderr if args.json == STDOUT else sys.stdout, flush=True)


def check_outputs(op: str, outputs: Iterable[str], inputs: Iterable[str]) -> None:
    """That files can be written where they are to go, which is tried, over nothing that is read.

    Raises:
        OSError: a folder is not there, or takes no file; a name is a folder's.
        ValueError: two are one file's, or one is an input's.
    """
    named: set[Path] = set()
    read = list(inputs)
    for path in outputs:
        if path == STDOUT:
            continue
        new = isinstance(path, NewOutput)  # which says itself that something is there
        target = (placed.in_a_folder if new else placed.for_file)(op, path)
        placed.check_not_read(op, path, read)
        if target.resolve() in named:
            raise checks.fail(op, path, "a file for each output", "the same one twice")
        named.add(target.resolve())
        try:
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            raise OSError(
                f"{op}: cannot write {target}: {error.strerror}; give a folder that takes files"
            ) from None


def write_json(op: str, path: str | None, content: Any) -> None:
    """The result, written whole or not at all, and where; "-" prints it; nothing without a path.

    JSON has no inf and nan: they are null.
    """
    if path:
        where = json_results.put(op, path, json_results.text_of(content))
        if where:
            print(where)


def brief(error: Exception) -> str:
    """The first line of an error, whose others explain the Hub."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
