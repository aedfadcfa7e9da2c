"""`fasttax kl measure POLICY REF TEXT` and `fasttax kl cache MODEL DATA`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fasttax._base import checks, devices
from fasttax.cli import _kl_measure, _language_model, _options, _rows
from fasttax.integrations.reference import TopKReference

OP = "fasttax kl cache"
LENGTH = 1024


def main(argv: Sequence[str]) -> int:
    """Runs the tool that was asked for."""
    args = _options.parsed(parser(), argv)
    return _kl_measure.main(args) if args.what == "measure" else cache(args)


def cache(args: argparse.Namespace) -> int:
    """Runs MODEL over DATA's sequences and writes the cache, batch by batch.

    Raises:
        ValueError: a size below its least, a row of DATA that is none of the forms, or an
            interrupted run of other options.
    """
    _options.check_least(OP, args, batch_size=1, k=1, length=2)
    checks.positive(OP, "--temperature", args.temperature)
    device = devices.named(OP, args.device)
    data = _rows.opened(OP, args.data, args.split, args.config)
    _language_model.check_model(OP, "model", args.model)
    length = _language_model.length_of(args.length, LENGTH, args.model)
    rows = _tokenized(args, data, length)
    _language_model.check_rows(OP, args.model, rows)
    model = _language_model.load(args.model, device, args)
    try:
        metadata = TopKReference.make_file(
            args.output,
            model,
            rows,
            k=args.k,
            batch_size=args.batch_size,
            temperature=args.temperature,
            restart=args.restart,
            progress=_options.shown(args),
        )
    except KeyboardInterrupt:
        partial = Path(f"{args.output}.partial")
        if not partial.exists():
            raise
        raise KeyboardInterrupt(
            f"what is done is kept in {partial}; the same command goes on there"
        ) from None
    except (ValueError, OSError) as error:
        raise type(error)(_options.in_options(str(error), args.parser)) from error
    counts = f"{metadata['sequences']} sequences, {metadata['tokens']} tokens, k={metadata['k']}"
    _options.say(args, f"{counts}\n{args.output}")
    _options.write_json(OP, args.json, {**metadata, "output": args.output})
    return 0


def _tokenized(args: argparse.Namespace, data: _rows.Data, length: int) -> list[Tensor]:
    """The sequences that a trainer would make of the data, 4 bytes a token.

    Raises:
        ValueError: there is none of two tokens.
    """
    tokenizer = _language_model.TokenizerOnUse(args.model)
    every = data.rows(tokenizer, length)
    hidden = not _options.shown(args)
    rows = [
        torch.tensor(row.ids, dtype=torch.int32)
        for row in tqdm(every, desc="reading", unit="row", disable=hidden)
    ]
    if not rows:
        raise checks.fail(OP, "data", "a sequence of at least 2 tokens", f"none in {args.data}")
    return rows


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fasttax kl", description="Tools for the KL to a reference."
    )
    tools = parser.add_subparsers(dest="what", required=True, metavar="TOOL")
    _kl_measure.add_parser(tools)
    cache = tools.add_parser(
        "cache",
        help="a reference's top-k log-probs, for training without it",
        description=(
            "Keep a reference model's k largest log-probs after every token of DATA; "
            "FullKL(trainer, 'FILE', beta) reads them. They go to disk as they come: after an "
            "interruption the same command goes on with what FILE.partial holds."
        ),
    )
    cache.set_defaults(parser=cache)
    cache.add_argument(
        "model", type=_options.Input, help="a folder or Hub id of a causal language model"
    )
    cache.add_argument("data", type=_options.Input, help=_rows.HELP)
    _rows.add_options(cache)
    _options.add_output(cache, "reference.safetensors", "the log-probs' file")
    cache.add_argument(
        "--k", type=int, default=64, help="log-probs kept a token, 8 bytes each (default 64)"
    )
    cache.add_argument(
        "--length",
        type=int,
        help=f"tokens a sequence is cut to, as the trainer's max_length (default {LENGTH}, or the "
        "model's positions where they are fewer)",
    )
    cache.add_argument("--batch-size", type=int, default=8, help="sequences (default 8)")
    cache.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="that the logits are divided by, as FullKL's (default 1)",
    )
    cache.add_argument(
        "--restart", action="store_true", help="begin anew where a FILE.partial was left"
    )
    _language_model.add_options(cache)
    return parser
