"""Kronecker estimates and EWC on them over two gloo processes are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, KroneckerEstimate
from fasttax._base.dtensor import part_of, whole
from fasttax.fisher.kronecker_fisher import KroneckerFisher
from tests.tools.models import TokenModel, causal_lm, ids
from tests.tools.processes import on_ranks
from tests.tools.utils import named

ROWS = ids(5, 6)


def my_rows(rank: int) -> Tensor:
    return ROWS[:2] if rank == 0 else ROWS[2:]


def moved(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for n, p in model.named_parameters()
    }


def run(model: nn.Module, estimate: KroneckerEstimate, state: dict[str, Tensor]) -> dict[str, Any]:
    ewc = EWC(model, estimate, strength=3.0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            (p.to_local() if hasattr(p, "to_local") else p).copy_(part_of(state[n], p))
    penalty = ewc.penalty()
    penalty.backward()
    out = {"penalty": penalty.detach(), "distance": ewc.distance().total}
    for n, p in model.named_parameters():
        assert p.grad is not None
        out[f"grad {n}"] = whole(p.grad).clone()
    model.zero_grad()
    out["added penalty"] = ewc.add_grad_()
    out |= {f"added {n}": whole(p.grad).clone() for n, p in model.named_parameters()}
    ewc.prox_(0.5)
    out |= {f"after {n}": whole(p.detach()).clone() for n, p in model.named_parameters()}
    return out


def fully_sharded(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = causal_lm("llama")
    state = moved(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for how in ("finalize", "reduce"):
        estimator = KroneckerFisher(model, labels="true")
        estimator.update(my_rows(rank))
        if how == "reduce":
            estimator.reduce()
        estimate = estimator.finalize()
        estimate.save(folder / f"{how}-{rank}.safetensors")
    torch.save(run(model, estimate, state), folder / f"{rank}.pt")
    del estimate.metadata["model_hash"]  # the anchor is none that it was estimated at
    ewc = EWC(model, estimate, strength=1.0, anchor=state)
    ewc.save(folder / "ewc.safetensors")
    again = EWC.load(folder / "ewc.safetensors", model)
    assert float(again.penalty().detach()) == float(ewc.penalty().detach()) > 0


def data_parallel(rank: int, folder: Path) -> None:
    estimator = KroneckerFisher(nn.parallel.DistributedDataParallel(TokenModel()), labels="true")
    estimator.update(my_rows(rank))
    estimator.reduce()
    estimator.finalize().save(folder / f"ddp-{rank}.safetensors")


def tensor_parallel(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    split = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(TokenModel(), init_device_mesh("cpu", (2,)), split)
    with pytest.raises(ValueError, match=r"tensor parallel.*structure='diagonal'"):
        KroneckerFisher(model, labels="true").update(ROWS)


def everything(rank: int, folder: Path) -> None:
    for work in (data_parallel, fully_sharded, tensor_parallel):
        work(rank, folder)


def test_two_processes_are_one_process(tmp_path: Path) -> None:
    on_ranks(everything, tmp_path)
    options: dict[str, Any] = {"structure": "kron", "labels": "true", "progress": False}
    model = causal_lm("llama")
    truths = {
        "ddp": fasttax.estimate_fisher(TokenModel(), [ROWS], **options),
        "finalize": fasttax.estimate_fisher(model, [ROWS], **options),
    }
    truths["reduce"] = truths["finalize"]
    for how, truth in truths.items():
        for rank in range(2):
            got = KroneckerEstimate.load(tmp_path / f"{how}-{rank}.safetensors")
            assert got.metadata["examples"] == 5
            for name in truth:
                torch.testing.assert_close(
                    got[name], truth[name], rtol=1e-5, atol=1e-9, msg=named(f"{how} {name}")
                )
            for name, pair in truth.factors.items():
                for mine, theirs in zip(got.factors[name], pair, strict=True):
                    scale = float(theirs.abs().max())
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale)
    expected = run(model, truths["reduce"], moved(causal_lm("llama")))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(got) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=named(name))
