"""`fasttax fisher MODEL TEXT`: a model's Fisher on a text or on rows, written to a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fasttax._base import devices
from fasttax.cli import _language_model, _options, _rows
from fasttax.cli.commands import COMMANDS
from fasttax.fisher import FisherEstimate, KroneckerEstimate, estimate_fisher
from fasttax.fisher.parts import take

Batch = Tensor | Mapping[str, Tensor]

OP = "fasttax fisher"
REFUSED = (ValueError, TypeError, NotImplementedError)  # what the library says no with


def main(argv: Sequence[str]) -> int:
    """Estimates the Fisher on the first --examples of TEXT.

    An example is --length tokens of a text, or a row of data, cut to --length.

    Raises:
        ValueError: a size below its least, a text shorter than --length, data without a row of two
            tokens, or a model that needs another option of the command.
    """
    args = _options.parsed(parser(), argv)
    _options.check_least(OP, args, length=2, batch_size=1, examples=1)
    device = devices.named(OP, args.device)
    data = _rows.opened(OP, args.text, args.split, args.config)
    _language_model.check_model(OP, "model", args.model)
    tokenizer = _language_model.TokenizerOnUse(args.model)
    rows = _examples(args, data, tokenizer)
    _language_model.check_rows(OP, args.model, rows)
    model = _language_model.load(args.model, device, args)
    parts = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    estimate = _estimated(model, [_batch(part, device) for part in parts], len(rows), args)
    estimate.save(args.output)
    _options.say(args, f"{estimate}\n{args.output}")
    _options.write_json(OP, args.json, {**estimate.metadata, "output": args.output})
    return 0


def _examples(args: argparse.Namespace, data: _rows.Data, tokenizer: Any) -> list[list[int]]:
    """Token ids of the first --examples.

    What is left at the end of a text is no whole example, and is dropped.

    Raises:
        ValueError: there is none.
    """
    every = (row.ids for row in data.rows(tokenizer, args.length))
    if data.text is not None:
        every = (ids for ids in every if len(ids) == args.length)
    found = list(islice(every, args.examples))
    if found:
        return found
    if data.text is None:
        raise ValueError(f"{OP}: {args.text} has no row of at least 2 tokens")
    tokens = len(tokenizer(data.text, verbose=False)["input_ids"])
    raise ValueError(
        f"{OP}: {args.text} has {tokens} tokens; expected at least --length {args.length}"
    )


def _batch(rows: Sequence[list[int]], device: torch.device) -> Batch:
    """Rows of one length as ids alone, others padded."""
    padded = {name: t.to(device) for name, t in _rows.padded(rows).items()}
    return padded if len({*map(len, rows)}) > 1 else padded["input_ids"]


def _estimated(
    model: Any, batches: Sequence[Batch], examples: int, args: argparse.Namespace
) -> FisherEstimate | KroneckerEstimate:
    """The estimate; what the library advises is said in the command's options."""
    try:
        return _estimate(model, batches, examples, args, args.labels, args.fallback)
    except torch.OutOfMemoryError:
        raise
    except REFUSED as error:
        raise ValueError(_options.in_options(str(error), parser())) from error
    except RuntimeError as error:
        labels = args.labels
        if labels == "exact_head":
            labels = "sample"
        whole = args.structure == "kron" or args.fallback is not None
        if whole or not _loop_runs(model, batches, args, labels):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be taken layer by layer ({error}); pass --fallback "
            f"loop --labels {labels}, which runs one example at a time"
        ) from error


def _loop_runs(model: Any, batches: Sequence[Batch], args: argparse.Namespace, labels: str) -> bool:
    """Whether one example alone can be estimated where the taps failed.

    It can't where the model itself fails, or the device does.
    """
    try:
        _estimate(model, [take(batches[0], 0, 1)], 1, args, labels, "loop")
    except (*REFUSED, RuntimeError):
        return False
    return True


def _estimate(
    model: Any,
    batches: Sequence[Batch],
    examples: int,
    args: argparse.Namespace,
    labels: str,
    fallback: str | None,
) -> FisherEstimate | KroneckerEstimate:
    options: dict[str, Any] = {
        "labels": labels,
        "max_examples": examples,
        "params": args.params,
        "fallback": fallback,
        "storage": args.storage,
        "progress": _options.shown(args),
    }
    if args.structure == "kron":
        return estimate_fisher(model, batches, structure="kron", max_dim=args.max_dim, **options)
    return estimate_fisher(model, batches, max_dim=args.max_dim, **options)


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(prog="fasttax fisher", description=COMMANDS["fisher"])
    parser.add_argument(
        "model", type=_options.Input, help="a folder or Hub id of a causal language model"
    )
    parser.add_argument(
        "text", type=_options.Input, help=f"{_rows.HELP}; a text is cut into examples of --length"
    )
    _rows.add_options(parser)
    _options.add_output(parser, "fisher.safetensors", "the estimate's file")
    parser.add_argument(
        "--labels",
        choices=("sample", "true", "exact_head"),
        default="sample",
        help="drawn from the model, the text's own, or the head over the whole vocabulary with no "
        "draws (default sample)",
    )
    parser.add_argument(
        "--length", type=int, default=128, help="tokens an example, or at most (default 128)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="examples (default 8)")
    parser.add_argument("--examples", type=int, default=256, help="at most (default 256)")
    parser.add_argument(
        "--storage",
        choices=("fp32", "bf16", "u8log"),
        default="bf16",
        help="4, 2 or 1 bytes a value; u8log: logarithms (default bf16)",
    )
    parser.add_argument(
        "--structure",
        choices=("diagonal", "kron"),
        default="diagonal",
        help="kron: two factors for each linear layer, the diagonal of the rest (default diagonal)",
    )
    parser.add_argument(
        "--max-dim", type=int, help="rows of a factor above which kron cuts it to blocks (8192)"
    )
    parser.add_argument(
        "--params",
        action="append",
        metavar="PATTERN",
        help="a parameter's name or a pattern with * of which to estimate; once for each (all)",
    )
    parser.add_argument(
        "--fallback",
        choices=("loop",),
        help="one example at a time, exact for any model, where a parameter has no rule; with "
        "--labels sample or true",
    )
    _language_model.add_options(parser)
    return parser
