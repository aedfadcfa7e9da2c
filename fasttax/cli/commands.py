"""The commands, a line each.

A new one is a module `fasttax/cli/NAME.py` with `main(argv) -> int`, and its line here.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """What the usage says of a command, and the extra that brings what it imports."""

    summary: str
    extra: str = "demo"


COMMANDS = {
    "demo": Command(
        "align a small real model with and without fasttax, and report what each way costs"
    ),
    "fisher": Command(
        "estimate a model's Fisher on text, diagonal or by Kronecker factors, and save it"
    ),
    "kl": Command(
        "measure: both KLs of two models on text, token by token; cache: keep a reference's top-k "
        "log-probs of training data, so that training needs no reference in memory",
        extra="transformers",
    ),
    "sample": Command(
        "draw texts from a model itself, for replay where no base data is at hand",
        extra="transformers",
    ),
    "plan": Command(
        "say what Fisher, EWC, KL and replay would take of a GPU's memory and time, from a model's "
        "config.json alone",
        extra="transformers",
    ),
    "merge": Command(
        "average models weight by weight: linear between a base and its aligned model, or by their "
        "Fishers; mergekit's configurations"
    ),
    "tax": Command(
        "report what each checkpoint gained and lost against its base: table, laws of forgetting, "
        "figure, page",
        extra="report",
    ),
    "bench": Command(
        "time the main ops beside plain PyTorch on this machine, at sizes of your own"
    ),
    "doctor": Command(
        "show which kernels are active here and why, and what would bring the missing ones"
    ),
}
