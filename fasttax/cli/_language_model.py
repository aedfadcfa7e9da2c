"""A causal language model and its tokenizer, for the commands that compute one."""

from __future__ import annotations

from typing import Any

import torch


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def load(name: str) -> Any:
    """The model of a folder or Hub id, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
