"""One way to make each of TRL's trainers on the tiny model.

Two steps, accumulation 2, clipping, rows of different lengths.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from tests.tools import tiny_lm

TEXTS = [
    "water boils at a hundred degrees",
    "the capital of France is Paris",
    "two and two make four",
    "a week has seven days",
    "iron rusts in damp air",
    "the moon circles the earth",
    "ice floats on water",
    "light is faster than sound",
]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 5,
}
STABLE = ("sft", "dpo", "kto", "grpo", "rloo", "distillation")
EXPERIMENTAL = ("gkd", "gold", "orpo", "cpo", "online_dpo")


def parts(text: str) -> tuple[str, str]:
    """Prompt and completion of a text."""
    return text[: len(text) // 2], text[len(text) // 2 :]


def reward(completions: list[Any], **others: Any) -> list[float]:
    """Anything that differs between completions."""
    return [float(sum(map(ord, str(c))) % 7) for c in completions]


def dataset(name: str) -> Any:
    """TEXTS in the columns that a trainer wants."""
    from datasets import Dataset

    pairs = [parts(t) for t in TEXTS]
    if name == "sft":
        rows: list[dict[str, Any]] = [{"prompt": p, "completion": c} for p, c in pairs]
    elif name in ("dpo", "orpo", "cpo"):
        rows = [
            {"prompt": p, "chosen": c, "rejected": c[::-1][: 3 + i]}
            for i, (p, c) in enumerate(pairs)
        ]
    elif name == "kto":
        rows = [
            {"prompt": p, "completion": c if i % 2 else c[::-1], "label": bool(i % 2)}
            for i, (p, c) in enumerate(pairs)
        ]
    elif name in ("gkd", "gold"):
        rows = [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]}
            for p, c in pairs
        ]
    else:
        rows = [{"prompt": p} for p, _ in pairs]
    return Dataset.from_list(rows)


def classes(name: str) -> tuple[Any, Any]:
    """The trainer and its config."""
    import importlib

    prefix = {
        "sft": "SFT",
        "dpo": "DPO",
        "kto": "KTO",
        "grpo": "GRPO",
        "rloo": "RLOO",
        "distillation": "Distillation",
        "gkd": "GKD",
        "gold": "GOLD",
        "orpo": "ORPO",
        "cpo": "CPO",
        "online_dpo": "OnlineDPO",
    }[name]
    module = importlib.import_module("trl" if name in STABLE else f"trl.experimental.{name}")
    return getattr(module, f"{prefix}Trainer"), getattr(module, f"{prefix}Config")


OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 64},
    "dpo": {"max_length": 64},
    "kto": {"max_length": 64},
    "grpo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.0},
    "rloo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.0},
    "distillation": {"max_completion_length": 8, "beta": 0.5},
    "gkd": {"max_length": 64, "max_new_tokens": 8, "lmbda": 0.5, "beta": 0.5},
    "gold": {"max_length": 64, "max_completion_length": 8, "lmbda": 0.0, "beta": 0.5},
    "orpo": {"max_length": 64},
    "cpo": {"max_length": 64},
    "online_dpo": {"max_length": 64, "max_new_tokens": 8},
}


def make(
    name: str,
    folder: Path,
    *,
    base: type | None = None,
    model: nn.Module | str | None = None,
    lora: bool = False,
    teacher: nn.Module | None = None,
    rows: Any = None,
    **changes: Any,
) -> Any:
    trainer_class, config_class = classes(name)
    options = {**COMMON, **OPTIONS[name], **changes}
    if name == "cpo" and hasattr(config_class, "max_prompt_length"):
        options["max_prompt_length"] = 32  # of max_length; old ones take 512 by themselves
    args = config_class(output_dir=str(folder), **options)
    given: dict[str, Any] = {
        "model": tiny_lm.model() if model is None else model,
        "args": args,
        "processing_class": tiny_lm.tokenizer(),
        "train_dataset": dataset(name) if rows is None else rows,
    }
    if lora:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0
        )
    other = tiny_lm.model(1) if teacher is None else teacher
    if name in ("dpo", "kto", "online_dpo") and not lora:
        given["ref_model"] = copy.deepcopy(other)
    if name in ("grpo", "rloo"):
        given["reward_funcs"] = reward
    if name in ("distillation", "gkd", "gold"):
        given["teacher_model"] = copy.deepcopy(other)
    if name == "online_dpo":
        given["reward_funcs"] = reward
    return (base or trainer_class)(**given)
