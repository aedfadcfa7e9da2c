"""Whether the Hub has what a name says, asked once: its clients try for most of a minute."""

from __future__ import annotations

from typing import Any

from fasttax._base import checks, hub
from fasttax.cli import _options

TIMEOUT = 5.0  # seconds


def check(op: str, word: str, name: str, expected: str, kind: str = "model") -> None:
    """That a model or data set ("dataset") of this name is on the Hub, or in its cache here.

    Nothing is asked offline (HF_HUB_OFFLINE), nor of a model that the cache has.

    Raises:
        ValueError: it can't be a name on the Hub, the Hub has none, or can't be reached; says
            that there is no such file or folder either.
    """
    if not hub.ID.fullmatch(name):
        raise checks.fail(op, word, expected, repr(name))
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    config = "config.json" if kind == "model" else "README.md"
    cached = try_to_load_from_cache(name, config, repo_type=kind)
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return
    ask: Any = getattr(HfApi(), f"{kind}_info")
    try:
        ask(name, timeout=TIMEOUT)
    except hub.errors() as error:
        raise checks.fail(
            op,
            word,
            expected,
            f"{name!r}: no file or folder here, and of the Hub: {_options.brief(error)}",
        ) from error
