"""The trainer integrations on two gloo processes.

DDP is transformers' Trainer's; FSDP2 runs by the trainer's own loss, for Accelerate has no FSDP
without a GPU. Everything runs in one pair of processes: most of the time is their imports.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from fasttax.integrations.transformers import EWCCallback, attach
from fasttax.integrations.trl import FullKL
from tests.tools import tiny_lm
from tests.tools.full_kl_runs import BETA, make
from tests.tools.processes import on_ranks
from tests.tools.trainer_runs import (
    ROUNDING,
    FakeArguments,
    FakeState,
    Rows,
    WithKL,
    arguments,
    difference,
    held,
    history,
    texts,
)


def ddp(rank: int, folder: Path) -> None:
    ref, model = tiny_lm.model(1), tiny_lm.model()
    trainer = Trainer(
        model,
        arguments(folder, per_device_train_batch_size=1, ddp_backend="gloo", max_steps=2),
        train_dataset=Rows(tiny_lm.ids()),
    )
    attach(trainer, ewc=held(model), kl={"ref_model": ref, "beta": 0.3})
    trainer.train()
    save(
        rank,
        folder / "ddp.pt",
        (dict(trainer.model.state_dict()), history(trainer, "kl/policy_ref")),
    )


class Branch(LlamaForCausalLM):
    """With a parameter that texts of ten tokens use: the replay's, and none of the trainer's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.linspace(-1, 1, config.vocab_size))

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **given: Any
    ) -> Any:
        output = super().forward(input_ids, attention_mask, labels=labels, **given)
        if input_ids.shape[1] == 10:
            output.logits = output.logits + self.extra
        return output


def branch() -> Any:
    model = Branch(tiny_lm.model().config)
    model.load_state_dict(tiny_lm.model().state_dict(), strict=False)
    return model


def replayed(folder: Path, rows: slice, each: int, **changes: Any) -> Any:
    """Three steps with both kinds of replay, whose rows are of several lengths."""
    batch = texts(1)[0]
    trainer = Trainer(
        branch(),
        arguments(folder, per_device_train_batch_size=each, **changes),
        train_dataset=Rows(tiny_lm.ids()),
    )
    given = {"loader": [{name: x[rows] for name, x in batch.items()}], "weight": 0.7}
    attach(trainer, replay={**given, "kind": "lm"})
    attach(trainer, replay={**given, "kind": "kl", "ref_model": tiny_lm.model(1)})
    transformers.set_seed(5)
    trainer.train()
    return trainer, [history(trainer, f"replay/{kind}") for kind in ("lm", "kl")]


def projected(folder: Path, rows: slice, each: int, **changes: Any) -> Any:
    """Three steps perpendicular to the gradients of two batches, each rank's rows its own."""
    general = [{name: x[rows] for name, x in batch.items()} for batch in texts(2)]
    trainer = Trainer(
        tiny_lm.model(),
        arguments(folder, per_device_train_batch_size=each, **changes),
        train_dataset=Rows(tiny_lm.ids()),
    )
    attach(trainer, project={"general": general, "directions": 2})
    transformers.set_seed(5)
    trainer.train()
    return trainer


def loss_and_gradient(folder: Path, shard: bool, rows: slice) -> dict[str, Tensor]:
    """Of SFT with FullKL on `rows` of a batch of 28 counted tokens."""
    trainer: Any = make("sft", folder)
    FullKL(trainer, tiny_lm.model(1), BETA)
    if shard:
        from torch.distributed.fsdp import fully_shard

        for layer in (*trainer.model.model.layers, trainer.model):
            fully_shard(layer)
    ids = tiny_lm.ids(4)
    batch = {
        "input_ids": ids[rows],
        "attention_mask": torch.ones_like(ids)[rows],
        "labels": ids.masked_fill(torch.arange(12) < 5, -100)[rows],
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(28)).backward()
    return {
        n: p.grad.full_tensor() if shard else p.grad for n, p in trainer.model.named_parameters()
    }


