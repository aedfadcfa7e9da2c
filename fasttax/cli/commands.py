"""The commands and what each does.

A new one is a module `fasttax/cli/NAME.py` with `main(argv) -> int` and `parser()`, and its line
here.
"""

from __future__ import annotations

COMMANDS = {
    "demo": "align a small real model with and without fasttax, and report what each way costs",
    "fisher": "estimate a model's Fisher on text or rows, diagonal or by Kronecker factors",
    "kl": (
        "measure: both KLs of two models on text, token by token; cache: keep a reference's top-k "
        "log-probs of training data, so that training needs no reference in memory"
    ),
    "sample": "draw texts from a model itself, for replay where no base data is at hand",
    "plan": (
        "say what Fisher, EWC, KL and replay would take of a GPU's memory and time, from a model's "
        "config.json alone"
    ),
    "merge": (
        "average models weight by weight: linear between a base and its aligned model, or by their "
        "Fishers; mergekit's configurations"
    ),
    "tax": (
        "report what each checkpoint gained and lost against its base: table, laws of forgetting, "
        "figure, page"
    ),
    "bench": "time the main ops beside plain PyTorch on this machine, at sizes of your own",
    "doctor": (
        "show which kernels are active here and why, what would bring the missing ones, and what "
        "fits the installed TRL"
    ),
    "completion": "print what completes fasttax's commands in bash, zsh or tcsh",
}
