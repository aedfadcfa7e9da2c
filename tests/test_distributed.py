"""DiagonalFisher.reduce over two gloo processes is the estimate of one process over both halves."""

from __future__ import annotations

from pathlib import Path

import torch
from models import TokenModel, ids, worst
from processes import on_ranks

from fasttax import DiagonalFisher, FisherEstimate


def estimate(rank: int, folder: Path) -> None:
    estimator = DiagonalFisher(torch.nn.parallel.DistributedDataParallel(TokenModel()), labels="true")
    x = ids(5, 6)
    estimator.update(x[:2] if rank == 0 else x[2:])  # unequal shares
    estimator.reduce()
    estimator.finalize().save(folder / f"{rank}.safetensors")


def test_reduce_over_two_processes_is_one_process(tmp_path: Path) -> None:
    on_ranks(estimate, tmp_path)
    estimator = DiagonalFisher(TokenModel(), labels="true")
    estimator.update(ids(5, 6))
    whole = estimator.finalize()
    ranks = [FisherEstimate.load(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for f in ranks:
        error, name = worst(f, dict(whole))
        assert error <= 1e-6, f"{name}: {error:.1e}"
        assert (f.metadata["examples"], f.metadata["tokens"]) == (5, 25)
    assert all(torch.equal(ranks[0][n], ranks[1][n]) for n in whole)