def steps(model: nn.Module, callback: EWCCallback, batches: list[Tensor]) -> None:
    """The Trainer's order of calls, with accumulation 2 and clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        callback.on_step_begin(None, None, None, optimizer=optimizer)
        for batch in (first, second):
            (model(input_ids=batch, labels=batch, use_cache=False).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()


def ewc_under_fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = tiny_lm.model()
    callback = EWCCallback(held(model))
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    callback.on_train_begin(FakeArguments(), FakeState(), None, model=model)
    rows = tiny_lm.ids(8)
    steps(model, callback, [rows[i : i + 2][rank : rank + 1] for i in range(0, 8, 2)])
    logs, state = {"loss": 1.0}, FakeState()
    state.log_history = []
    callback.on_log(None, state, None, logs=logs)
    save(
        rank,
        folder / "ewc.pt",
        ({name: p.full_tensor() for name, p in model.state_dict().items()}, logs),
    )


def save(rank: int, path: Path, value: Any) -> None:
    if rank == 0:
        torch.save(value, path)


def everything(rank: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT="29511",
    )
    ddp(rank, folder)
    trainer, logged = replayed(folder, slice(2 * rank, 2 * rank + 2), 1, ddp_backend="gloo")
    save(rank, folder / "replay.pt", (dict(trainer.model.state_dict()), logged))
    model = projected(folder, slice(2 * rank, 2 * rank + 2), 1, ddp_backend="gloo").model
    save(rank, folder / "project.pt", dict(model.state_dict()))
    ewc_under_fsdp2(rank, folder)
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
    """Ranks agree with one process that sees all rows.

    Every rank adds the penalty's gradient, which the mean leaves as it is; the KL is the mean over
    all ranks' tokens.
    """
    model = tiny_lm.model()
    alone: Any = WithKL(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=Rows(tiny_lm.ids()),
        callbacks=[EWCCallback(held(model))],
    )
    alone.ref = tiny_lm.model(1)
    transformers.set_seed(5)
    alone.train()
    state, kl = torch.load(ranks / "ddp.pt")
    assert difference(load(tiny_lm.model(), state), alone.model) <= 4 * ROUNDING
    assert len(kl) == 2


@pytest.mark.slow
def test_replay_under_ddp_is_one_process(ranks: Path, tmp_path: Path) -> None:
    """Ranks read loaders of their own, of 14 and of 3 tokens; the mean is over the tokens of all.

    Accumulation is 2, so that the replay's gradient waits through a micro-batch without a sync.
    """
    alone, wanted = replayed(tmp_path, slice(None), 2)
    state, logged = torch.load(ranks / "replay.pt")
    assert difference(load(branch(), state), alone.model) <= 4 * ROUNDING
    moved = alone.model.extra - branch().extra  # which the trainer's own loss does not reach
    assert float(moved.detach().abs().max()) > 1e3 * ROUNDING
    for found, own in zip(logged, wanted, strict=True):
        assert found == pytest.approx(own, rel=1e-5)
        assert len(found) == 3


@pytest.mark.slow
def test_projection_under_ddp_is_one_process(ranks: Path, tmp_path: Path) -> None:
    """The directions are gradients of a mean over all ranks' tokens, 14 and 3 of a batch."""
    alone = projected(tmp_path, slice(None), 2)
    state = torch.load(ranks / "project.pt")
    assert difference(load(tiny_lm.model(), state), alone.model) <= 4 * ROUNDING


@pytest.mark.slow
def test_full_kl_under_fsdp2_is_one_process(ranks: Path, tmp_path: Path) -> None:
    alone, sharded = loss_and_gradient(tmp_path, False, slice(None)), torch.load(ranks / "fsdp.pt")
    assert alone.keys() == sharded.keys()
    for name, gradient in alone.items():
        error = float((sharded[name] - gradient).norm() / gradient.norm())
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_ewc_under_fsdp2_is_one_process(ranks: Path) -> None:
    """The EWC was built before sharding; the callback makes it anew on the shards."""
    state, logs = torch.load(ranks / "ewc.pt")
    model = tiny_lm.model()
    ewc = held(model)
    steps(model, EWCCallback(ewc), list(tiny_lm.ids(8).split(2)))
    assert difference(load(tiny_lm.model(), state), model) <= ROUNDING
    assert logs["ewc/penalty"] == pytest.approx(float(ewc.penalty().detach()), rel=1e-5)
    assert logs["ewc/distance"] == pytest.approx(float(ewc.distance().total), rel=1e-5)
