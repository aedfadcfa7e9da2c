"""`fasttax fisher MODEL TEXT`: a model's Fisher on a text, written to a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttax.cli import _language_model, _options, _texts
from fasttax.cli.commands import COMMANDS
from fasttax.fisher import FisherEstimate, KroneckerEstimate, estimate_fisher

OP = "fasttax fisher"
REFUSED = (ValueError, TypeError, NotImplementedError)  # what the library says no with


def main(argv: Sequence[str]) -> int:
    """Cuts TEXT into rows of --length tokens, and estimates the Fisher on the first --examples.

    Raises:
        ValueError: a size below its least, a text shorter than one row, or a model that needs
            another option of the command.
    """
    args = _options.parsed(parser(), argv)
    if min(args.length - 1, args.batch_size, args.examples) < 1:
        raise ValueError(
            "fasttax fisher: --length must be at least 2, --batch-size and --examples at least 1"
        )
    device = _options.device_of(OP, args.device)
    text = _texts.read(args.text)
    _language_model.check_model(OP, "model", args.model)
    tokenizer = _language_model.tokenizer_of(args.model)
    rows = rows_of(text, tokenizer, args.length)[: args.examples]
    if not len(rows):
        tokens = len(tokenizer(text, verbose=False)["input_ids"])
        raise ValueError(
            f"fasttax fisher: {args.text} has {tokens} tokens; expected at least --length "
            f"{args.length}"
        )
    _language_model.check_rows(OP, args.model, rows)
    model = _language_model.load(args.model, device, args)
    rows = rows.to(device)
    estimate = _estimated(model, rows.split(args.batch_size), len(rows), args)
    estimate.save(args.output)
    _options.say(args, f"{estimate}\n{args.output}")
    _options.write_json(OP, args.json, {**estimate.metadata, "output": args.output})
    return 0


def _estimated(
    model: Any, batches: Sequence[Tensor], examples: int, args: argparse.Namespace
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


def _loop_runs(
    model: Any, batches: Sequence[Tensor], args: argparse.Namespace, labels: str
) -> bool:
    """Whether one example alone can be estimated where the taps failed.

    It can't where the model itself fails, or the device does.
    """
    try:
        _estimate(model, [batches[0][:1]], 1, args, labels, "loop")
    except (*REFUSED, RuntimeError):
        return False
    return True


def _estimate(
    model: Any,
    batches: Sequence[Tensor],
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
    parser.add_argument("text", type=_options.Input, help="a UTF-8 text file")
    parser.add_argument(
        "--output", type=_options.Output, default="fisher.safetensors", metavar="FILE"
    )
    parser.add_argument("--labels", choices=("sample", "true", "exact_head"), default="sample")
    parser.add_argument("--length", type=int, default=128, help="tokens an example (default 128)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--storage", choices=("fp32", "bf16", "u8log"), default="bf16")
    parser.add_argument(
        "--structure",
        choices=("diagonal", "kron"),
        default="diagonal",
        help="kron: two factors for each linear layer, the diagonal of the rest",
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


def rows_of(text: str, tokenizer: Any, length: int) -> Tensor:
    """Token ids (rows, length); what is left at the end is no whole row and is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)
