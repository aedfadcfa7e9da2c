"""Rows of training data as token ids, the same as trainers make of them.

A file of lines of JSON is read here; tables and data sets (parquet, arrow, csv, folders, Hub ids)
by the `datasets` library. Rows are TRL's: texts, conversations, prompts with completions or
preferences; from/value conversations become messages by TRL's own function.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks
from fasttax.cli import _hub
from fasttax.cli._options import brief

ENDINGS = ("completion", "chosen", "rejected")  # of a prompt, in a preference or SFT data set
TABLES = {".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
FILES = (".jsonl", ".txt", *TABLES)  # what no name on the Hub ends with
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
EXPECTED = "a file of rows or text, a folder of a data set, or an id on the Hub (owner/name)"
SPLIT = "train"  # of a data set, where none is asked for
IMAGES = ("images", "image")
FORMS = (
    "input_ids, messages, conversations, text, or prompt with completion, chosen or rejected as "
    "text or messages"
)

HELP = (
    "rows of input_ids, messages, text, or prompt with completion, chosen, rejected (text or "
    "messages): a .jsonl, .json, .parquet, .arrow or .csv file, a folder of a data set, or an id "
    "on the Hub; or a UTF-8 text file"
)

Numbered = Iterable[tuple[str, Any]]  # where a row is, for errors, and the row


@dataclass(frozen=True)
class Row:
    """A sequence of token ids, and the domain that its row names or its file is."""

    domain: str
    ids: list[int]


@dataclass(frozen=True)
class Data:
    """What was found under a name: one text, or rows that are read when they are asked for."""

    name: str
    text: str | None
    numbered: Numbered

    def rows(self, tokenizer: Any, length: int) -> Iterator[Row]:
        """The sequences, cut to `length`; a text is cut into rows of it.

        Raises:
            ValueError: a row is of no form that is known; its number is named.

        Yields:
            A row of at least two tokens, of which something is predicted.
        """
        if self.text is not None:
            ids = tokenizer(self.text, verbose=False)["input_ids"]
            every = [ids[i : i + length] for i in range(0, len(ids), length)]
            yield from (Row(self.name, some) for some in every if len(some) > 1)
            return
        for where, row in self.numbered:
            found = _fields(where, row)
            domain = str(found.get("domain", self.name))
            for ids in _sequences(where, found, tokenizer):
                if len(ids[:length]) > 1:
                    yield Row(domain, ids[:length])


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--split` and `--config`, which say what of a data set is read."""
    parser.add_argument(
        "--split", help=f"of a data set that has several, as `train[:1%%]` (default {SPLIT})"
    )
    parser.add_argument("--config", help="of a data set on the Hub that has several")


def padded(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """A batch of ids padded on the right, where nothing before sees them."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# --- where rows come from -------------------------------------------------------------------------


def opened(op: str, name: str, split: str | None, config: str | None) -> Data:
    """The data of a file, a folder or a Hub id, before any tokenizer or model is loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no data set, or has no splits or configurations to choose from.
    """
    path = Path(name)
    if path.is_file():
        _check_whole(op, name, split, config)
        if path.suffix == ".jsonl":
            return Data(path.stem, None, _lines(path))
        if path.suffix in TABLES:
            return Data(path.stem, None, _table(op, path, TABLES[path.suffix]))
        return Data(path.stem, _text(path), ())
    if not path.is_dir():
        if path.suffix in FILES or not HUB_ID.fullmatch(name):
            raise FileNotFoundError(f"{op}: {name}: No such file; expected {EXPECTED}")
        _hub.check(op, "data", name, EXPECTED, "dataset")
    return Data(path.name, None, _data_set(op, path, name, split, config))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error) from None


def _no_utf8(path: Path, error: UnicodeDecodeError) -> Exception:
    return ValueError(f"{path}: expected UTF-8 text ({error})")


def _lines(path: Path) -> Numbered:
    """A .jsonl's rows; opened at once, so that a file that can't be is named early."""
    file = path.open(encoding="utf-8", newline="\n")  # not at U+2028 and U+0085, as JSON has them

    def lines() -> Iterator[tuple[str, Any]]:
        with file:
            try:
                filled = (line for line in file if line.strip())
                for number, line in enumerate(filled, 1):
                    where = f"{path}, row {number}"
                    yield where, _parsed(where, line)
            except UnicodeDecodeError as error:
                raise _no_utf8(path, error) from None

    return lines()


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def _table(op: str, path: Path, kind: str) -> Numbered:
    """A file of a table's rows, read as it is streamed: no copy of it is made on the disk."""
    import datasets

    with _named(op, str(path)):
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return _of_data_set(op, str(path), rows)


def _check_whole(op: str, name: str, split: str | None, config: str | None) -> None:
    """That nothing is asked of data that are taken whole.

    Raises:
        ValueError: a part of them is.
    """
    for option, asked in (("--split", split), ("--config", config)):
        if asked not in (None, SPLIT if option == "--split" else None):
            expected = f"none for {name}, which is one set of rows"
            raise checks.fail(op, option, expected, repr(asked), f"leave out {option}")


def _data_set(op: str, path: Path, name: str, split: str | None, config: str | None) -> Numbered:
    """A folder that `save_to_disk` wrote, another of data files, or an id on the Hub."""
    import datasets

    saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    with _named(op, name):
        if saved:
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, name=config, split=split or SPLIT)
    if isinstance(rows, Mapping):
        rows = rows[checks.choice(op, "--split", split or SPLIT, list(rows))]
        split = None
    if saved:
        _check_whole(op, name, split, config)
    return _of_data_set(op, name, rows)


