"""Which rows of an evaluation's batches are its data's own, where Accelerate fills ranks up."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fasttax.integrations._eval_rows import own_tokens


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> int:
        return i


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(5))


@pytest.fixture(autouse=True)
def _state() -> None:
    PartialState()


def batches(size: int, ranks: int, rank: int, batch: int, **options: Any) -> Any:
    """(accelerator, ids) of a rank's batches."""
    loader: Any = prepare_data_loader(
        DataLoader(Numbers(size), batch_size=batch),
        num_processes=ranks,
        process_index=rank,
        put_on_device=False,
        **options,
    )
    accelerator = SimpleNamespace(gradient_state=loader.gradient_state)
    for ids in loader:
        yield accelerator, ids


def kept(mask: Tensor | None, ids: Tensor) -> list[int]:
    assert mask is not None
    return sorted(ids[mask.any(1)].tolist())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_once(ranks: int, split: bool) -> None:
    twice = 0
    for size, batch in itertools.product(range(1, 14), (1, 2, 3)):
        whole = batch * ranks if split else batch
        found: list[int] = []
        for rank in range(ranks):
            for accelerator, ids in batches(size, ranks, rank, whole, split_batches=split):
                mask = torch.ones(len(ids), 4, dtype=torch.bool)
                found += kept(own_tokens(accelerator, mask, {}), ids)
                twice += len(ids)
        assert sorted(found) == list(range(size)), (size, batch)
        twice -= size
    assert (twice > 0) == (ranks > 1)  # rows that had to be left out


def test_batches_that_are_not_filled_up() -> None:
    for options in ({"even_batches": False}, {}):
        found: list[int] = []
        for rank in range(2):
            for accelerator, ids in batches(4 if not options else 5, 2, rank, 2, **options):
                found += kept(own_tokens(accelerator, torch.ones(len(ids), 1).bool(), {}), ids)
        assert sorted(found) == list(range(4 if not options else 5))


def last(size: int, rank: int, batch: int) -> Any:
    for accelerator, ids in batches(size, 2, rank, batch):
        if accelerator.gradient_state.end_of_dataloader:
            return own_of(accelerator, ids)
    raise AssertionError("no last batch")


def own_of(accelerator: Any, ids: Tensor) -> Any:
    """What own_tokens makes of a batch in each of the layouts that trainers give it."""
    stacked = torch.ones(2 * len(ids), 3, dtype=torch.bool)
    flat = torch.ones(1, 3 * len(ids), dtype=torch.bool)
    positions = torch.arange(3).repeat(len(ids)).unsqueeze(0)
    packed = torch.arange(3 * len(ids)).unsqueeze(0)
    return (
        own_tokens(accelerator, stacked, {}),
        own_tokens(accelerator, flat, {"position_ids": positions}),
        own_tokens(accelerator, flat, {"position_ids": packed}),
        own_tokens(accelerator, flat, {}),
    )


def test_sequences_stacked_or_end_to_end() -> None:
    """Of 6 rows on 2 ranks the second's last batch of 2 is the first again, of 7 its second row."""
    stacked, flat, packed, unknown = last(7, 1, 2)
    assert stacked.any(1).tolist() == [True, False, True, False]
    assert flat[0].tolist() == [True] * 3 + [False] * 3
    assert packed is unknown is None
    assert not any(found.any() for found in last(6, 1, 2))
    assert all(found.all() for found in last(6, 0, 2))


def test_a_stream_that_each_rank_reads() -> None:
    """Its length is not known, so neither is which of the last rows are the first again."""
    loader: Any = prepare_data_loader(
        DataLoader(Stream(), batch_size=2),
        num_processes=2,
        process_index=1,
        put_on_device=False,
        dispatch_batches=False,
    )
    accelerator = SimpleNamespace(gradient_state=loader.gradient_state)
    masks = [own_tokens(accelerator, torch.ones(2, 1), {}) for _ in loader]
    assert masks[-1] is None
    assert all(mask is not None for mask in masks[:-1])
