"""The command line: `fasttax` and `python -m fasttax`."""

from fasttax.cli.main import main as main

__all__ = ["main"]
