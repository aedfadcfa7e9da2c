"""Work on several gloo processes of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], None]


def _rank(rank: int, work: Work, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    work(rank, folder)
    # all ranks are done, and `work` has dropped its DistributedDataParallel: one that outlives the
    # group aborts the process
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(work: Work, folder: Path, world_size: int = 2) -> None:
    """Runs `work(rank, folder)` on every rank of a new group; a rank's exception is raised here.

    Args:
        work: a function of a module, for every process imports it.
        folder: where the ranks meet.
        world_size: the number of ranks.
    """
    mp.spawn(_rank, args=(work, world_size, folder), nprocs=world_size)
