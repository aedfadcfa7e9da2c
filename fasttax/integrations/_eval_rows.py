"""Which rows of an evaluation's batch are its data's own.

Accelerate gives every rank as many batches of the same size: it fills the last ones up with the
data's first rows, which a mean over the evaluation must count once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch import Tensor


def own_tokens(accelerator: Any, mask: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """The tokens of a mask that are of the data's own rows; None where that can't be told.

    Args:
        accelerator: whose data loader gave the batch.
        mask: (B, L), of the tokens that count; B is a multiple of the batch's examples where a
            trainer stacks several sequences of each (DPO: all chosen, then all rejected), or 1
            where it lays them end to end.
        given: the forward's arguments by name.
    """
    found = _examples(accelerator)
    if found is None:
        return None
    own, examples = found
    if own == examples:
        return mask
    rows = torch.arange(mask.shape[0], device=mask.device)
    if own == 0 or mask.shape[0] % examples == 0:
        return mask & (rows % examples < own).unsqueeze(1)
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == mask.shape == (1, mask.shape[1]):
        begun = (positions == 0).cumsum(1)
        if int(begun[0, -1]) == examples:
            return mask & (begun <= own)
    return None


def _examples(accelerator: Any) -> tuple[int, int] | None:
    """(the data's own, all) examples of the batch at hand; (0, 0) stands for all of them."""
    loader = accelerator.gradient_state.active_dataloader
    if loader is None or not loader.end_of_dataloader:
        return 0, 0
    if isinstance(loader, DataLoaderDispatcher):
        ranks, rank, left = loader.state.num_processes, loader.state.process_index, loader.remainder
        return _share(left, -(-left // ranks), rank)
    if isinstance(loader.dataset, IterableDatasetShard):
        padded = loader.dataset.num_processes > 1 and not loader.dataset.drop_last
        return None if padded else (0, 0)
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1:
        return 0, 0
    return _of_sampler(shard) if shard.even_batches and not shard.drop_last else (0, 0)


def _of_sampler(shard: Any) -> tuple[int, int] | None:
    """Of a rank's last batch, as BatchSamplerShard deals and fills them."""
    sampler: Any = getattr(shard.batch_sampler, "sampler", None)  # GRPO repeats rows
    if shard.batch_size is None or not hasattr(sampler, "__len__"):
        return None
    size = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
    left = len(sampler) % (size * shard.num_processes)
    return _share(left, size, shard.process_index) if left else (0, 0)


def _share(left: int, size: int, rank: int) -> tuple[int, int]:
    """A rank's own of `size` examples, where `left` lie in front of all ranks' last batches."""
    return min(max(left - rank * size, 0), size), size
