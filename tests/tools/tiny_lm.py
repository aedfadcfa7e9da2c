"""A language model that trains in milliseconds, with its tokenizer; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

logging.get_logger("transformers")  # keeps the stderr that it first sees: no test's own

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ "
    "m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]


def tokenizer() -> Any:
    """Bytes and four special tokens: GOLD wants a ByteLevel one."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate([*SPECIAL, *alphabet])}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def model(seed: int = 0, scale: float = 8.0, **changes: Any) -> Any:
    """A LlamaForCausalLM with two layers of 32.

    The head's scale makes distributions differ enough for a KL that can be seen.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    lm = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        lm.lm_head.weight.mul_(scale)
    return lm


def save(folder: Path, seed: int = 0) -> str:
    """A folder with the model and the tokenizer, for what loads by name."""
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def ids(rows: int = 16, length: int = 12, seed: int = 3) -> torch.Tensor:
    """Token ids (rows, length), none of them special."""
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))
