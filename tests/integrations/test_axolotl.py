"""The Axolotl plugin: what a YAML block puts into a trainer is what `attach` puts there.

Axolotl's own package pins versions of torch and transformers, so `BasePlugin` is a class of the
same name here where it is not installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

import fasttax
from fasttax.integrations.transformers import attach
from tests.tools import tiny_lm


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.ids = tiny_lm.ids()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")
        monkeypatch.setattr(base, "BasePlugin", type("BasePlugin", (), {}), raising=False)
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "fasttax.integrations.axolotl", raising=False)
    module = importlib.import_module("fasttax.integrations.axolotl")
    yield module
    sys.modules.pop("fasttax.integrations.axolotl", None)


@pytest.fixture
def fisher(tmp_path: Path) -> str:
    torch.manual_seed(3)
    model = tiny_lm.model()
    path = tmp_path / "fisher.safetensors"
    batch = {"input_ids": tiny_lm.ids()[:4]}
    fasttax.estimate_fisher(model, [batch], progress=False).save(path)
    return str(path)


def trainer(folder: Path, model: Any = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    model = tiny_lm.model() if model is None else model
    return Trainer(model=model, args=arguments, train_dataset=Rows())


def weights(made: Trainer) -> list[torch.Tensor]:
    made.train()
    return [p.detach() for p in made.model.parameters()]


def test_a_block_is_what_attach_does(plugin: Any, fisher: str, tmp_path: Path) -> None:
    ours, oracle = trainer(tmp_path / "ours"), trainer(tmp_path / "oracle")
    block = {"ewc": {"fisher": fisher, "strength": 2.0}, "kl": {"beta": 0.5, "kind": "jsd"}}
    plugin.FasttaxPlugin().post_trainer_create({"fasttax": block}, ours)
    attach(
        oracle,
        ewc=fasttax.EWC(oracle.model, fisher, strength=2.0),
        kl={"ref_model": copy.deepcopy(oracle.model).eval(), "beta": 0.5, "kind": "jsd"},
    )
    plain = weights(trainer(tmp_path / "plain"))
    for a, b in zip(weights(ours), weights(oracle), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain, strict=True))
    logged = {key for entry in ours.state.log_history for key in entry}
    assert {"ewc/penalty", "kl/jsd"} <= logged


def test_a_reference_from_a_folder(plugin: Any, tmp_path: Path) -> None:
    """Another model than the policy: the KL is not 0 at the first step."""
    tiny_lm.model(seed=9).save_pretrained(tmp_path / "ref")
    made = trainer(tmp_path / "run")
    block = {"kl": {"beta": 0.1, "reference_model": str(tmp_path / "ref"), "temperature": None}}
    plugin.FasttaxPlugin().post_trainer_create({"fasttax": block}, made)
    made.train()
    first = next(e["kl/policy_ref"] for e in made.state.log_history if "kl/policy_ref" in e)
    assert first > 1e-3


def test_fields_have_a_place_in_axolotls_configuration(plugin: Any) -> None:
    place, name = plugin.FasttaxPlugin().get_input_args().rsplit(".", 1)
    fields = getattr(importlib.import_module(place), name)
    assert fields.model_validate({"fasttax": {"kl": {"beta": 0.1}}}).fasttax.kl.beta == 0.1
    assert fields.model_validate({"base_model": "x"}).fasttax is None


@pytest.mark.parametrize(
    ("block", "error", "said"),
    [
        (None, ValueError, "a block with ewc or kl"),
        ({}, ValueError, r"write fasttax: \{ewc"),
        ({"ewc": {"fisher": "f", "stregth": 1.0}}, ValidationError, "stregth"),
        ({"ewc": {"fisher": "f"}}, ValidationError, "strength"),
        ({"kl": {"beta": -1.0}}, ValidationError, "beta"),
        ({"kl": {"beta": 1.0, "kind": "forward"}}, ValidationError, "policy_ref"),
        (
            {"kl": {"beta": 1.0, "reference_model": "a", "reference_cache": "b"}},
            ValueError,
            "leave out one of the two",
        ),
        ({"ewc": {"fisher": "nowhere.safetensors", "strength": 1.0}}, FileNotFoundError, "nowhere"),
    ],
)
def test_a_wrong_block_is_refused_and_nothing_is_attached(
    plugin: Any, tmp_path: Path, block: Any, error: type[Exception], said: str
) -> None:
    made = trainer(tmp_path)
    before = list(made.callback_handler.callbacks)
    with pytest.raises(error, match=said):
        plugin.FasttaxPlugin().post_trainer_create({"fasttax": block}, made)
    assert made.callback_handler.callbacks == before


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotls_own_manager_finds_and_calls_it(fisher: str, tmp_path: Path) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register("fasttax.integrations.axolotl.FasttaxPlugin")
    assert "fasttax.integrations.axolotl.FasttaxArgs" in manager.get_input_args()
    made = trainer(tmp_path)
    block = {"ewc": {"fisher": fisher, "strength": 2.0}, "kl": {"beta": 0.5}}
    manager.post_trainer_create(DictDefault({"fasttax": block}), made)
    made.train()
    logged = {key for entry in made.state.log_history for key in entry}
    assert {"ewc/penalty", "kl/policy_ref"} <= logged
