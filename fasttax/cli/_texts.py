"""Files of text as token ids, as a trainer would make them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDINGS = ("completion", "chosen", "rejected")  # of a prompt, in a preference or SFT data set


@dataclass(frozen=True)
class Row:
    """A sequence of token ids, and the domain that its row names or its file is."""

    domain: str
    ids: list[int]


def read(path: str | Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: it is none; names it.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None


def rows(path: Path, text: str, tokenizer: Any, length: int) -> list[Row]:
    """The sequences of a file that was read, cut to `length`.

    A .jsonl's rows hold input_ids, messages, text, or a prompt with completion, chosen or rejected
    (a sequence for each), and perhaps a domain; any other file is one text, in rows of `length`.
    """
    if path.suffix != ".jsonl":
        ids = tokenizer(text, verbose=False)["input_ids"]
        cut = [ids[i : i + length] for i in range(0, len(ids), length)]
        return [Row(path.stem, row) for row in cut if len(row) > 1]
    found: list[Row] = []
    # JSON may hold U+2028 and U+0085 as they are, at which str.splitlines would cut
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        where = f"{path}, row {number}"
        row = _parsed(where, line)
        domain = str(row.get("domain", path.stem))
        found += [Row(domain, ids[:length]) for ids in _sequences(where, row, tokenizer)]
    return found


def _parsed(where: str, line: str) -> dict[str, Any]:
    """A row's object; `where` names it in errors."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _sequences(where: str, row: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """The token ids of one row."""
    if "input_ids" in row:
        ids = row["input_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{where}: input_ids: expected a list of integers >= 0")
        return [ids]
    if "messages" in row:
        return [tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]]
    if isinstance(row.get("text"), str):
        return [tokenizer(row["text"])["input_ids"]]
    prompt, endings = row.get("prompt"), [row[key] for key in ENDINGS if key in row]
    if endings and all(isinstance(part, str) for part in (prompt, *endings)):
        return [tokenizer(prompt + ending)["input_ids"] for ending in endings]
    raise ValueError(
        f"{where}: expected input_ids, messages, text, or prompt with completion, chosen or "
        f"rejected as text, got {sorted(row)}"
    )
