"""Devices by the names that commands take."""

from __future__ import annotations

import argparse

import torch

from fasttax._base import checks


def named(op: str, name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ValueError: there is no such device here; lists those that are.
    """
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(here[min(1, len(here) - 1)])
    checks.choice(op, "--device", name, ["auto", *here])
    return torch.device(name)


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--device`, which `named` reads."""
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda or cuda:N; a GPU if there is one (default auto)",
    )
