"""LLaMA-Factory's way: a callback that attaches to the trainer that a framework makes by itself."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainerCallback

import fasttax
from fasttax.integrations import llamafactory
from fasttax.integrations.llamafactory import FasttaxCallback
from fasttax.integrations.transformers import attach
from tests.tools import launched, tiny_lm

INSTALLED = importlib.util.find_spec("llamafactory") is not None


@pytest.fixture
def fisher(tmp_path: Path) -> str:
    torch.manual_seed(3)
    path = tmp_path / "fisher.safetensors"
    batch = {"input_ids": tiny_lm.ids()[:4]}
    fasttax.estimate_fisher(tiny_lm.model(), [batch], progress=False).save(path)
    return str(path)


def trainer(folder: Path, callbacks: Any = None) -> Trainer:
    return launched.trainer(folder, use_cpu=True, callbacks=callbacks)


def weights(made: Trainer) -> list[torch.Tensor]:
    made.train()
    return [p.detach() for p in made.model.parameters()]


def test_is_what_attach_does(fisher: str, tmp_path: Path) -> None:
    ours = trainer(
        tmp_path / "ours",
        [FasttaxCallback({"fisher": fisher, "strength": 2.0}, {"beta": 0.5, "kind": "jsd"})],
    )
    oracle, plain = trainer(tmp_path / "oracle"), trainer(tmp_path / "plain")
    attach(
        oracle,
        ewc=fasttax.EWC(oracle.model, fisher, strength=2.0),
        kl={"ref_model": copy.deepcopy(oracle.model).eval(), "beta": 0.5, "kind": "jsd"},
    )
    for a, b in zip(weights(ours), weights(oracle), strict=True):
        assert torch.equal(a, b)
    pairs = zip(ours.model.parameters(), weights(plain), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    logged = {key for entry in ours.state.log_history for key in entry}
    assert {"ewc/penalty", "kl/jsd"} <= logged


def test_takes_itself_out_and_comes_back(fisher: str, tmp_path: Path) -> None:
    """A second train() of the trainer has it once, not twice."""
    made = trainer(tmp_path, [FasttaxCallback({"fisher": fisher, "strength": 2.0}, {"beta": 0.5})])
    before = list(made.callback_handler.callbacks)
    made.train()
    assert made.callback_handler.callbacks == before
    assert "compute_loss" not in vars(made)
    made.train()
    assert made.callback_handler.callbacks == before


class BreaksOff(TrainerCallback):
    """The first run, after a step, as where memory runs out."""

    runs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.runs += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.runs == 1:
            raise MemoryError


def test_after_a_run_that_was_broken_off(fisher: str, tmp_path: Path) -> None:
    """auto_find_batch_size begins anew in the same trainer."""
    ours = FasttaxCallback({"fisher": fisher, "strength": 2.0}, {"beta": 0.5})
    made = trainer(tmp_path, [ours, BreaksOff()])
    before = list(made.callback_handler.callbacks)
    with pytest.raises(MemoryError):
        made.train()
    made.train()
    assert made.callback_handler.callbacks == before
    assert "compute_loss" not in vars(made)


def test_in_a_trainer_that_was_made_before(fisher: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.add_callback(FasttaxCallback({"fisher": fisher, "strength": 2.0}))
    with pytest.raises(RuntimeError, match=r"pass callbacks=\[...\] to it, or use attach"):
        made.train()


@pytest.mark.parametrize(
    ("block", "error", "said"),
    [
        ({}, ValueError, "a block with ewc or kl, or both, got none"),
        ({"ewc": {"fisher": "f", "stregth": 1.0}}, ValidationError, "stregth"),
        ({"kl": {"beta": -1.0}}, ValidationError, "beta"),
    ],
)
def test_a_wrong_block_is_refused(block: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        FasttaxCallback(**block)


# --- LLaMA-Factory's own entry --------------------------------------------------------------------


@pytest.mark.skipif(INSTALLED, reason="the real one is there")
def test_run_exp_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    tuner: Any = ModuleType("llamafactory.train.tuner")
    tuner.run_exp = lambda args, callbacks: seen.append((args, callbacks))
    train: Any = ModuleType("llamafactory.train")
    train.tuner = tuner
    for name, module in (
        ("llamafactory", ModuleType("llamafactory")),
        ("llamafactory.train", train),
        ("llamafactory.train.tuner", tuner),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    given = {"stage": "sft", "fasttax": {"kl": {"beta": 0.1}}}
    llamafactory.run_exp(given)
    ((args, callbacks),) = seen
    assert args == {"stage": "sft"}
    assert callbacks[0].options.kl.beta == 0.1
    assert "fasttax" in given
    with pytest.raises(ValueError, match="train by llamafactory-cli"):
        llamafactory.run_exp({"stage": "sft"})


@pytest.mark.skipif(not INSTALLED, reason="llamafactory is not installed")
def test_a_yaml_trains_in_llamafactory(fisher: str, tmp_path: Path) -> None:
    model = tiny_lm.save(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"count {i}", "input": "", "output": "one two"} for i in range(8)]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    options = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": model,
        "dataset": "rows",
        "dataset_dir": str(data),
        "template": "empty",
        "finetuning_type": "full",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "fasttax": {"ewc": {"fisher": fisher, "strength": 2.0}, "kl": {"beta": 0.5}},
    }
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(options))
    llamafactory.main([str(path)])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 2
    assert all(entry["ewc/penalty"] > 0 for entry in steps)
    assert steps[1]["kl/policy_ref"] > 0
