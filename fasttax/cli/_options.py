"""The library's advice in the words of a command."""

from __future__ import annotations

import argparse
import re

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
