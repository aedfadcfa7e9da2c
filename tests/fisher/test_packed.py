"""Batches as the padding-free collators of TRL and transformers make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fasttax import DiagonalFisher
from tests.tools.models import assert_exact, causal_lm, ids, loop, rows_of


@pytest.mark.parametrize("fallback", [None, "loop"])
def test_a_padding_free_collators_batch(fallback: str | None) -> None:
    """TRL's, with what fills a row, at position 0 each, and flash attention's boundaries.

    A kernel follows those beyond the end of a part of the row.
    """
    model, rows = causal_lm("llama"), ids(3, 6)
    documents = [rows[0], rows[1, :4], rows[2, :5]]
    places = torch.cat([*(torch.arange(len(d)) for d in documents), torch.zeros(3, dtype=int)])
    starts = (places == 0).nonzero().flatten().tolist()
    boundaries = torch.tensor([*starts, 18], dtype=torch.int32)
    row = {"input_ids": torch.cat([*documents, torch.zeros(3, dtype=int)]), "position_ids": places}
    batch = {name: values[None] for name, values in row.items()}
    batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    lengths: list[tuple[int, int]] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "cu_seq_lens_q" in kwargs:
            lengths.append((kwargs["input_ids"].shape[1], int(kwargs["cu_seq_lens_q"][-1])))

    model.register_forward_pre_hook(see, with_kwargs=True)
    estimator = DiagonalFisher(model, labels="true", fallback=fallback)
    estimator.update(batch)
    assert estimator.examples == 3
    assert lengths == ([] if fallback else [(18, 18)])
    assert_exact(
        estimator.finalize("sum"), loop(model, [r for d in documents for r in rows_of(d[None])])
    )
