"""What a batch says about examples and labels: which token belongs to which example, and which predictions count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttax import _checks

IGNORED = -100  # the label that transformers and torch.nn.CrossEntropyLoss leave out


@dataclass
class Batch:
    """A batch ready for a model: its arguments, the next-token labels, the predictions that count, the examples' boundaries."""

    inputs: dict[str, Any]
    targets: Tensor  # (B, T) int64 next tokens; (B,) classes for a classifier; IGNORED where there is none
    counted: Tensor  # bool, as targets: predictions in the loss
    bounds: Tensor  # (examples + 1,) int64 over the B * T tokens in order
    shape: tuple[int, ...]  # (B, T)

    @property
    def examples(self) -> int:
        return self.bounds.numel() - 1

    @property
    def packed(self) -> bool:
        return self.examples != self.shape[0]


def _starts(batch: Mapping[str, Any], ids: Tensor, op: str) -> Tensor:
    """(B, T) bool: tokens that begin a document of a packed row. A row's first token always does."""
    B, T = ids.shape
    starts = torch.zeros(B, T, dtype=torch.bool, device=ids.device)
    starts[:, 0] = True
    cu = batch.get("cu_seqlens")
    if cu is not None:
        _checks.tensor(op, "batch['cu_seqlens']", cu, (torch.int32, torch.int64))
        flat = cu.to(ids.device).long()
        if B != 1 or flat.numel() < 2 or int(flat[0]) != 0 or int(flat[-1]) != T or bool((flat[1:] <= flat[:-1]).any()):
            raise _checks.fail(op, "batch['cu_seqlens']", f"boundaries that rise from 0 to {T} over one packed row", flat.tolist()[:8])
        starts[0, flat[:-1]] = True
        return starts
    positions = batch.get("position_ids")
    if positions is not None and positions.shape == ids.shape:
        mask = batch.get("attention_mask")
        real = torch.ones_like(starts) if mask is None else mask.to(ids.device) != 0
        restart = (positions.to(ids.device)[:, 1:] <= positions.to(ids.device)[:, :-1]) & real[:, 1:] & real[:, :-1]
        starts[:, 1:] |= restart
    return starts


def read(op: str, batch: Any, device: torch.device, vocab: int | None = None) -> Batch:
    """Checks a batch (input_ids alone, or a mapping) and lays out its examples and labels."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise _checks.fail(op, "batch", "a dict or BatchEncoding with input_ids, or a tensor of ids", batch, error=TypeError)
    if "input_ids" not in batch:
        raise _checks.fail(op, "batch", "a key 'input_ids'", f"keys {sorted(map(str, batch))}")
    inputs = {k: (v.to(device) if isinstance(v, Tensor) else v) for k, v in batch.items()}
    ids = _checks.tensor(op, "batch['input_ids']", inputs["input_ids"], (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 1:
        raise _checks.fail(op, "batch['input_ids']", "shape (examples, tokens), at least (1, 1)", ids)
    if vocab is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise _checks.fail(op, "batch['input_ids']", f"ids in [0, {vocab})", f"{int(ids.min())} to {int(ids.max())}", "is this the model's own tokenizer?")
    B, T = ids.shape
    labels = inputs.pop("labels", None)
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        if mask.shape != ids.shape:
            raise _checks.fail(op, "batch['attention_mask']", f"shape {tuple(ids.shape)} as input_ids", mask)
        real = mask != 0
    if labels is not None and labels.dim() == 1:  # a classifier: one label a row
        if labels.shape[0] != B:
            raise _checks.fail(op, "batch['labels']", f"shape ({B},) for a classifier or ({B}, {T}) for a language model", labels)
        return Batch(inputs, labels.long(), labels != IGNORED, torch.arange(B + 1, device=device) * T, (B, T))
    if labels is not None and labels.shape != ids.shape:
        raise _checks.fail(op, "batch['labels']", f"shape {tuple(ids.shape)} as input_ids", labels)
    starts = _starts(inputs, ids, op)
    inputs.pop("cu_seqlens", None)
    bounds = torch.cat((starts.flatten().nonzero().flatten(), torch.tensor([B * T], device=device)))
    if labels is None:
        labels = ids.masked_fill(~real, IGNORED)
    elif bool(((labels != IGNORED) & ((labels < 0) | (labels >= (vocab or 1 << 62)))).any()):
        raise _checks.fail(op, "batch['labels']", f"labels in [0, {vocab}) or {IGNORED}", f"{int(labels.min())} to {int(labels.max())}")
    targets = torch.full_like(ids, IGNORED, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    counted = torch.zeros_like(starts)
    # the next token must exist, be real, and belong to the same document
    counted[:, :-1] = real[:, :-1] & real[:, 1:] & ~starts[:, 1:] & (targets[:, :-1] != IGNORED)
    return Batch(inputs, targets, counted, bounds, (B, T))


def rows(batch: Any, start: int, stop: int) -> Any:
    """Rows start..stop of a batch: tensors with the batch's leading size are cut, the rest is kept."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    size = batch["input_ids"].shape[0]
    return {k: (v[start:stop] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v) for k, v in batch.items()}


def snippet(batch: Any, tokens: int) -> Any:
    """The first row, cut to its first `tokens` real tokens: a small batch of the same kind, for a check of the method."""
    row = dict(rows(batch if not isinstance(batch, Tensor) else {"input_ids": batch}, 0, 1))
    row.pop("cu_seqlens", None)
    width = row["input_ids"].shape[1]
    mask = row.get("attention_mask")
    first = int((mask[0] != 0).int().argmax()) if isinstance(mask, Tensor) else 0
    if row.get("labels") is not None and row["labels"].dim() == 1:
        return row
    row.pop("labels", None)
    stop = min(width, first + tokens)
    positions = row.get("position_ids")
    if isinstance(positions, Tensor):  # one document
        restart = (positions[0, first + 1 : stop] <= positions[0, first : stop - 1]).nonzero()
        stop = first + 1 + int(restart[0]) if restart.numel() else stop
    return {k: (v[:, first:stop] if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[1] == width else v) for k, v in row.items()}