def _of_data_set(op: str, name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    with _named(op, name):
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", row


@contextlib.contextmanager
def _named(op: str, name: str) -> Iterator[None]:
    """Errors of the `datasets` library as a line that names what was read.

    Its own progress bars go where ours go: to a terminal.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"{op}: {name} does not load: {brief(cause)}") from error


# --- what a row says ------------------------------------------------------------------------------


def _fields(where: str, row: Any) -> dict[str, Any]:
    """A row's fields; a list of messages is a row of those alone.

    Data sets have None where a row lacks what others have.
    """
    if _conversational(row):
        return {"messages": row}
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where}: expected a JSON object, or a list of messages, got {type(row).__name__}"
        )
    found = {key: value for key, value in row.items() if value is not None}
    if any(key in found for key in IMAGES):
        raise ValueError(
            f"{where}: expected text alone, got {sorted(found)}; a cache holds predictions from "
            "token ids, not from images: pass FullKL the reference model itself"
        )
    if _from_value(found):
        from trl.data_utils import maybe_convert_to_chatml

        return dict(maybe_convert_to_chatml(found))
    if "conversations" in found:
        found.setdefault("messages", found.pop("conversations"))
    return found


def _conversational(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and bool(value) and _has(value[0], "role")


def _from_value(row: Mapping[str, Any]) -> bool:
    """Whether a field is a list of messages that say from and value."""
    lists = (value for value in row.values() if isinstance(value, list) and value)
    return any(_has(value[0], "from") and _has(value[0], "value") for value in lists)


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value


def _sequences(where: str, row: Mapping[str, Any], tokenizer: Any) -> list[list[int]]:
    """The token ids of one row, without the end-of-text token that a trainer may add."""
    if "input_ids" in row:
        ids = row["input_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{where}: input_ids: expected a list of integers >= 0")
        return [ids]
    for key in ("messages", "text"):
        if _conversational(row.get(key)) or isinstance(row.get(key), str):
            return [_ids(where, row, row[key], tokenizer)]
    endings = [row[key] for key in ENDINGS if key in row]
    if "completion" not in row or "prompt" in row:
        prompt = row.get("prompt", type(endings[0])() if endings else None)
        if endings and all(_joins(prompt, ending) for ending in endings):
            return [_ids(where, row, prompt + ending, tokenizer) for ending in endings]
    raise ValueError(f"{where}: expected {FORMS}, got {sorted(row)}")


def _joins(prompt: Any, ending: Any) -> bool:
    """Whether both are text, or both are messages; a preference's prompt may be in its endings."""
    if isinstance(prompt, str):
        return isinstance(ending, str)
    return _conversational(ending) and (prompt == [] or _conversational(prompt))


def _ids(where: str, row: Mapping[str, Any], content: Any, tokenizer: Any) -> list[int]:
    """Of a text, or of messages by the tokenizer's chat template, with the row's own options."""
    if isinstance(content, str):
        ids: list[int] = tokenizer(content, verbose=False)["input_ids"]
        return ids
    from jinja2 import TemplateError

    tools = row.get("tools")
    options = row.get("chat_template_kwargs") or {}
    apply_chat_template = tokenizer.apply_chat_template
    try:
        if isinstance(tools, str):
            tools = json.loads(tools)
        made = apply_chat_template(content, tokenize=True, return_dict=True, tools=tools, **options)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: the chat template does not take it: {brief(error)}") from error
    return list(made["input_ids"])
