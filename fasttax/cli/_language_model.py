"""A causal language model and its tokenizer, for the commands that compute one.

Whatever can be seen to be wrong is said before weights are read: the device, the dtype, a folder
without a model, outputs that have no place.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fasttax._base import checks, files, placed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# what transformers and safetensors raise on a folder that is damaged or of another kind
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--dtype` and `--json`, which every command that computes a model has."""
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="float32",
        help="of the weights; auto: as they lie on disk (default float32)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON, too")


def device_of(op: str, name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ValueError: there is no such device here; lists those that are.
    """
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(here[min(1, len(here) - 1)])
    checks.choice(op, "--device", name, ["auto", *here])
    return torch.device(name)


def check(op: str, args: argparse.Namespace, models: Mapping[str, str], *outputs: str) -> None:
    """Device, models and places of outputs, before anything is loaded.

    `models` maps a command's word to the name that was given; `outputs` are files beside --json.
    """
    device_of(op, args.device)
    for path in (*outputs, args.json):
        if path:
            placed.in_a_folder(op, path)
            if Path(path).is_dir():
                raise checks.fail(op, path, "a file's name", "a folder")
    for word, name in models.items():
        check_model(op, word, name)


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
    elif folder.exists() or not HUB_ID.fullmatch(name):
        raise checks.fail(op, word, "a folder or Hub id of a causal language model", repr(name))


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except UNLOADABLE as error:
        raise ValueError(f"{name}: its tokenizer does not load: {brief(error)}") from error


def length_of(asked: int | None, default: int, *names: str) -> int:
    """The tokens of a row: as asked, or the default within the positions that all models know."""
    from transformers import AutoConfig

    if asked is not None:
        return asked
    for name in names:
        try:
            config = AutoConfig.from_pretrained(name).get_text_config()
        except UNLOADABLE as error:
            raise ValueError(f"{name}: its config does not load: {brief(error)}") from error
        default = min(default, getattr(config, "max_position_embeddings", None) or default)
    return default


def load(name: str, device: torch.device, dtype: str) -> Any:
    """The model of a folder or Hub id, in eval mode.

    Raises:
        ValueError: it does not load, or lacks weights, which transformers would make up.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES.get(dtype, dtype), output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except (*UNLOADABLE, SafetensorError) as error:
        raise ValueError(f"{name}: the model does not load: {brief(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{name}: its files lack {', '.join(missing[:3])}{more}, in whose place random numbers "
            "would be; save or download the model anew"
        )
    return model.to(device).eval()


def check_rows(op: str, name: str, model: Any, rows: Sequence[Sequence[int]]) -> None:
    """The rows must be of the model's tokens, and within the positions that it knows.

    Raises:
        ValueError: an id or a length beyond; says the largest that is not.
    """
    known = model.get_input_embeddings().num_embeddings
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= known:
        raise checks.fail(
            op,
            "input_ids",
            f"token ids below {known}, the vocabulary of {name}",
            f"{largest}",
            "take ids that this model's tokenizer made",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    if positions is not None and longest > positions:
        raise checks.fail(
            op,
            "--length",
            f"at most {positions}, the positions of {name}",
            f"a sequence of {longest} tokens",
            f"pass --length {positions}",
        )


def write_json(op: str, path: str | None, content: Mapping[str, Any]) -> None:
    """The result, written whole or not at all, and where; nothing without a path.

    JSON has no inf and nan: they are null.
    """
    if path:
        text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
        print(files.whole(op, path, lambda target: target.write_text(text, encoding="utf-8")))


def _finite(value: Any) -> Any:
    """The value with None for numbers that are none."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def brief(error: Exception) -> str:
    """The first line of an error, whose others explain the Hub."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
