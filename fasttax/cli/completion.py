"""`fasttax completion SHELL`: a script of shtab's that completes commands, options and files.

For bash: `fasttax completion bash > ~/.local/share/bash-completion/completions/fasttax`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from fasttax.cli import _options
from fasttax.cli.commands import COMMANDS

SHELLS = ("bash", "zsh", "tcsh")
PATHS = (Path, _options.Input, _options.Output, _options.NewOutput)  # types of arguments


def main(argv: Sequence[str]) -> int:
    """Prints the script."""
    args = _options.parsed(parser(), argv)
    import shtab

    print(shtab.complete(whole(), args.shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fasttax completion",
        description="Print what completes fasttax's commands, options and files in a shell.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def whole() -> argparse.ArgumentParser:
    """Of `fasttax` itself: every command's parser under one."""
    every = argparse.ArgumentParser(prog="fasttax")
    every.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = every.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        made: argparse.ArgumentParser = importlib.import_module(f"fasttax.cli.{name}").parser()
        command = commands.add_parser(name, parents=[made], add_help=False, help=summary)
        _complete_files(command)
    commands.add_parser("help", help="list a command's options").add_argument(
        "command", choices=tuple(COMMANDS)
    )
    return every


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Has shtab complete the names of files where a file or folder is expected."""
    import shtab

    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                _complete_files(choice)
        elif action.type in PATHS or action.dest == "model":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
