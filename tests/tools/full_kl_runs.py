"""TRL's trainers with a KL beside their loss, by a second forward and log-softmaxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.tools import trl_runs

BETA = 0.4


def counted(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask, and which tokens the trainer's loss counts."""
    if "completion_ids" in inputs:
        ids, mask = (
            torch.cat((inputs[f"prompt_{x}"], inputs[f"completion_{x}"]), 1)
            for x in ("ids", "mask")
        )
        return (
            ids,
            mask,
            nn.functional.pad(inputs["completion_mask"], (inputs["prompt_ids"].shape[1], 0)) != 0,
        )
    if "labels" in inputs:
        return inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100
    return inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"] != 0


def divergence(kind: str, logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if kind == "jsd":
        m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        return (q.exp() * (q - m) + p.exp() * (p - m)).sum(-1) / 2
    a, b = (p, q) if kind == "policy_ref" else (q, p)
    return (a.exp() * (a - b)).sum(-1)


def oracle(name: str, kind: str) -> type:
    """The trainer with beta * mean KL added by a second policy forward."""

    class WithKL(trl_runs.classes(name)[0]):  # type: ignore[misc]
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            ids, mask, tokens = counted(inputs)
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            logits = [
                m(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1] / temperature
                for m in (self.model, self.reference)
            ]
            kl = divergence(kind, logits[0], logits[1].detach())[tokens[:, 1:]].sum()
            count = tokens[:, 1:].sum()
            if name == "sft":
                count = num_items_in_batch
            if name == "grpo":  # dapo: the tokens of the window
                count = (
                    inputs["num_items_in_batch"]
                    * self.current_gradient_accumulation_steps
                    / self.args.steps_per_generation
                )
            return loss + BETA * kl / count

    temperature = 0.9 if name in ("grpo", "rloo") else 1.0
    return WithKL


def make(name: str, folder: Path, base: type | None = None, **changes: Any) -> Any:
    if name in ("grpo", "rloo"):
        changes = {"temperature": 0.9, **changes}
    return trl_runs.make(name, folder, base=base, **changes)
