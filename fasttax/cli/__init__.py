"""The command line, `fasttax` and `python -m fasttax`: one module a command."""

from fasttax.cli.main import main as main

__all__ = ["main"]
