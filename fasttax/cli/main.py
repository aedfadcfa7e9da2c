"""Picks the command and turns its errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import torch

from fasttax._base.version import __version__
from fasttax.cli.commands import COMMANDS

OPTIONAL = ("transformers", "gguf", "rich", "matplotlib", "scipy")  # packages that an extra brings
USER_ERROR = 2  # the exit code of what the user can put right
CLOSED_PIPE = 141  # 128 and the number of SIGPIPE
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it


def usage() -> str:
    """The commands, a line each."""
    lines = "\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: fasttax COMMAND [options]\n\ncommands:\n{lines}\n\n"
        "`fasttax COMMAND --help` lists a command's options."
    )


def complain(text: str) -> int:
    """Prints to stderr what the user can put right, and gives that error's exit code."""
    print(text, file=sys.stderr)
    return USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (None: the process's arguments) begins with.

    Returns:
        The command's exit code; 2 for no command, an unknown one, or an error that the user can put
        right: a missing optional package, a ValueError or an OSError.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(usage())
        return USER_ERROR
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
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
        if error.name not in OPTIONAL:
            raise
        return complain(
            f"fasttax {name}: {error.name} is not installed; run `pip install "
            f"'fasttax[{COMMANDS[name].extra}]'`"
        )
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        return complain(
            f"fasttax {name}: {first}; take a smaller --batch-size or --length, --dtype bfloat16, "
            "or --device cpu"
        )
    except BrokenPipeError:
        # what reads the output has gone (`| head`): no more of it, and no second error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (ValueError, OSError) as error:
        prefix = f"fasttax {name}"
        text = str(error)
        return complain(text if text.startswith(prefix) else f"{prefix}: {text}")
    except KeyboardInterrupt:
        complain(f"fasttax {name}: interrupted; no file was left half written")
        return INTERRUPTED
