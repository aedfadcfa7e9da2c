"""`fasttax sample MODEL`: the model's own text, for replay where no base data is at hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fasttax._base import checks, devices, files
from fasttax.cli import _language_model, _options
from fasttax.cli.commands import COMMANDS

OP = "fasttax sample"


def main(argv: Sequence[str]) -> int:
    """Draws --number texts of --length tokens from the model's own distribution.

    Raises:
        ValueError: a size below its least, or a model without a token that begins a text.
    """
    args = _options.parsed(parser(), argv)
    _options.check_least(OP, args, number=1, length=1, batch_size=1)
    checks.positive(OP, "--temperature", args.temperature)
    device = devices.named(OP, args.device)
    _language_model.check_model(OP, "model", args.model)
    tokenizer = _language_model.tokenizer_of(args.model)
    first = first_token(args.model, tokenizer)
    length = _language_model.length_of(args.length, args.length, args.model)
    _language_model.check_rows(OP, args.model, [[first] * (length + 1)])
    model = _language_model.load(args.model, device, args)
    lines = []
    for ids in sampled(model, first, args):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        lines.append(json.dumps({"text": text, "input_ids": ids}) + "\n")

    def write(target: Path) -> None:
        target.write_text("".join(lines), encoding="utf-8")

    _options.say(args, files.whole(OP, args.output, write))
    facts = {"output": args.output, "texts": len(lines), "temperature": args.temperature}
    _options.write_json(OP, args.json, {**facts, "seed": args.seed})
    return 0


def first_token(name: str, tokenizer: Any) -> int:
    """The token that a text of the model's begins after: bos, or eos where it has none.

    Raises:
        ValueError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    expected = "a tokenizer with a bos or eos token, after which a text begins"
    raise checks.fail(OP, "model", expected, name)


def sampled(model: Any, first: int, args: argparse.Namespace) -> Iterator[list[int]]:
    """The texts' ids with the first token, up to and with the token that ends each.

    The draws are of torch's generator, whose state is as before at the end. Of the model's
    generation_config the ends are taken alone: a repetition penalty and its like make another
    distribution.

    Yields:
        A text's ids.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    shown = _options.shown(args)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else {*(ends or ())}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=args.number, unit="text", desc=OP, disable=not shown) as bar,
    ):
        torch.manual_seed(args.seed)
        for begin in range(0, args.number, args.batch_size):
            count = min(args.batch_size, args.number - begin)
            start = torch.full((count, 1), first, device=device)
            rows = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=args.length,
                do_sample=True,
                temperature=args.temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=first,
            )
            for row in rows.tolist():
                yield _to_its_end(row, ends)
                bar.update()


def _to_its_end(ids: list[int], ends: set[int]) -> list[int]:
    """Without what a shorter text of a batch is filled up with."""
    for place, token in enumerate(ids[1:], 1):
        if token in ends:
            return ids[: place + 1]
    return ids


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(prog=OP, description=COMMANDS["sample"])
    parser.add_argument(
        "model", type=_options.Input, help="a folder or Hub id of a causal language model"
    )
    _options.add_output(parser, "samples.jsonl", "rows of text and input_ids")
    parser.add_argument("--number", type=int, default=128, help="texts (default 128)")
    parser.add_argument("--length", type=int, default=128, help="tokens at most (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the draws; 1 is the model's (default 1)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="texts (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    _language_model.add_options(parser)
    return parser
