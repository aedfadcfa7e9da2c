"""A causal language model and its tokenizer, for the commands that compute one.

Whatever can be seen to be wrong is said before weights are read: the device, the dtype, a folder
without a model, outputs that have no place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, devices
from fasttax.cli import _hub, _options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what transformers and safetensors raise on a folder that is damaged or of another kind
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--dtype`, `--json`, `--quiet`, of every command that computes a model."""
    devices.add_option(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="float32",
        help="of the weights; auto: as they lie on disk (default float32)",
    )
    _options.add_json(parser)
    _options.add_quiet(parser)


def check_model(op: str, word: str, name: str) -> None:
    """A folder with a model, or what may be a Hub id."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise checks.fail(
                op,
                word,
                "a folder that save_pretrained wrote",
                f"{name} without config.json",
            )
        return
    expected = "a folder or Hub id of a causal language model"
    if folder.exists():
        raise checks.fail(op, word, expected, f"{name!r}, a file")
    _hub.check(op, word, name, expected)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except UNLOADABLE as error:
        raise ValueError(
            f"{name}: its tokenizer does not load: {_options.brief(error).rstrip(': ')}; save one "
            "there with save_pretrained (fisher and kl cache need none for rows of input_ids)"
        ) from error


class TokenizerOnUse:
    """The tokenizer of a folder or Hub id, read at its first use: rows of input_ids need none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, text: str, **options: Any) -> Any:
        """As the tokenizer's."""
        return self._read(text, **options)

    @property
    def apply_chat_template(self) -> Any:
        """As the tokenizer's."""
        return self._read.apply_chat_template

    @cached_property
    def _read(self) -> Any:
        return tokenizer_of(self._name)


def _config_of(name: str) -> Any:
    """What a model's config says of its text.

    Raises:
        ValueError: it does not load.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except UNLOADABLE as error:
        said = _options.brief(error)
        raise ValueError(f"{name}: its config does not load: {said}") from error


def length_of(asked: int | None, default: int, *names: str) -> int:
    """The tokens of a row: as asked, or the default within the positions that all models know."""
    if asked is not None:
        return asked
    for name in names:
        known = getattr(_config_of(name), "max_position_embeddings", None)
        default = min(default, known or default)
    return default


def load(name: str, device: torch.device, args: argparse.Namespace) -> Any:
    """The model of a folder or Hub id in --dtype, in eval mode.

    Raises:
        ValueError: it does not load, or lacks weights, which transformers would make up.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not _options.shown(args):
        logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES.get(args.dtype, args.dtype), output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except (*UNLOADABLE, SafetensorError) as error:
        raise ValueError(f"{name}: the model does not load: {_options.brief(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{name}: its files lack {', '.join(missing[:3])}{more}, in whose place random numbers "
            "would be; save or download the model anew"
        )
    return model.to(device).eval()


def check_rows(op: str, name: str, rows: Sequence[Sequence[int] | Tensor] | Tensor) -> None:
    """The rows must be of the model's tokens, and within the positions that its config knows.

    Raises:
        ValueError: an id or a length beyond; says the largest that is not.
    """
    config = _config_of(name)
    known = getattr(config, "vocab_size", None)
    largest = max((int(torch.as_tensor(row).max()) for row in rows if len(row)), default=0)
    if known is not None and largest >= known:
        raise checks.fail(
            op,
            "input_ids",
            f"token ids below {known}, the vocabulary of {name}",
            f"{largest}",
            "take ids that this model's tokenizer made",
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    if positions is not None and longest > positions:
        raise checks.fail(
            op,
            "--length",
            f"at most {positions}, the positions of {name}",
            f"a sequence of {longest} tokens",
            f"pass --length {positions}",
        )
