"""Gradients projected onto the complement of general text's, in trainers and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fasttax.integrations._project import Project
from fasttax.integrations.transformers import attach
from tests.tools import tiny_lm
from tests.tools.full_kl_runs import make
from tests.tools.trainer_runs import by_hand, difference, held, history, plain, texts, train

CASES: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    {"gradient_accumulation_steps": 3, "max_steps": 5},
    {"gradient_checkpointing": True},
]


# rows of one token, after which nothing is predicted
NOTHING = {
    "input_ids": torch.ones(2, 3, dtype=torch.long),
    "attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def directions(count: int) -> Tensor:
    """The gradients of the texts' losses at the base, one a row, by autograd in float64."""
    model = tiny_lm.model().eval()
    rows = []
    for batch in texts(count):
        loss = by_hand(model, batch, "lm")
        rows.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(rows)


class Seen(transformers.TrainerCallback):
    """The gradients that the optimizer takes: it is asked after all others of the event."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradients.append(flat(p.grad for p in model.parameters()))


class ByHand(transformers.TrainerCallback):
    """The oracle: the part along the directions' span taken out, by least squares in float64."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        g, rows = flat(p.grad for p in model.parameters()), directions(3)
        along = rows.T @ torch.linalg.lstsq(rows.T, g[:, None]).solution[:, 0]
        left = torch.split(g - along, [p.numel() for p in model.parameters()])
        for p, value in zip(model.parameters(), left, strict=True):
            p.grad.copy_(value.view_as(p))


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(c) or "plain")
def test_every_step_is_perpendicular(changes: dict[str, Any], tmp_path: Path) -> None:
    seen = Seen()
    ours, theirs = plain(tmp_path, [seen], **changes), plain(tmp_path, [ByHand()], **changes)
    with attach(ours, project={"general": texts(), "directions": 3}):
        train(ours)
    train(theirs)
    rows = directions(3)
    assert len(seen.gradients) == ours.args.max_steps
    for gradient in seen.gradients:
        cosine = (rows @ gradient) / (rows.norm(dim=1) * gradient.norm())
        assert cosine.abs().max() < 1e-5
    assert difference(ours.model, theirs.model) < 1e-6
    assert difference(train(plain(tmp_path, **changes)).model, ours.model) > 1e-4
    removed = history(ours, "project/removed")
    assert len(removed) == ours.args.max_steps
    assert all(0 < share < 1 for share in removed)


@pytest.mark.parametrize("where", ["pre_clip", "post_clip"])
def test_the_penalty_is_projected_with_it(where: str, tmp_path: Path) -> None:
    seen = Seen()
    trainer = plain(tmp_path, [seen])
    with attach(trainer, ewc=held(trainer.model), project={"general": texts()}, where=where):
        train(trainer)
    rows = directions(3)
    for gradient in seen.gradients:
        assert ((rows @ gradient).abs() < 1e-5 * rows.norm(dim=1) * gradient.norm()).all()


def test_trl_and_bf16_autocast(tmp_path: Path) -> None:
    seen = Seen()
    trainer: Any = make("sft", tmp_path, bf16=True)
    trainer.add_callback(seen)
    with attach(trainer, project={"general": texts(), "directions": 2}):
        trainer.train()
    assert 0 < history(trainer, "project/removed")[0] < 1
    assert seen.gradients


