"""One loss of a trainer with FullKL on it, and the KL of the models' own logits in float64."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from fasttax.integrations.trl import FullKL

VOCABULARY, TOKENS = 61, 9
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 50, (3, TOKENS), generator=torch.Generator().manual_seed(0))
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "labels": torch.where(torch.arange(TOKENS) < 3, -100, IDS),
}


def spread(model: Any, seed: int = 0, std: float = 0.2) -> Any:
    """Weights that differ from their neighbours and between seeds, those that start at 0 too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def llama(seed: int = 0, **changes: Any) -> Any:
    """The plainest of them."""
    config = transformers.LlamaConfig(**{**SIZES, **changes})
    return spread(transformers.LlamaForCausalLM(config), seed)


def shaken(model: Any, size: float = 0.3) -> Any:
    """An adapter that has learned something."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * size)
    return model


class Rows(Dataset[dict[str, Tensor]]):
    """The examples of a batch."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in self.batch.items()}


class NoLogits(transformers.Trainer):
    """A loss of 0 that asks for the last logits alone; trainers with fused heads ask for none."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        given = {k: v for k, v in inputs.items() if k != "labels"}
        return model(**given, logits_to_keep=1).logits.sum() * 0


def trainer(
    model: Any,
    cls: type = transformers.Trainer,
    batch: dict[str, Tensor] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of three rows a step."""
    options: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": 3,
        "max_steps": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **changes,
    }
    seq2seq = issubclass(cls, transformers.Seq2SeqTrainer)
    kind: Any = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    who = {"model": model} if isinstance(model, nn.Module) else {"model_init": model}
    rows = Rows(BATCH if batch is None else batch)
    return cls(**who, args=kind(**options), train_dataset=rows)


@dataclass
class Step:
    """What a loss with FullKL was made of."""

    kl: float  # the mean over the tokens that count
    tokens: float
    loss: Tensor
    grads: dict[str, Tensor]
    trainer: Any


def step(
    model: Any,
    ref: Any,
    kind: str = "policy_ref",
    *,
    beta: float = 0.5,
    cls: type = transformers.Trainer,
    batch: dict[str, Tensor] | None = None,
    items: Any = None,
    **options: Any,
) -> Step:
    """The first loss of a trainer and its gradients."""
    made = trainer(model, cls, batch)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    with FullKL(made, ref, beta, kind, **options) as full:
        given = dict(BATCH if batch is None else batch)
        loss = made.compute_loss(made.model, given, num_items_in_batch=items)
    loss.backward()
    total, tokens = full.events.since_log[f"kl/{kind}"].tolist()
    grads = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    return Step(total / max(tokens, 1), tokens, loss.detach(), grads, made)


def divergence(x: Tensor, y: Tensor, kind: str = "policy_ref") -> Tensor:
    """Of logits, by row."""
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    if kind == "jsd":
        m = torch.logaddexp(p, q) - math.log(2)
        return (q.exp() * (q - m) + p.exp() * (p - m)).sum(-1) / 2
    a, b = (p, q) if kind == "policy_ref" else (q, p)
    return (a.exp() * (a - b)).sum(-1)


def logits(model: Any, batch: dict[str, Tensor] | None = None, labels: bool = False) -> Tensor:
    """The model's own, in float64, with a graph."""
    given = dict(BATCH if batch is None else batch)
    if not labels:
        del given["labels"]
    found: Tensor = model(**given).logits
    return found


def truth(
    policy: Any,
    ref: Any,
    kind: str = "policy_ref",
    *,
    batch: dict[str, Tensor] | None = None,
    shift: bool = True,
    temperature: float = 1.0,
) -> tuple[float, dict[str, Tensor]]:
    """The mean KL over the labelled tokens, and its gradients, in float64."""
    batch = BATCH if batch is None else batch
    policy, ref = (copy.deepcopy(m).double().eval() for m in (policy, ref))
    x, y = logits(policy, batch, not shift), logits(ref, batch, not shift).detach()
    labels = batch["labels"]
    T = labels.shape[1]
    x, y = x[:, -T:] / temperature, y[:, -T:] / temperature
    if shift:
        x, y, labels = x[:, :-1], y[:, :-1], labels[:, 1:]
    value = divergence(x, y, kind)[labels != -100].mean()
    value.backward()
    grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return float(value.detach()), grads


def error(found: dict[str, Tensor], wanted: dict[str, Tensor], scale: float = 1.0) -> float:
    """Norm of the difference to scale * wanted over that one's norm, all parameters together."""
    names = set(found) | set(wanted)
    zero = torch.zeros(())
    off = sum(
        float((found.get(n, zero).double() - scale * wanted.get(n, zero).double()).square().sum())
        for n in names
    )
    size = sum(float((scale * w.double()).square().sum()) for w in wanted.values())
    return math.sqrt(off / size)
