"""`fasttax kl measure POLICY REF TEXT` and `fasttax kl cache MODEL DATA`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fasttax._base import checks
from fasttax.cli import _kl_measure, _language_model, _texts
from fasttax.integrations.reference import TopKReference

OP = "fasttax kl cache"
LENGTH = 1024


def main(argv: Sequence[str]) -> int:
    """Runs the tool that was asked for."""
    args = parse(argv)
    return _kl_measure.main(args) if args.what == "measure" else cache(args)


def cache(args: argparse.Namespace) -> int:
    """Runs MODEL over DATA's sequences and writes the cache.

    Raises:
        ValueError: a size below its least, or a row of DATA that is none of the forms.
    """
    sizes = [args.batch_size, args.k]
    if args.length is not None:
        sizes.append(args.length - 1)
    if min(sizes) < 1:
        raise ValueError("--length must be at least 2, --batch-size and --k at least 1")
    checks.positive(OP, "--temperature", args.temperature)
    _language_model.check(OP, args, {"model": args.model}, args.output)
    device = _language_model.device_of(OP, args.device)
    path = Path(args.data)
    text = _texts.read(path)
    length = _language_model.length_of(args.length, LENGTH, args.model)
    rows = _texts.rows(path, text, _language_model.tokenizer_of(args.model), length)
    model = _language_model.load(args.model, device, args.dtype)
    _language_model.check_rows(OP, args.model, model, [row.ids for row in rows])
    batches = -(-len(rows) // args.batch_size)
    with tqdm(total=batches, desc=OP, unit="batch", disable=None) as bar:
        counting = model.register_forward_hook(lambda *_: bar.update() and None)
        try:
            reference = TopKReference.make(
                model,
                [row.ids for row in rows],
                k=args.k,
                batch_size=args.batch_size,
                temperature=args.temperature,
            )
        finally:
            counting.remove()
    reference.save(args.output)
    print(f"{reference}\n{args.output}")
    _language_model.write_json(OP, args.json, {**reference.metadata, "output": args.output})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fasttax kl", description="Tools for the KL to a reference."
    )
    tools = parser.add_subparsers(dest="what", required=True, metavar="measure | cache")
    _kl_measure.add_parser(tools)
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
        help=f"tokens a sequence is cut to, as the trainer's max_length (default {LENGTH}, or the "
        "model's positions where they are fewer)",
    )
    cache.add_argument("--batch-size", type=int, default=8)
    cache.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="that the logits are divided by, as FullKL's (default 1)",
    )
    _language_model.add_options(cache)
    return parser.parse_args(argv)


def sequences(path: Path, tokenizer: Any, length: int) -> list[list[int]]:
    """The token ids that a trainer would make of a file, cut to `length`."""
    return [row.ids for row in _texts.rows(path, _texts.read(path), tokenizer, length)]
