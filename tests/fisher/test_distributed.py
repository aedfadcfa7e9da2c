"""DiagonalFisher over two gloo processes is the estimate of one process over both halves: DDP,
FSDP2, tensor parallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import DiagonalFisher, FisherEstimate
from tests.tools.models import TokenModel, assert_exact, causal_lm, fisher_of, ids
from tests.tools.processes import on_ranks

CE = nn.functional.cross_entropy


def my_rows(rank: int) -> Tensor:
    x = ids(5, 6)
    return x[:2] if rank == 0 else x[2:]  # unequal shares


def data_parallel(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(TokenModel())
    x = my_rows(rank)
    for how in ("update", "observe"):
        estimator = DiagonalFisher(model, labels="true")
        if how == "update":
            estimator.update(x)
        else:
            with estimator.observe():
                CE(
                    model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum"
                ).backward()
        estimator.reduce()
        with pytest.raises(RuntimeError, match="new DiagonalFisher"):
            estimator.reduce()  # would count every rank twice
        estimator.finalize().save(folder / f"{how}-{rank}.safetensors")
    CE(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()  # training goes on
    assert model.module.up.weight.grad is not None


def fully_sharded(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = causal_lm("llama_tied")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    estimator = DiagonalFisher(model, labels="true")
    estimator.update(my_rows(rank))
    state = folder / f"state-{rank}.safetensors"
    estimator.checkpoint(state)
    resumed = DiagonalFisher(model, labels="true")
    resumed.resume(state)
    first = estimator.finalize()  # the counts of all ranks, before reduce() too
    resumed.reduce()
    fisher = resumed.finalize()
    for n, f in fisher.items():
        assert type(f).__name__ == "DTensor"
        assert f.shape == dict(model.named_parameters())[n].shape
        assert torch.equal(f.to_local(), first[n].to_local())  # type: ignore[attr-defined]
    fisher.save(folder / f"fsdp-{rank}.safetensors")
    fisher.to("bf16").save(folder / "sharded", sharded=True)
    again = FisherEstimate.load(folder / "sharded")
    whole = {n: f.full_tensor() for n, f in fisher.items()}  # type: ignore[attr-defined]
    assert all(torch.equal(again[n], f.bfloat16()) for n, f in whole.items())
    x = my_rows(rank)
    model(input_ids=x, labels=x).loss.backward()  # training goes on
    assert model.model.norm.weight.grad is not None


def not_finite_on_one_rank(rank: int, folder: Path) -> None:
    """Every rank says so, whichever has the shard."""
    from torch.distributed.fsdp import fully_shard

    model: Any = TokenModel()
    for part in (model.up, model):
        fully_shard(part)
    estimator = DiagonalFisher(model, labels="true")
    estimator.update(my_rows(rank))
    if rank == 1:
        estimator.sums.value("up.weight").view(-1)[-1] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got NaN or infinite ones of up\.weight: a batch"):
            estimator.finalize()
        if rank == 1:
            estimator.sums.value("up.weight").view(-1)[-1] = torch.inf
    estimator.sums.value("up.weight").nan_to_num_(nan=0.0, posinf=0.0)
    assert len(estimator.finalize()) == len(dict(model.named_parameters()))


def split_by_features(model: nn.Module, mesh: Any, rows: bool = True) -> nn.Module:
    """The two linear layers, the embedding (by words or by features) and the head over the ranks of
    `mesh`.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    embed = (
        RowwiseParallel(input_layouts=Replicate())
        if rows
        else ColwiseParallel(output_layouts=Replicate())
    )
    head = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(
        model,
        mesh,
        {"up": ColwiseParallel(), "down": RowwiseParallel(), "embed": embed, "head": head},
    )


def padded_model(tied: bool = False) -> TokenModel:
    model = TokenModel(tied)
    model.embed.padding_idx = 4
    return model


