"""Two GPUs, a process on each, over NCCL: DDP, FSDP2 and a vocabulary in two against one process.

Without two GPUs the same runs on the CPU over gloo, which shows that the test itself is right.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC, DiagonalFisher
from fasttax._base.dtensor import whole
from tests.tools.models import causal_lm, fisher_of, ids, worst
from tests.tools.processes import on_ranks

ON_GPUS = torch.cuda.device_count() >= 2
RANKS = 2


def home(rank: int) -> torch.device:
    return torch.device("cuda", rank) if ON_GPUS else torch.device("cpu")


def close(got: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(got.detach().cpu().double(), truth.double(), rtol=1e-4, atol=1e-7)


def fishers(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def loss_of(model: nn.Module, base: nn.Module, x: Tensor) -> Tensor:
    """A mean over a batch: of two halves it is the mean of theirs."""
    logits: Tensor = model(input_ids=x).logits
    with torch.no_grad():
        ref_logits = base(input_ids=x).logits
    return fasttax.token_kl(logits, ref_logits, reduction="mean")


def stepped(model: Any, ewc: EWC, base: nn.Module, x: Tensor) -> float:
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, base, x).backward()
        optimizer.step()
    return float(optimizer.penalty)


def data_parallel(rank: int) -> None:
    """A step of each half is the step of the batch, and so is the Fisher of the halves."""
    base, x = causal_lm("llama"), ids(4, 9)
    with torch.no_grad():
        moved = copy.deepcopy(base)
        for p in moved.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    mine, device = x[2 * rank : 2 * rank + 2], home(rank)
    truth, here = copy.deepcopy(moved).double(), copy.deepcopy(moved).to(device)
    expected = stepped(truth, EWC(truth, fishers(truth), strength=0.5), base.double(), x)
    wrapped = nn.parallel.DistributedDataParallel(here)
    ewc = EWC(here, fishers(here), strength=0.5)
    found = stepped(wrapped, ewc, base.float().to(device), mine.to(device))
    assert abs(found - expected) <= 1e-3 * abs(expected)
    for p, q in zip(here.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-3, atol=2e-5)
    again = nn.parallel.DistributedDataParallel(copy.deepcopy(moved).to(device))
    estimator = DiagonalFisher(again, labels="true")
    estimator.update(mine.to(device))
    estimator.reduce()
    truth_of = dict(fisher_of(copy.deepcopy(moved).double(), x, labels="true"))
    found_of = {n: f.cpu() for n, f in estimator.finalize(normalize="sum").items()}
    assert worst(found_of, truth_of)[0] < 1e-4


def sharded(rank: int) -> None:
    """EWC over FSDP2's shards pulls as over whole parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = causal_lm("llama").to(home(rank))
    start = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    fisher = fishers(model)
    mesh = init_device_mesh("cuda" if ON_GPUS else "cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ewc = EWC(model, fisher, strength=3.0)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(0.1)
    value = ewc.add_grad_()
    expected = sum(float(1.5 * (f * 0.1**2).sum()) for f in fisher.values())
    assert abs(float(value) - expected) <= 1e-4 * expected
    for n, p in model.named_parameters():
        close(whole(p.grad), 3.0 * fisher[n] * (whole(p.detach()).cpu() - start[n]))


def vocabulary(rank: int) -> None:
    """A KL of a vocabulary in two is that of the whole."""
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(5, 101, generator=generator)
    y = x + 0.3 * torch.randn(5, 101, generator=generator)
    part = slice(0, 60) if rank == 0 else slice(60, None)
    for kind in ("policy_ref", "jsd"):
        wide = [t.double().requires_grad_() for t in (x, y)]
        truth = fasttax.token_kl(*wide, kind=kind)
        expected = torch.autograd.grad(truth.sum(), wide)
        mine = [t[:, part].to(home(rank)).requires_grad_() for t in (x, y)]
        kl = fasttax.token_kl(*mine, kind=kind, tp_group=dist.group.WORLD)
        close(kl, truth.detach())
        for got, true in zip(torch.autograd.grad(kl.sum(), mine), expected, strict=True):
            torch.testing.assert_close(got.cpu().double(), true[:, part], rtol=1e-3, atol=1e-6)


def work(rank: int, folder: Path) -> None:
    data_parallel(rank)
    sharded(rank)
    vocabulary(rank)


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    on_ranks(work, tmp_path, RANKS, "nccl" if ON_GPUS else "gloo")
