"""FullKL in one step of transformers' Trainer, against the KL of the models' own logits."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.trainer_callback import PrinterCallback

from fasttax.integrations.trl import FullKL
from tests.sweep.batches import EXAMPLES, collated, example
from tests.sweep.checks import OWN, refusal
from tests.sweep.models import encodes
from tests.sweep.result import NONE, RIGHT, WRONG, Case, Outcome

FAMILIES = ("causal", "seq2seq", "image-text", "speech")  # of models with a vocabulary
TOLERANCE = 1e-5


class Rows(Dataset[dict[str, Tensor]]):
    """The examples of a batch."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return example(self.batch, i)


def trainer(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """One step that moves nothing."""
    cls: Any = transformers.Trainer
    kind: Any = transformers.TrainingArguments
    if encodes(model.config):
        cls, kind = transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments
    arguments = kind(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=EXAMPLES,
        max_steps=1,
        learning_rate=0.0,
        optim="sgd",
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=0,
    )
    made = cls(model=model, train_dataset=Rows(batch), args=arguments, data_collator=collated)
    made.remove_callback(PrinterCallback)
    return made


def perturbed(model: nn.Module) -> nn.Module:
    """A reference that differs from the policy."""
    found = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.05)
    return found


def truth(case: Case, policy: nn.Module, ref: nn.Module, batch: dict[str, Tensor]) -> float:
    """The mean KL(policy || ref) of the models' own logits over the labelled tokens."""
    labels = batch["labels"]
    given = dict(batch)
    shift = not encodes(policy.config) and shifts_labels(policy, batch)
    if not encodes(policy.config):
        del given["labels"]
    with torch.no_grad():
        x, y = (m(**given).logits.log_softmax(-1) for m in (policy, ref))
    kl = (x.exp() * (x - y)).sum(-1)
    if shift:
        kl, labels = kl[:, :-1], labels[:, 1:]
    return float(kl[labels != -100].mean())


def shifts_labels(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether the model's own loss takes the next label, which Bart's decoders for one do not."""
    labels = batch["labels"]
    with torch.no_grad():
        output = model(**batch)
        if getattr(output, "loss", None) is None or output.logits.shape[:2] != labels.shape:
            return True
        unshifted = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    return not torch.allclose(unshifted, output.loss.to(unshifted))


def full_kl(case: Case, policy: nn.Module, ref: nn.Module, batch: dict[str, Tensor]) -> Outcome:
    """The KL that is logged at the first step, against the models' own."""
    try:
        wanted = truth(case, policy, ref, batch)
        order = collated([example(batch, n) for n in reversed(range(EXAMPLES))])
        other = truth(case, policy, ref, order)
    except Exception as error:
        return Outcome(NONE, f"no logits by token: {error}")
    if abs(other - wanted) > TOLERANCE * abs(wanted) + 1e-7:
        return Outcome(NONE, "its logits depend on the order of the batch, which the Trainer draws")
    made = trainer(case, copy.deepcopy(policy), batch)
    try:
        with FullKL(made, ref, 0.5):
            made.train()
    except Exception as error:
        return _untrainable(case, policy, batch) or refusal(error, policy, (*OWN, RuntimeError))
    found = [entry["kl/policy_ref"] for entry in made.state.log_history if "kl/policy_ref" in entry]
    if not found:
        return Outcome(WRONG, "nothing was logged")
    if abs(found[0] - wanted) <= TOLERANCE * abs(wanted) + 1e-7:
        return Outcome(RIGHT)
    return Outcome(WRONG, f"{found[0]:.6g} for {wanted:.6g}")


def _untrainable(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Outcome | None:
    """Why the Trainer cannot train the model even without FullKL; None where it can."""
    try:
        trainer(case, copy.deepcopy(model), batch).train()
    except Exception as error:
        return Outcome(NONE, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return None
