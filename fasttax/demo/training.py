"""One fine-tuning run: the same batches, budget and optimizer for all.

The recipe says what holds the model in place.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import fasttax
from fasttax.demo.codecs import Codec
from fasttax.demo.progress import bar as progress_bar
from fasttax.demo.settings import DemoError
from fasttax.demo.texts import Item, collate

Batch = dict[str, Tensor]
WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """Weight of KL(policy || base) over the batch's tokens, and strength of EWC; 0 is without."""

    name: str
    kl: float = 0.0
    ewc: float = 0.0

    @property
    def label(self) -> str:
        """What holds the model, and how strongly; "plain" for nothing."""
        strengths = {"KL": self.kl, "EWC": self.ewc}
        held = [f"{name} {value:g}" for name, value in strengths.items() if value]
        return " + ".join(held) or "plain"


def training_batches(
    items: Sequence[Item],
    steps: int,
    batch_size: int,
    seed: int,
    codec: Codec,
    device: torch.device,
) -> list[Batch]:
    """`steps` batches, epoch after epoch in a shuffled order."""
    shuffle = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        epoch = list(range(len(items)))
        shuffle.shuffle(epoch)
        order += epoch
    return [
        collate(
            [items[i] for i in order[s * batch_size : (s + 1) * batch_size]], codec.pad_id, device
        )
        for s in range(steps)
    ]


def forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (N, T, V)."""
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return logits


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    scored = batch["scored"][:, 1:]
    return F.cross_entropy(logits[:, :-1][scored], batch["input_ids"][:, 1:][scored])


def new_optimizer(model: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    """Without weight decay: what pulls towards the base is the recipe alone."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def reset(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """The reference's weights, and no gradients."""
    with torch.no_grad():
        for p, base in zip(model.parameters(), reference.parameters(), strict=True):
            p.copy_(base)
            p.grad = None


def train(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    ewc: fasttax.EWC,
    batches: Sequence[Batch],
    recipe: Recipe,
    lr: float,
    title: str,
) -> list[dict[str, float]]:
    """Trains `model` from the base weights.

    Returns:
        The curve: a row of loss, kl, penalty, lr and seconds for each step.

    Raises:
        DemoError: the loss is not finite any more.
    """
    reset(model, reference)
    model.train()
    ewc.strength = recipe.ewc
    optimizer = new_optimizer(model, lr)
    warmup = max(1, round(WARMUP * len(batches)))
    curve = []
    with progress_bar(batches, desc=title, unit="step") as bar:
        for step, batch in enumerate(bar):
            begin = time.perf_counter()
            # linear up, then linear down; never 0, so that no step is without effect
            now = lr * min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.zero_grad(set_to_none=True)
            logits = forward(model, batch)
            loss = answer_loss(logits, batch)
            kl = penalty = torch.zeros(())
            total = loss
            if recipe.kl:
                with torch.no_grad():
                    ref_logits = forward(reference, batch)
                kl = fasttax.token_kl(
                    logits, ref_logits, mask=batch["attention_mask"] != 0, reduction="mean"
                )
                total = loss + recipe.kl * kl
            total.backward()
            if recipe.ewc:
                penalty = ewc.add_grad_()
            optimizer.step()
            if not math.isfinite(float(loss.detach())):
                raise DemoError(
                    f"training diverged at step {step + 1} of {recipe.label} (loss "
                    f"{float(loss.detach())}); try a lower --lr than {lr:g}"
                )
            row = {
                "step": step,
                "loss": float(loss.detach()),
                "kl": float(kl.detach()),
                "penalty": float(penalty),
                "lr": now,
            }
            curve.append({**row, "seconds": time.perf_counter() - begin})
            shown = [f"loss {row['loss']:.3f}"]
            if recipe.kl:
                shown.append(f"KL {row['kl']:.4f}")
            if recipe.ewc:
                shown.append(f"EWC {row['penalty']:.4f}")
            bar.set_postfix_str(", ".join(shown), refresh=False)
    model.eval()
    return curve
