"""Work on several processes of this machine, over gloo, or over NCCL on a GPU each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], None]


def _rank(rank: int, work: Work, world_size: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    work(rank, folder)
    # all ranks are done, and `work` has dropped its DistributedDataParallel: one that outlives the
    # group aborts the process
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(work: Work, folder: Path, world_size: int = 2, backend: str = "gloo") -> None:
    """Runs `work(rank, folder)` on every rank of a new group; a rank's exception is raised here.

    Args:
        work: a function of a module, for every process imports it.
        folder: where the ranks meet.
        world_size: the number of ranks.
        backend: torch.distributed's; under "nccl" a rank's current device is the GPU of its number.
    """
    mp.spawn(_rank, args=(work, world_size, folder, backend), nprocs=world_size)
