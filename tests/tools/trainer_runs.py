"""transformers' Trainer on the tiny model: its rows and arguments, an EWC, what a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fasttax
from tests.tools import tiny_lm

STRENGTH = 20.0
ROUNDING = 3e-7  # parameters are below 1.5 in size: two roundings


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of different lengths, so that micro-batches hold different numbers of tokens."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.rows[i].clone()
        labels[: 1 + i % 5] = -100
        return {
            "input_ids": self.rows[i],
            "attention_mask": torch.ones_like(labels),
            "labels": labels,
        }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return TrainingArguments(output_dir=str(folder), **{**options, **changes})


def held(model: nn.Module, strength: float = STRENGTH) -> fasttax.EWC:
    """Held away from where it stands, so that the penalty pulls from the first step on."""
    generator = torch.Generator().manual_seed(11)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fisher = {n: torch.rand(p.shape, generator=generator) for n, p in trainable.items()}
    anchor = {
        n: p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
        for n, p in trainable.items()
    }
    return fasttax.EWC(model, fisher, strength=strength, anchor=anchor)


def plain(folder: Path, callbacks: Any = (), model: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        tiny_lm.model() if model is None else model,
        arguments(folder, **changes),
        train_dataset=Rows(tiny_lm.ids()),
        callbacks=list(callbacks),
    )


def train(trainer: Any) -> Any:
    transformers.set_seed(5)
    trainer.train()
    return trainer


def difference(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((x.detach().double() - y.detach().double()).abs().max())
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class WithKL(Trainer):
    """The oracle: log-softmaxes, in the loss, over the tokens whose label counts."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, out = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        with torch.no_grad():
            ref = self.ref(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits
        logp, ref_logp = out.logits[:, :-1].log_softmax(-1), ref[:, :-1].log_softmax(-1)
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)[inputs["labels"][:, 1:] != -100]
        return loss + 0.3 * kl.sum() / num_items_in_batch


def texts(count: int = 3, rows: int = 3) -> list[dict[str, Tensor]]:
    """Batches of another size than the trainer's, rows of several lengths, padded on the right."""
    found = []
    for i in range(count):
        ids = tiny_lm.ids(rows, 10, seed=20 + i)
        real = torch.arange(10) < torch.tensor([[10], [6], [3]])[:rows]
        found.append({"input_ids": ids * real, "attention_mask": real.long()})
    return found


def by_hand(model: Any, batch: dict[str, Tensor], kind: str, ref: Any = None) -> Tensor:
    """The mean over the batch's tokens, by torch's own functions."""
    x = model(**batch).logits[:, :-1].float()
    real = batch["attention_mask"][:, 1:] != 0
    if kind == "lm":
        return F.cross_entropy(x[real], batch["input_ids"][:, 1:][real])
    with torch.no_grad():
        q = ref(**batch).logits[:, :-1].float().log_softmax(-1)
    p = x.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[real].mean()


class FakeArguments:
    deepspeed = None
    distributed_state = None
    output_dir = "nowhere"
    process_index, world_size = 0, 1


class FakeState:
    global_step = 0
    log_history: list[dict[str, float]]
