"""Reward and PPO: EWC at their steps is the gradient added by hand; what else would be lost is
refused as it is made.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from fasttax.integrations.transformers import EWCCallback, attach
from fasttax.integrations.trl import FullKL
from tests.tools import launched, tiny_lm, value_trainers
from tests.tools.trainer_runs import difference, train
from tests.tools.value_trainers import Hand, by_hand, held

HAS_PPO = importlib.util.find_spec("trl.experimental.ppo") is not None


def test_ewc_of_a_reward_model(tmp_path: Path) -> None:
    ours = value_trainers.reward(tmp_path, max_grad_norm=0.0)
    wanted = value_trainers.reward(tmp_path, max_grad_norm=0.0)
    wanted.add_callback(Hand())
    with attach(ours, ewc=held(ours.model)[0]):
        train(ours)
    train(wanted)
    assert difference(ours.model, wanted.model) < 1e-6
    plain = train(value_trainers.reward(tmp_path, max_grad_norm=0.0))
    assert difference(ours.model, plain.model) > 1e-3
    assert all("ewc/penalty" in e for e in ours.state.log_history if "loss" in e)


def test_a_kl_of_a_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"whose model scores whole .*attach\(trainer, ewc=ewc\)"):
        FullKL(value_trainers.reward(tmp_path), tiny_lm.model(1), 0.1)


# --- a loop of its own ----------------------------------------------------------------------------


class PPOTrainer(Trainer):
    """TRL's PPO in its calls: no events but a step's end, and no compute_loss."""

    control: Any

    def train(self) -> None:
        self.create_optimizer_and_scheduler(2)
        handler = self.callback_handler
        handler.model, handler.optimizer = self.model, self.optimizer
        self.control = handler.on_train_begin(self.args, self.state, self.control)
        for row in tiny_lm.ids(2).split(1):
            self.model(input_ids=row, labels=row).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.log({"loss/policy_avg": 0.0})
            self.control = handler.on_step_end(self.args, self.state, self.control)
        self.control = handler.on_train_end(self.args, self.state, self.control)


def looping(folder: Path, **options: Any) -> Any:
    made = launched.trainer(folder, use_cpu=True)
    return PPOTrainer(made.model, made.args, train_dataset=made.train_dataset, **options)


def test_ewc_in_a_loop_of_its_own(tmp_path: Path) -> None:
    ours, wanted = looping(tmp_path), looping(tmp_path, callbacks=[Hand()])
    handle = attach(ours, ewc=held(ours.model)[0])
    train(ours)
    train(wanted)
    assert difference(ours.model, wanted.model) < 1e-6
    assert difference(ours.model, train(looping(tmp_path)).model) > 1e-3
    assert len([e for e in ours.state.log_history if "ewc/penalty" in e]) == 2
    handle.undo()


def test_a_callback_alone_would_be_silent_there(tmp_path: Path) -> None:
    made = looping(tmp_path)
    made.add_callback(EWCCallback(held(made.model)[0]))
    with pytest.raises(RuntimeError, match=r"without on_step_begin.*attach\(trainer, ewc=ewc\)"):
        train(made)


@pytest.mark.parametrize("what", ["kl", "replay", "project", "log_quadratic"])
def test_all_else_is_refused_there(what: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "kl": {"ref_model": tiny_lm.model(1), "beta": 0.1},
        "replay": {"loader": [tiny_lm.ids(2)]},
        "project": {"general": [tiny_lm.ids(2)]},
        "log_quadratic": {"ref_model": tiny_lm.model(1), "batches": [tiny_lm.ids(2)]},
    }
    made = looping(tmp_path)
    before = list(made.callback_handler.callbacks)
    with pytest.raises(ValueError, match="which computes its loss and steps in a loop of its own"):
        attach(made, **{what: options[what]})
    assert made.callback_handler.callbacks == before


@pytest.mark.skipif(not HAS_PPO, reason="this TRL has no PPO")
def test_ewc_in_trls_ppo(tmp_path: Path) -> None:
    """TRL 1.9's and 0.27's own; `make matrix` runs it there."""
    ours, wanted = value_trainers.ppo(tmp_path), value_trainers.ppo(tmp_path)
    by_hand(wanted.policy_model, wanted.optimizer.optimizer)
    attach(ours, ewc=held(ours.policy_model)[0])
    train(ours)
    train(wanted)
    assert difference(ours.policy_model, wanted.policy_model) < 1e-6
    with pytest.raises(ValueError, match="use its own kl_coef, or GRPO or RLOO"):
        FullKL(value_trainers.ppo(tmp_path), tiny_lm.model(1), 0.1)
