"""A step of TRL's trainers with their own ops and with fasttax's.

A step is loss and backward: no generation, no optimizer. The model has SmolLM2-135M's shape; both
run on one trainer in turns. Peak memory is measured in a process of its own each: what a step adds
to what was resident.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor, nn

from bench.timing import Case

VOCAB, PARAMETERS = 49152, 134.5e6
WITH_PEAK = {"gkd": (4, 32, 96), "distillation": (4, 32, 96)}  # rows, prompt, completion
OTHERS = {
    name: (2, 32, 64)
    for name in ("sft", "dpo", "kto", "grpo", "rloo", "gold", "orpo", "cpo", "online_dpo")
}
NAMES = {
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
}
# Passes through a model of this size for each step: the policy's forward is 1, its backward 2, a
# reference's forward 1; those not listed take 3.
FORWARDS = {"gkd": 4, "gold": 4, "distillation": 4, "dpo": 4, "online_dpo": 4, "kto": 6}


def model(seed: int) -> nn.Module:
    """A model of SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def tokenizer() -> Any:
    """Bytes and two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    core.add_special_tokens(words[:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def trainer(name: str, folder: str) -> Any:
    """One of TRL's trainers on four rows of text."""
    import importlib

    from datasets import Dataset

    module = importlib.import_module(
        f"trl.experimental.{name}"
        if name in ("gkd", "gold", "orpo", "cpo", "online_dpo")
        else "trl"
    )
    options: dict[str, Any] = {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    text = {
        "prompt": "a b",
        "completion": " c d",
        "chosen": " c d",
        "rejected": " e f",
        "label": True,
    }
    columns = {
        "sft": ("prompt", "completion"),
        "kto": ("prompt", "completion", "label"),
        "grpo": ("prompt",),
        "rloo": ("prompt",),
        "distillation": ("prompt",),
        "online_dpo": ("prompt",),
    }.get(name, ("prompt", "chosen", "rejected"))
    rows = [{key: text[key] for key in columns}] * 4
    given: dict[str, Any] = {"model": model(0), "processing_class": tokenizer()}
    if name in ("gkd", "gold"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "a b"},
                    {"role": "assistant", "content": " c d"},
                ]
            }
        ] * 4
    if name in ("gkd", "gold", "distillation"):
        given["teacher_model"] = model(1)
        options["beta"] = 0.0 if name == "distillation" else 0.5
    if name in ("grpo", "rloo", "online_dpo"):
        given["reward_funcs"] = lambda completions, **others: [0.0] * len(completions)
    if name in ("grpo", "rloo"):
        options |= {"num_generations": 2, "beta": 0.0}
    if name in ("dpo", "kto", "online_dpo"):
        given["ref_model"] = model(1)
    if name == "kto":
        rows = [{**row, "label": bool(i % 2)} for i, row in enumerate(rows)]
    config = getattr(module, f"{NAMES[name]}Config")(**options)
    made = getattr(module, f"{NAMES[name]}Trainer")(
        args=config, train_dataset=Dataset.from_list(rows), **given
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def batch(name: str, rows: int, prompt: int, completion: int) -> dict[str, Any]:
    """What the trainer's own collator would hand to its loss, of random tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCAB, (rows, prompt + completion), generator=generator)
    ones = torch.ones_like(ids)
    part = ones.clone()
    part[:, :prompt] = 0
    labels = ids.masked_fill(part == 0, -100)
    if name in ("grpo", "rloo", "distillation", "online_dpo"):
        found: dict[str, Any] = {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": ones[:, :prompt],
            "completion_ids": ids[:, prompt:],
            "completion_mask": ones[:, prompt:],
            "num_items_in_batch": torch.tensor(float(rows * completion)),
        }
        if name in ("grpo", "rloo"):
            found |= {
                "advantages": torch.linspace(-1, 1, rows),
                "old_logps": torch.full((rows,), -10.0 * completion),
            }
        return found
    if name in ("dpo", "kto"):
        found = {"input_ids": ids, "attention_mask": ones, "completion_mask": part}
        if name == "dpo":
            return found
        return found | {
            "KL_input_ids": ids.flip(0),
            "KL_attention_mask": ones,
            "KL_completion_mask": part,
            "label": torch.tensor([bool(i % 2) for i in range(rows)]),
        }
    if name in ("orpo", "cpo"):
        half = rows // 2
        pairs = {"chosen": slice(0, half), "rejected": slice(half, rows)}
        return {
            f"{side}_{key}": value[at]
            for side, at in pairs.items()
            for key, value in (("input_ids", ids), ("attention_mask", ones), ("labels", labels))
        } | {"prompt_input_ids": ids[:half, :prompt]}
    return {"input_ids": ids, "attention_mask": ones, "labels": labels}


def step(name: str, shape: tuple[int, int, int], folder: str) -> Callable[[], Tensor]:
    """A call that computes the trainer's loss and its gradient."""
    made, inputs = trainer(name, folder), batch(name, *shape)
    if name == "online_dpo":
        generated = [
            inputs[key]
            for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        ]
        made._generate = lambda *others: (*generated, None)  # its loss is inside its training step

    def run() -> Tensor:
        if name == "online_dpo":
            loss: Tensor = made.training_step(made.model, {"prompt": ["a b"] * (shape[0] // 2)})
            made.model.zero_grad(set_to_none=True)
            return loss.detach()
        options = (
            {"num_items_in_batch": torch.tensor(shape[0] * shape[2])}
            if name in ("sft", "gkd", "gold", "distillation")
            else {}
        )
        loss = made.compute_loss(made.model, dict(inputs), **options)
        loss.backward()
        made.model.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def patched(run: Callable[[], Tensor], name: str) -> Callable[[], Tensor]:
    """The same call with fasttax's ops in TRL's place."""
    from fasttax.integrations.trl import patch

    def with_fasttax() -> Tensor:
        with patch(name, quiet=True):
            return run()

    return with_fasttax


def peak(name: str, ours: bool) -> float:
    """MB that a step adds at its peak, in a fresh process."""
    command = [sys.executable, "-m", "bench.bench_trainers", name, "fasttax" if ours else "trl"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    return float(done.stdout.split()[-1])


def cases() -> Iterator[Case]:
    """Floor: the weights read and their gradients written; passes through the model."""
    for name, shape in {**WITH_PEAK, **OTHERS}.items():
        size = f"{shape[0]} x {shape[1] + shape[2]}"
        if name in WITH_PEAK:
            size += f", peak +{peak(name, True):.0f} MB (TRL +{peak(name, False):.0f} MB)"
        with tempfile.TemporaryDirectory() as folder:
            run = step(name, shape, folder)
            tokens = shape[0] * (shape[1] + shape[2])
            yield Case(
                f"{NAMES[name]} step, SmolLM2-135M",
                size,
                {"TRL": run, "fasttax": patched(run, name)},
                floor_bytes=12 * PARAMETERS,
                floor_flops=2 * FORWARDS.get(name, 3) * PARAMETERS * tokens,
                rounds=5 if name in WITH_PEAK else 8,
            )


def _measure(name: str, whose: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = step(name, {**WITH_PEAK, **OTHERS}[name], folder)
        run = patched(run, name) if whose == "fasttax" else run
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        run()
        print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> float:
    """A line of /proc/self/status, in KB."""
    return next(
        float(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


if __name__ == "__main__":
    _measure(*sys.argv[1:])
