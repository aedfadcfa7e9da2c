"""`fasttax plan MODEL --gpu NAME --gpus N`: what each tool would take, from config.json alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttax._base import checks
from fasttax.cli import _language_model, _options
from fasttax.cli._costs import GB, GPUS, Cost, Job, Shape, costs
from fasttax.cli.commands import COMMANDS
from fasttax.tax.words import Table, aligned

OP = "fasttax plan"
COUNTS = ("gpus", "tokens", "length", "examples", "k", "every")
ALONE = ("training", "Fisher (once, before)")  # the others come on top of training


def main(argv: Sequence[str]) -> int:
    """Prints the model's shape and the table of costs, and writes --json."""
    args = _options.parsed(parser(), argv)
    _options.check_least(OP, args, **dict.fromkeys(COUNTS, 1))
    use = checks.number(OP, "--use", args.use, low=0, high=1, open_low=True)
    shape = _shape(args.model)
    counts = {name: getattr(args, name) for name in COUNTS}
    job = Job(gpu=GPUS[args.gpu], use=use, checkpointing=args.checkpointing, **counts)
    found = list(costs(shape, job))
    _options.say(
        args,
        f"{args.model}: {shape.parameters / 1e9:.3g} B parameters, {shape.multiplied / 1e9:.3g} B "
        f"of them at every token, {shape.layers} layers of {shape.hidden}, vocabulary "
        f"{shape.vocabulary}\n{args.gpus} x {args.gpu}: {job.gpu.memory / GB:.0f} GB, "
        f"{job.gpu.flops / 1e12:.0f} TFLOP/s in bf16 of which {use:.0%} are taken, "
        f"{job.gpu.bandwidth / 1e12:.2f} TB/s; {args.tokens} tokens a GPU and step in sequences "
        f"of {args.length}\n",
    )
    if shape.quantised:
        _options.say(
            args,
            f"{args.model} lies quantised ({shape.quantised}): this is the plan of the model that "
            "it was made from, in bf16 with all of its weights trained; adapters take less\n",
        )
    _options.say(args, "\n".join(aligned(_table(found, job))))
    rows = [vars(cost) | {"fits": _fits(found[0], cost, job)} for cost in found]
    content = {"model": args.model, "gpu": args.gpu, **counts, "use": use}
    _options.write_json(OP, args.json, {**content, "shape": vars(shape), "costs": rows})
    return 0


def _fits(training: Cost, cost: Cost, job: Job) -> bool:
    """Whether a GPU holds it, on top of training where it belongs there."""
    whole = cost.memory
    if cost.name not in ALONE:
        whole += training.memory
    return whole <= job.gpu.memory


def _table(found: Sequence[Cost], job: Job) -> Table:
    """The costs in words."""
    training = found[0]
    rows = []
    for cost in found:
        share = ""
        if cost.name not in ALONE:
            share = f"{cost.seconds / training.seconds:+.0%}"
        rows.append(
            [
                cost.name,
                f"{cost.memory / GB:.2f}",
                _time(cost.seconds),
                share,
                "yes" if _fits(training, cost, job) else "NO",
                cost.note,
            ]
        )
    headings = ["what", "GB a GPU", "time", "of a step", "fits", "how"]
    note = (
        "what it adds to training, but for the last, which runs alone; memory of what is stored is "
        "exact, activations are a Llama layer's, times are the multiplications' or the bytes'"
    )
    return Table(headings, rows, note)


def _time(seconds: float) -> str:
    """In the unit that leaves a number to be read."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.3g} ms"


def _shape(model: str) -> Shape:
    """Of a config.json, its folder, or a Hub id, whose config.json alone is fetched.

    Raises:
        ValueError: there is none, or it is none that transformers knows.
    """
    from transformers import AutoConfig

    path = Path(model)
    if not path.is_file():
        _language_model.check_model(OP, "model", model)
    try:
        config: Any = AutoConfig.from_pretrained(path if path.exists() else model)
        return Shape.of(config)
    except _language_model.UNLOADABLE as error:
        said = _options.brief(error)
        raise ValueError(f"{model}: no config of a causal language model: {said}") from error


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(prog=OP, description=COMMANDS["plan"])
    parser.add_argument(
        "model", type=_options.Input, help="a config.json, a folder with one, or a Hub id"
    )
    parser.add_argument(
        "--gpu",
        choices=sorted(GPUS),
        default="h100",
        help="whose data sheet is taken (default h100)",
    )
    counts = {
        "gpus": (1, "that share the parameters (FSDP2)"),
        "tokens": (8192, "of a step on a GPU"),
        "length": (2048, "tokens of a sequence"),
        "examples": (256, "sequences of the Fisher"),
        "k": (64, "log-probs a token of a cache"),
        "every": (1, "steps from one replay to the next"),
    }
    for name, (default, meaning) in counts.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning} (default {default})"
        )
    parser.add_argument(
        "--use",
        type=float,
        default=0.4,
        help="share of the peak that training reaches (default 0.4)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    _options.add_json(parser)
    return parser
