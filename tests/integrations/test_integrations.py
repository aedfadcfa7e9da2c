"""fasttax without any trainer: nothing of theirs is imported, and what is missing is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fasttax

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        extras = ("transformers", "trl", "lightning", "peft", "accelerate", "datasets")
        if name.split(".")[0] in extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import fasttax
from fasttax.integrations import AdaptiveKL
from fasttax.integrations.reference import TopKReference
AdaptiveKL(target=0.1).update(0.2)
for name in ("transformers", "trl", "lightning"):
    try:
        getattr(fasttax.integrations, name)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_fasttax_needs_no_trainer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        f"fasttax.integrations.{n}: {n} is not installed; run `pip install 'fasttax[{n}]'`"
        for n in ("transformers", "trl", "lightning")
    ]


def test_unknown_name() -> None:
    with pytest.raises(
        AttributeError,
        match=r"'fasttax\.integrations' has no attribute 'megatron'; it offers AdaptiveKL, "
        r"transformers, trl, deepspeed, lightning",
    ):
        _ = fasttax.integrations.megatron
