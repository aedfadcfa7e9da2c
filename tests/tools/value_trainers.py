"""TRL's trainers with heads that score: Reward, and PPO where TRL has it (until 1.9)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import fasttax
from tests.tools import tiny_lm, trl_runs


def scorer(seed: int = 2) -> Any:
    """A LlamaForSequenceClassification with one score."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_lm.model().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def reward(folder: Path, **changes: Any) -> Any:
    """RewardTrainer on the texts, each against a shorter one backwards."""
    import trl
    from datasets import Dataset

    rows = [{"chosen": t, "rejected": t[::-1][: 8 + i]} for i, t in enumerate(trl_runs.TEXTS)]
    options = {**trl_runs.COMMON, "max_length": 64, **changes}
    return trl.RewardTrainer(
        model=scorer(),
        args=trl.RewardConfig(output_dir=str(folder), **options),
        processing_class=tiny_lm.tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )


def ppo(folder: Path, **changes: Any) -> Any:
    """PPOTrainer: two updates of four responses.

    Raises:
        ModuleNotFoundError: this TRL has none.
    """
    from datasets import Dataset

    module = importlib.import_module("trl.experimental.ppo")
    tokenizer = tiny_lm.tokenizer()
    tokenizer.padding_side = "left"
    rows = [{"input_ids": tokenizer(text[:12])["input_ids"]} for text in trl_runs.TEXTS]
    options = {
        **{k: v for k, v in trl_runs.COMMON.items() if k not in ("max_steps", "max_grad_norm")},
        "total_episodes": 8,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "num_sample_generations": 0,
        "response_length": 6,
        "local_rollout_forward_batch_size": 2,
        "missing_eos_penalty": None,
        **changes,
    }
    return module.PPOTrainer(
        args=module.PPOConfig(output_dir=str(folder), **options),
        processing_class=tokenizer,
        model=tiny_lm.model(),
        ref_model=tiny_lm.model(1),
        reward_model=scorer(),
        value_model=scorer(3),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
    )


STRENGTH = 5.0


def held(model: nn.Module) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """An EWC, with the Fisher and anchor of it."""
    fisher, anchor = {}, {}
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(i)
        fisher[name] = torch.rand(p.shape, generator=generator)
        anchor[name] = p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
    return fasttax.EWC(model, fisher, strength=STRENGTH, anchor=anchor), fisher, anchor


def by_hand(model: nn.Module, optimizer: Any) -> Any:
    """The gradient, added before each step of the optimizer."""
    _, fisher, anchor = held(model)

    def before(*args: Any) -> None:
        for name, p in model.named_parameters():
            pull = STRENGTH * fisher[name] * (p.detach() - anchor[name])
            p.grad = pull if p.grad is None else p.grad + pull

    return optimizer.register_step_pre_hook(before)


class Hand(TrainerCallback):
    """`by_hand` on the optimizer that training begins with."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        by_hand(kwargs["model"], getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
