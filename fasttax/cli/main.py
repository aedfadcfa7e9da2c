"""The `fasttax` command: demo, fisher, kl, merge, tax, bench, doctor."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "align a small real model with and without fasttax, and report what each way costs",
    "fisher": "estimate a model's diagonal Fisher on text and save it",
    "kl": "cache: keep a reference model's top-k log-probs of training data, so that training needs no reference in memory",
    "merge": "average models weight by weight: linear between a base and its aligned model, or by their Fishers",
    "tax": "report what each checkpoint gained and lost against its base: table, laws of forgetting, figure, page",
    "bench": "time the main ops beside plain PyTorch on this machine, at sizes of your own",
    "doctor": "show which kernels are active here and why, and what would bring the missing ones",
}


def _usage() -> str:
    lines = "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items())
    return f"usage: fasttax COMMAND [options]\n\ncommands:\n{lines}\n\n`fasttax COMMAND --help` lists a command's options."


def _fisher(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fasttax fisher", description=COMMANDS["fisher"])
    parser.add_argument("model", help="a folder or Hub id of a causal language model")
    parser.add_argument("text", help="a UTF-8 text file")
    parser.add_argument("--output", default="fisher.safetensors")
    parser.add_argument("--labels", choices=("sample", "true", "exact_head"), default="sample")
    parser.add_argument("--length", type=int, default=128, help="tokens an example (default 128)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--storage", choices=("fp32", "bf16", "u8log"), default="bf16")
    args = parser.parse_args(argv)
    if min(args.length - 1, args.batch_size, args.examples) < 1:
        raise ValueError(
            "fasttax fisher: --length must be at least 2, --batch-size and --examples at least 1"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fasttax

    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)[: args.examples]
    if not len(rows):
        raise ValueError(
            f"fasttax fisher: {args.text} has {len(ids)} tokens; expected at least --length "
            f"{args.length}"
        )
    estimate = fasttax.estimate_fisher(
        model,
        rows.split(args.batch_size),
        labels=args.labels,
        max_examples=len(rows),
        storage=args.storage,
    )
    estimate.save(args.output)
    print(f"{estimate}\n{args.output}")
    return 0


def _merge(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fasttax merge", description=COMMANDS["merge"])
    ways = parser.add_subparsers(dest="way", required=True)
    linear = ways.add_parser("linear", help="(1 - alpha) BASE + alpha ALIGNED")
    linear.add_argument(
        "base", help="a folder of safetensors as transformers saves it, or one file"
    )
    linear.add_argument("aligned", help="the same of the aligned model")
    linear.add_argument("--alpha", type=float, required=True, help="0 is BASE, 1 is ALIGNED")
    fisher = ways.add_parser("fisher", help="sum of w F MODEL over sum of w F")
    fisher.add_argument("models", nargs="+", metavar="MODEL")
    fisher.add_argument(
        "--fisher",
        action="append",
        required=True,
        metavar="FILE",
        help="once for each model, in order: what `fasttax fisher` wrote",
    )
    fisher.add_argument(
        "--weight", action="append", type=float, help="once for each model, or never (1)"
    )
    fisher.add_argument(
        "--missing",
        choices=("error", "mean"),
        default="error",
        help="tensors without a Fisher: an error, or their plain mean",
    )
    for way in (linear, fisher):
        way.add_argument("--output", required=True, help="a new folder, or a new .safetensors file")
    args = parser.parse_args(argv)
    from fasttax import merge

    if args.way == "linear":
        print(merge.linear(args.base, args.aligned, args.alpha, output=args.output))
    else:
        print(
            merge.fisher_average(
                args.models,
                args.fisher,
                weights=args.weight,
                missing=args.missing,
                output=args.output,
            )
        )
    return 0


def _tax(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fasttax tax", description=COMMANDS["tax"])
    parser.add_argument(
        "report",
        help="JSON: base and checkpoints with capability and alignment, and kl, distance, run, stage, step where measured",
    )
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="write the figure (needs matplotlib)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the measurements with tax, gain, frontier and fits"
    )
    args = parser.parse_args(argv)
    from fasttax.tax import TaxReport

    report = TaxReport.load(args.report)
    print(report)
    for path, way in ((args.html, report.html), (args.png, report.plot), (args.json, report.save)):
        if path:
            print(way(path))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from fasttax._base.version import __version__

        print(__version__)
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(
            f"fasttax: unknown command {command!r}; choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    try:
        if command == "doctor":
            from fasttax.cli import doctor

            return doctor.main(rest)
        if command == "fisher":
            return _fisher(rest)
        if command == "merge":
            return _merge(rest)
        if command == "tax":
            return _tax(rest)
        if command == "bench":
            from fasttax.cli import bench

            return bench.main(rest)
        if command == "kl":
            from fasttax.integrations import reference

            return reference.main(rest)
        code: int = importlib.import_module("fasttax.demo").main(rest)
        return code
    except ModuleNotFoundError as error:
        if error.name in ("transformers", "gguf", "rich", "matplotlib"):
            extra = {"kl": "transformers", "tax": "report"}.get(command, "demo")
            print(
                f"fasttax {command}: {error.name} is not installed; run `pip install "
                f"'fasttax[{extra}]'`",
                file=sys.stderr,
            )
            return 2
        raise
    except (ValueError, OSError) as error:
        print(f"fasttax {command}: {error}", file=sys.stderr)
        return 2
