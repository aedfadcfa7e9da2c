"""One fine-tuning run: the same batches, budget and optimizer for all.

The recipe says what holds the model in place.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import fasttax
from fasttax.demo.codecs import Codec
from fasttax.demo.methods import Recipe
from fasttax.demo.progress import bar as progress_bar
from fasttax.demo.settings import DemoError
from fasttax.demo.texts import Item, collate

Batch = dict[str, Tensor]
WARMUP = 0.1  # share of the steps
PENALTIES = ("ewc", "kron")


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
    """Mean cross-entropy of the scored tokens: an answer's, or a passage's all but the first."""
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


class Diverged(DemoError):
    """The loss of a run is not finite any more."""


def train(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    ewcs: Mapping[str, fasttax.EWC],
    answers: Sequence[Batch],
    general: Sequence[Batch],
    recipe: Recipe,
    lr: float,
    title: str,
    at: Mapping[int, Callable[[], None]] | None = None,
) -> list[dict[str, float]]:
    """Trains `model` from the base weights.

    Args:
        model: becomes the reference's descendant.
        reference: the base.
        ewcs: over the model, for the recipe's `ewc` and `kron`.
        answers: a batch a step.
        general: as many, of general text, for the recipes that replay it.
        recipe: what holds the model.
        lr: the peak learning rate, before the recipe's factor.
        title: of the progress bar.
        at: what is called after so many steps, in evaluation mode, outside of the seconds.

    Returns:
        The curve: a row of loss, kl, penalty, replay, lr and seconds for each step; on a CPU
        these are processor time, which other programs slow down less.

    Raises:
        Diverged: the loss is not finite any more.
    """
    reset(model, reference)
    model.train()
    held = [ewcs[name] for name in PENALTIES if getattr(recipe, name)]
    for name in PENALTIES:
        if getattr(recipe, name):
            ewcs[name].strength = getattr(recipe, name)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    peak = lr * recipe.lr
    optimizer = new_optimizer(model, peak)
    warmup = max(1, round(WARMUP * len(answers)))
    curve = []
    with progress_bar(answers, desc=title, unit="step") as bar:
        for step, batch in enumerate(bar):
            begin = clock()
            # linear up, then linear down; never 0, so that no step is without effect
            rate = min((step + 1) / warmup, (len(answers) - step) / (len(answers) - warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.zero_grad(set_to_none=True)
            loss, kl = _answers_gradient(model, reference, batch, recipe)
            replay = torch.zeros(())
            if recipe.replays:
                replay = _replay_gradient(model, reference, general[step], recipe)
            penalty = sum(float(ewc.add_grad_()) for ewc in held)
            optimizer.step()
            row = {
                "loss": float(loss),
                "kl": float(kl),
                "replay": float(replay),
                "penalty": penalty,
                "lr": peak * rate,
                "seconds": clock() - begin,
            }
            if not all(map(math.isfinite, row.values())):
                raise Diverged(
                    f"training diverged at step {step + 1} of {recipe.label} (loss "
                    f"{row['loss']}); try a lower --lr than {lr:g}"
                )
            curve.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            if at is not None and step + 1 in at:
                model.eval()
                at[step + 1]()
                model.train()
    model.eval()
    return curve


def _answers_gradient(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """(the answers' loss, KL(policy || base) over the batch's tokens), their gradient added."""
    logits = forward(model, batch)
    loss = answer_loss(logits, batch)
    kl = torch.zeros(())
    total = loss
    if recipe.kl:
        with torch.no_grad():
            ref_logits = forward(reference, batch)
        mask = batch["attention_mask"] != 0
        kl = fasttax.token_kl(logits, ref_logits, mask=mask, reduction="mean")
        total = loss + recipe.kl * kl
    total.backward()
    return loss.detach(), kl.detach()


def _replay_gradient(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, recipe: Recipe
) -> Tensor:
    """The replayed text's loss with the recipe's weights, its gradient added."""
    logits = forward(model, batch)
    total = torch.zeros((), device=logits.device)
    if recipe.lm:
        total = total + recipe.lm * answer_loss(logits, batch)
    if recipe.replay_kl:
        with torch.no_grad():
            ref_logits = forward(reference, batch)
        scored = batch["scored"].roll(-1, 1)  # a passage's last token predicts nothing
        kl = fasttax.token_kl(logits, ref_logits, mask=scored, reduction="mean")
        total = total + recipe.replay_kl * kl
    total.backward()
    return total.detach()