def test_undone(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    handle = attach(trainer, project={"general": texts()})
    handle.undo()
    handle.undo()
    assert difference(train(trainer).model, train(plain(tmp_path)).model) == 0


@pytest.mark.parametrize(
    ("project", "words"),
    [
        ("general", "expected general text to read, as {'general': batches, 'directions': 8}"),
        ({"loader": []}, "expected general text to read"),
        ({"general": texts(), "rank": 3}, "one of 'general', 'directions'"),
        ({"general": texts(), "directions": 0}, "an integer >= 1"),
        ({"general": []}, r"project\['general'\]: expected at least one batch"),
        ({"general": [torch.ones(1, 1, dtype=torch.long)]}, "input_ids .B, T. of 2 tokens or more"),
        ({"general": [NOTHING]}, "gradients of 0"),
    ],
)
def test_refusals(project: Any, words: str, tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises((ValueError, TypeError), match=words):
        attach(trainer, project=project)
    assert trainer.callback_handler.callbacks == before


def test_replay_beside_it_and_a_second_one_are_refused(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    with pytest.raises(ValueError, match=r"none beside replay.*leave out one of the two"):
        attach(trainer, project={"general": texts()}, replay=texts())
    with (
        attach(trainer, project={"general": texts()}),
        pytest.raises(ValueError, match="one that has it already; undo"),
    ):
        attach(trainer, project={"general": texts()})


def test_parameters_made_anew_are_refused(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    attach(trainer, project={"general": texts()})
    trainer.model_wrapped = trainer.model = tiny_lm.model()
    with pytest.raises(ValueError, match="made anew by model_init; train with DDP"):
        trainer.train()


class Reporter(transformers.TrainerCallback):
    """What wandb and the progress bar see of a log: they stand behind those that add to it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen.append(logs["project/removed"])


class Push(transformers.TrainerCallback):
    """Adds to the gradient: a callback of the user's own, given after attach."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            for p in model.parameters():
                p.grad.add_(self.value)


def test_reporters_and_callbacks_of_others(tmp_path: Path) -> None:
    seen, reporter = Seen(), Reporter()
    trainer = plain(tmp_path, [reporter, seen])
    with attach(trainer, project={"general": texts()}):
        trainer.add_callback(Push(0.01))
        train(trainer)
    rows = directions(3)
    for gradient in seen.gradients:
        assert ((rows @ gradient).abs() < 1e-5 * rows.norm(dim=1) * gradient.norm()).all()
    assert reporter.seen == history(trainer, "project/removed")
    assert len(reporter.seen) == trainer.args.max_steps


class Emptied(transformers.TrainerCallback):
    """Every gradient times a factor: none, as of batches that are masked, or overflown."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for p in model.parameters():
            p.grad.mul_(self.factor)


def test_the_share_that_is_removed(tmp_path: Path) -> None:
    """0 of nothing; what is not finite is no share, of which 0 would say that all is well."""
    for factor, expected in ((0.0, 0.0), (float("inf"), None)):
        trainer = plain(tmp_path, [Emptied(factor)], max_steps=1)
        with attach(trainer, project={"general": texts()}):
            train(trainer)
        assert history(trainer, "project/removed") == ([] if expected is None else [expected])


def test_an_optimizer_of_a_part_is_refused(tmp_path: Path) -> None:
    """The part of a perpendicular gradient that it takes is not perpendicular."""
    model = tiny_lm.model()
    part = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer = plain(tmp_path, model=model)
    trainer.optimizer = part
    attach(trainer, project={"general": texts()})
    with pytest.raises(ValueError, match=r"SGD of 1 of them; requires_grad_\(False\)"):
        trainer.train()
    # the way out
    model = tiny_lm.model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer = plain(tmp_path, model=model)
    trainer.optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    with attach(trainer, project={"general": texts()}):
        train(trainer)
    assert history(trainer, "project/removed")


def test_text_without_a_finite_loss_is_refused(tmp_path: Path) -> None:
    model = tiny_lm.model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    broken = {"input_ids": torch.full((1, 4), 7)}
    trainer = plain(tmp_path, model=model)
    with pytest.raises(ValueError, match="a finite gradient at the weights of the moment"):
        attach(trainer, project={"general": [*texts(1), broken], "directions": 2})


def test_fp16_keeps_small_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the states is 1e-8 here, which fp16 has only where the loss is scaled."""
    model = tiny_lm.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-5)
    trainer = plain(tmp_path, model=model)
    # accelerate has fp16 on GPUs only; torch's autocast has it on CPUs as well
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    attach(trainer, project={"general": texts(1), "directions": 1})
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Project))
    (found,) = callback.complement.basis
    body = [i for i, (name, _) in enumerate(model.named_parameters()) if "lm_head" not in name]
    parameters = list(model.parameters())
    exact = torch.autograd.grad(by_hand(model.eval(), texts(1)[0], "lm"), parameters)
    x, y = flat(found[i] for i in body), flat(exact[i] for i in body)
    assert x @ y > 0.99 * x.norm() * y.norm() > 0
