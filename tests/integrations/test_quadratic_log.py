"""The KL to a base and its second-order form in a trainer's log."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fasttax.integrations.transformers import attach
from fasttax.tax import kl_quadratic, kl_to_base
from tests.tools import tiny_lm
from tests.tools.trainer_runs import difference, history, plain, texts, train


class Copies(transformers.TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.models.append(copy.deepcopy(model))


def test_the_log_has_what_the_functions_give(tmp_path: Path) -> None:
    seen, base = Copies(), tiny_lm.model()
    trainer = plain(tmp_path, [seen])
    batches = iter(texts(2))  # read once, and kept
    with attach(trainer, log_quadratic={"ref_model": base, "batches": batches}):
        train(trainer)
    kls = [kl_to_base(model, base, texts(2)) for model in seen.models]
    seconds = [kl_quadratic(model, base, texts(2)) for model in seen.models]
    assert history(trainer, "kl/to_base") == pytest.approx(kls, rel=1e-5)
    assert history(trainer, "kl/quadratic") == pytest.approx(seconds, rel=1e-5)
    assert all(0.3 < b / a < 3 for a, b in zip(kls, seconds, strict=True))
    assert difference(train(plain(tmp_path)).model, trainer.model) == 0  # nothing is changed
    train(trainer)
    assert len(history(trainer, "kl/quadratic")) < len(trainer.state.log_history)


def test_autocast_is_no_distance(tmp_path: Path) -> None:
    """Equal weights have no KL: both models run as the trainer runs its own."""
    trainer = plain(tmp_path, bf16=True, learning_rate=0.0, max_steps=2)
    with attach(trainer, log_quadratic={"ref_model": tiny_lm.model(), "batches": texts(2)}):
        trainer.train()
    assert history(trainer, "kl/to_base") == history(trainer, "kl/quadratic") == [0.0, 0.0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (True, "as {'ref_model': base, 'batches': general_text}"),
        ({"ref_model": tiny_lm.model()}, "'batches': general_text"),
        ({"ref_model": "gpt2", "batches": texts()}, "expected a model"),
        ({"ref_model": tiny_lm.model(), "batches": "a"}, "an iterable of batches"),
        ({"ref_model": tiny_lm.model(), "batches": []}, "a token that is followed by another"),
        ({"ref_model": Two(), "batches": texts()}, "a model of base's parameters"),
        ({"ref_model": Two(), "batches": texts(), "every": 2}, "one of 'ref_model', 'batches'"),
    ],
)
def test_refused_when_attached(given: Any, words: str, tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises((ValueError, TypeError), match=words):
        attach(trainer, log_quadratic=given)
    assert trainer.callback_handler.callbacks == before
