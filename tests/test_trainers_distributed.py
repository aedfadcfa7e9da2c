"""The trainer integrations on two gloo processes: DDP in transformers' Trainer, FSDP2 by the trainer's own loss (Accelerate has no FSDP
without a GPU). Everything runs in one pair of processes: most of the time is their imports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
import transformers
from processes import on_ranks
from test_full_kl import BETA, make
from test_transformers import ROUNDING, Rows, WithKL, arguments, difference, held, history
from torch import Tensor, nn
from transformers import Trainer

from fasttax.integrations.transformers import EWCCallback, attach
from fasttax.integrations.trl import FullKL


def ddp(rank: int, folder: Path) -> None:
    ref, model = tiny_lm.model(1), tiny_lm.model()
    trainer = Trainer(model, arguments(folder, per_device_train_batch_size=1, ddp_backend="gloo", max_steps=2), train_dataset=Rows(tiny_lm.ids()))
    attach(trainer, ewc=held(model), kl={"ref_model": ref, "beta": 0.3})
    trainer.train()
    save(rank, folder / "ddp.pt", (dict(trainer.model.state_dict()), history(trainer, "kl/policy_ref")))


def loss_and_gradient(folder: Path, shard: bool, rows: slice) -> dict[str, Tensor]:
    """Of SFT with FullKL on `rows` of a batch of 28 counted tokens."""
    trainer: Any = make("sft", folder)
    FullKL(trainer, tiny_lm.model(1), BETA)
    if shard:
        from torch.distributed.fsdp import fully_shard

        for layer in (*trainer.model.model.layers, trainer.model):
            fully_shard(layer)
    ids = tiny_lm.ids(4)
    batch = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids)[rows], "labels": ids.masked_fill(torch.arange(12) < 5, -100)[rows]}
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(28)).backward()
    return {n: p.grad.full_tensor() if shard else p.grad for n, p in trainer.model.named_parameters()}


def save(rank: int, path: Path, value: Any) -> None:
    if rank == 0:
        torch.save(value, path)


def everything(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29511")
    ddp(rank, folder)
    save(rank, folder / "fsdp.pt", loss_and_gradient(folder, True, slice(2 * rank, 2 * rank + 2)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(everything, folder)
    return folder


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


@pytest.mark.slow
def test_ddp_is_one_process(ranks: Path, tmp_path: Path) -> None:
    """Every rank adds the penalty's gradient, which the mean leaves as it is; the KL is the mean over all ranks' tokens."""
    model = tiny_lm.model()
    alone: Any = WithKL(model, arguments(tmp_path, max_steps=2), train_dataset=Rows(tiny_lm.ids()), callbacks=[EWCCallback(held(model))])
    alone.ref = tiny_lm.model(1)
    transformers.set_seed(5)
    alone.train()
    state, kl = torch.load(ranks / "ddp.pt")
    assert difference(load(tiny_lm.model(), state), alone.model) <= 4 * ROUNDING
    assert len(kl) == 2


@pytest.mark.slow
def test_full_kl_under_fsdp2_is_one_process(ranks: Path, tmp_path: Path) -> None:
    alone, sharded = loss_and_gradient(tmp_path, False, slice(None)), torch.load(ranks / "fsdp.pt")
    assert alone.keys() == sharded.keys()
    for name, gradient in alone.items():
        error = float((sharded[name] - gradient).norm() / gradient.norm())
        assert error <= 1e-5, f"{name}: {error:.1e}"
