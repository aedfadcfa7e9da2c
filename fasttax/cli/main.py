"""Picks the command and turns its errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import torch

from fasttax._base.version import __version__
from fasttax.cli import _extras
from fasttax.cli.commands import COMMANDS

USER_ERROR = 2  # the exit code of what the user can put right
CLOSED_PIPE = 141  # 128 and the number of SIGPIPE
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it
HELP = ("-h", "--help", "help")


def usage() -> str:
    """The commands, a line each."""
    lines = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: fasttax COMMAND [options]\n\ncommands:\n{lines}\n\n"
        "`fasttax help COMMAND` lists a command's options, `fasttax --version` says the version.\n"
        "exit codes: 0; 2 what you can put right; 130 after Ctrl-C; 141 where the reader left."
    )


def complain(text: str) -> int:
    """Prints to stderr what the user can put right, and gives that error's exit code."""
    print(text, file=sys.stderr)
    return USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (None: the process's arguments) begins with.

    Returns:
        The command's exit code; 2 for no command, an unknown one, or an error that the user can put
        right: a missing optional package, a ValueError or an OSError; 130 after Ctrl-C, 141 where
        what reads the output has gone.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as Python has it where a shell closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        try:
            return _picked(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where a closed pipe is no second error at exit
    except BrokenPipeError:
        _drop_stdout()
        return CLOSED_PIPE
    except OSError as error:
        _drop_stdout()
        return complain(f"fasttax: cannot write to stdout: {_said(error)}")


def _drop_stdout() -> None:
    """Has what is still to be printed go nowhere, where it can't go anywhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _picked(words: list[str]) -> int:
    if not words:
        print(usage())
        return USER_ERROR
    name, rest = words[0], words[1:]
    if name in HELP:
        if not rest:
            print(usage())
            return 0
        name, rest = rest[0], [*rest[1:], "--help"]
    if name in ("-V", "--version"):
        print(__version__)
        return 0
    if name not in COMMANDS:
        return complain(f"fasttax: unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    return run(name, rest)


def run(name: str, argv: Sequence[str]) -> int:
    """`fasttax.cli.NAME.main(argv)`, with the user's errors as a line on stderr and exit code 2."""
    try:
        code: int = importlib.import_module(f"fasttax.cli.{name}").main(argv)
        return code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _extras.EXTRAS:
            raise
        return complain(
            f"fasttax {name}: {package} is not installed; run `{_extras.install(package)}`"
        )
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return complain(_line(f"fasttax {name}", _said(error)))
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in first:
            raise
        return complain(
            f"fasttax {name}: {first}; take a smaller --batch-size or --length, --dtype bfloat16, "
            "or --device cpu"
        )
    except KeyboardInterrupt as error:
        said = str(error) or "no file was left half written"
        complain(f"fasttax {name}: interrupted; {said}")
        return INTERRUPTED


def _said(error: Exception) -> str:
    """An error's text; the system's own without its number."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return str(error)


def _line(prefix: str, text: str) -> str:
    """`text` under the command's name, which it may begin with, or with the library's."""
    if text.startswith(prefix):
        return text
    return f"{prefix}: {text.removeprefix('fasttax: ')}"
