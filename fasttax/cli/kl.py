"""`fasttax kl cache MODEL DATA`: a reference model kept as its top-k log-probs of training data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttax.cli import _language_model
from fasttax.integrations.reference import TopKReference

ENDINGS = ("completion", "chosen", "rejected")  # of a prompt, in a preference or SFT data set


def main(argv: Sequence[str]) -> int:
    """Runs MODEL over DATA's sequences and writes the cache.

    Raises:
        ValueError: a size below its least, or a row of DATA that is none of the forms.
    """
    args = parse(argv)
    if min(args.length - 1, args.batch_size, args.k) < 1:
        raise ValueError("--length must be at least 2, --batch-size and --k at least 1")
    rows = sequences(Path(args.data), _language_model.tokenizer_of(args.model), args.length)
    model = _language_model.load(args.model)
    reference = TopKReference.make(
        model, rows, k=args.k, batch_size=args.batch_size, temperature=args.temperature
    )
    reference.save(args.output)
    print(f"{reference}\n{args.output}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fasttax kl", description="Tools for the KL to a reference."
    )
    tools = parser.add_subparsers(dest="what", required=True, metavar="cache")
    cache = tools.add_parser(
        "cache",
        description=(
            "Keep a reference model's k largest log-probs after every token of DATA; "
            "FullKL(trainer, 'FILE', beta) reads them."
        ),
    )
    cache.add_argument("model", help="a folder or Hub id of a causal language model")
    cache.add_argument(
        "data",
        help=(
            "a .jsonl with input_ids, messages, text, or prompt with completion, chosen, rejected; "
            "or a UTF-8 text file"
        ),
    )
    cache.add_argument("--output", default="reference.safetensors")
    cache.add_argument(
        "--k", type=int, default=64, help="log-probs kept a token, 8 bytes each (default 64)"
    )
    cache.add_argument(
        "--length",
        type=int,
        default=1024,
        help="tokens a sequence is cut to, as the trainer's max_length (default 1024)",
    )
    cache.add_argument("--batch-size", type=int, default=8)
    cache.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="that the logits are divided by, as FullKL's (default 1)",
    )
    return parser.parse_args(argv)


def sequences(path: Path, tokenizer: Any, length: int) -> list[list[int]]:
    """The token ids that a trainer would make of a file, cut to `length`.

    A .jsonl's rows hold input_ids, messages, text, or a prompt with completion, chosen or rejected
    (a sequence for each); any other file is one text, in rows of `length`.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        ids = tokenizer(text, verbose=False)["input_ids"]
        return [row for i in range(0, len(ids), length) if len(row := ids[i : i + length]) > 1]
    found: list[list[int]] = []
    # JSON may hold U+2028 and U+0085 as they are, at which str.splitlines would cut
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        found += _row_sequences(f"{path}, row {number}", line, tokenizer)
    return [row[:length] for row in found]


def _row_sequences(where: str, line: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of one row of a .jsonl; `where` names it in errors."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if "input_ids" in row:
        return [row["input_ids"]]
    if "messages" in row:
        return [tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]]
    if "text" in row:
        return [tokenizer(row["text"])["input_ids"]]
    prompt, endings = row.get("prompt"), [row[key] for key in ENDINGS if key in row]
    if endings and all(isinstance(part, str) for part in (prompt, *endings)):
        return [tokenizer(prompt + ending)["input_ids"] for ending in endings]
    raise ValueError(
        f"{where}: expected input_ids, messages, text, or prompt with completion, chosen or "
        f"rejected as text, got {sorted(row)}"
    )