def tensor_parallel(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for kind, rows, tied in (
        ("tp", True, False),
        ("tp-features", False, False),
        ("tp-tied", True, True),
    ):
        model: Any = split_by_features(padded_model(tied), mesh, rows)
        if tied:
            model.head.weight = model.embed.weight  # parallelize_module makes two of it
        estimator = DiagonalFisher(model, labels="true")
        estimator.update(ids(5, 6))
        with pytest.raises(ValueError, match=r"reduce: group.*data-parallel"):
            estimator.reduce()
        estimator.finalize().save(folder / f"{kind}-{rank}.safetensors")


def sharded_and_split(rank: int, folder: Path) -> None:
    """FSDP2 over pairs of ranks that hold different examples, tensor parallelism within a pair."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "features"))
    model: Any = split_by_features(padded_model(), mesh["features"])
    for part in (model.up, model.head, model):
        fully_shard(part, mesh=mesh["data"])
    for how in ("finalize", "reduce"):
        estimator = DiagonalFisher(model, labels="true")
        estimator.update(my_rows(rank // 2))
        if how == "reduce":
            estimator.reduce()
        fisher = estimator.finalize()
        assert all(
            f.placements == p.placements  # type: ignore[attr-defined]
            for f, p in zip(fisher.values(), model.parameters(), strict=True)
        )
        fisher.save(folder / f"{how}-{rank}.safetensors")


def context_parallel(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import context_parallel as cp

    mesh, x = init_device_mesh("cpu", (2,)), ids(2, 8)
    estimator = DiagonalFisher(TokenModel(), labels="true")
    with pytest.raises(ValueError, match=r"unit.*context parallel"):
        estimator.update({"input_ids": distribute_tensor(x, mesh, [Shard(1)])})
    with (
        cp(mesh, buffers=[x.clone()], buffer_seq_dims=[1]),
        pytest.raises(ValueError, match=r"unit.*context parallel"),
    ):
        estimator.update(x)
    with (
        cp(mesh, buffers=[x.clone()], buffer_seq_dims=[1]),
        pytest.raises(ValueError, match=r"unit.*context parallel"),
        estimator.observe(),
    ):
        pass
    estimator.update(x)


def everything(rank: int, folder: Path) -> None:
    for work in (
        data_parallel,
        fully_sharded,
        not_finite_on_one_rank,
        tensor_parallel,
        context_parallel,
    ):
        work(rank, folder)


def test_two_processes_are_one_process(tmp_path: Path) -> None:
    on_ranks(everything, tmp_path)
    whole = fasttax.estimate_fisher(TokenModel(), [ids(5, 6)], labels="true", progress=False)
    llama = fasttax.estimate_fisher(
        causal_lm("llama_tied"), [ids(5, 6)], labels="true", progress=False
    )
    padded = fasttax.estimate_fisher(padded_model(), [ids(5, 6)], labels="true", progress=False)
    tied = fasttax.estimate_fisher(
        padded_model(tied=True), [ids(5, 6)], labels="true", progress=False
    )
    truths = {
        "update": whole,
        "observe": whole,
        "tp": padded,
        "tp-features": padded,
        "tp-tied": tied,
        "fsdp": llama,
    }
    for kind, truth in truths.items():
        check(tmp_path, kind, truth, 2)
    assert fisher_of(TokenModel(), ids(2, 4)).metadata["examples"] == 2


def test_four_processes_in_two_pairs_are_one_process(tmp_path: Path) -> None:
    on_ranks(sharded_and_split, tmp_path, world_size=4)
    truth = fasttax.estimate_fisher(padded_model(), [ids(5, 6)], labels="true", progress=False)
    for how in ("finalize", "reduce"):
        check(tmp_path, how, truth, 4)


def check(folder: Path, kind: str, truth: FisherEstimate, world_size: int) -> None:
    ranks = [
        FisherEstimate.load(folder / f"{kind}-{rank}.safetensors") for rank in range(world_size)
    ]
    for f in ranks:
        assert_exact(f, dict(truth), 1e-6)
        assert (f.metadata["examples"], f.metadata["tokens"], f.metadata["model_hash"]) == (
            5,
            30 if kind == "observe" else 25,
            truth.metadata["model_hash"],
        )
        assert all(torch.equal(ranks[0][n], f[n]) for n in f)


def test_sharded_files_of_one_process(tmp_path: Path) -> None:
    """Files of at most max_shard_bytes and an index; a missing part is an error that names it."""
    f = fasttax.estimate_fisher(TokenModel(), [ids(3, 6)], progress=False, storage="u8log")
    f.save(tmp_path / "f", sharded=True, max_shard_bytes=1000)
    parts = sorted(p.name for p in (tmp_path / "f").iterdir())
    assert len(parts) > 2
    again = FisherEstimate.load(tmp_path / "f")
    assert set(again) == set(f)
    assert again.metadata == f.metadata
    assert all(torch.equal(again[n], f[n]) for n in f)
    (tmp_path / "f" / parts[1]).unlink()
    with pytest.raises(FileNotFoundError, match=parts[1].replace(".", r"\.")):
        FisherEstimate.load(tmp_path / "f")
