"""What a batch says about examples and labels.

Which token belongs to which example, and which predictions count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks

IGNORED = -100  # the label that transformers and torch.nn.CrossEntropyLoss leave out
# transformers' names for what has no ids
OTHER_INPUTS = (
    "pixel_values",
    "input_values",
    "input_features",
    "inputs_embeds",
)


@dataclass
class Batch:
    """A batch ready for a model: its arguments, the next-token labels, the predictions that count,
    the examples' boundaries.
    """

    inputs: dict[str, Any]
    # (B, T) int64 next tokens; (B,) classes for a classifier; IGNORED where there is none
    targets: Tensor
    counted: Tensor  # bool, as targets: predictions in the loss
    bounds: Tensor  # (examples + 1,) int64 over the B * T tokens in order
    shape: tuple[int, int]  # (B, T)
    labelled: bool = False  # the labels came with the batch

    def settled(self, logits: Tensor) -> Batch:
        """With one label an example where the model turns out to be a classifier and no labels were
        given.
        """
        if logits.dim() == 2 and self.targets.dim() == 2 and not self.labelled:
            B = self.shape[0]
            targets = torch.zeros(B, dtype=torch.int64, device=logits.device)
            bounds = torch.arange(B + 1, device=self.bounds.device) * self.shape[1]
            return Batch(
                self.inputs, targets, torch.ones_like(targets, dtype=torch.bool), bounds, self.shape
            )
        return self

    @property
    def examples(self) -> int:
        return self.bounds.numel() - 1

    @property
    def packed(self) -> bool:
        return self.examples != self.shape[0]


def _starts(batch: Mapping[str, Any], ids: Tensor, op: str, real: Tensor) -> Tensor:
    """(B, T) bool: tokens that begin a document of a packed row. A row's first token always does."""
    B, T = ids.shape
    starts = torch.zeros(B, T, dtype=torch.bool, device=ids.device)
    starts[:, 0] = True
    cu = batch.get("cu_seqlens")
    if cu is not None:
        checks.tensor(op, "batch['cu_seqlens']", cu, (torch.int32, torch.int64))
        flat = cu.to(ids.device).long()
        if (
            B != 1
            or flat.numel() < 2
            or int(flat[0]) != 0
            or int(flat[-1]) != T
            or bool((flat[1:] <= flat[:-1]).any())
        ):
            raise checks.fail(
                op,
                "batch['cu_seqlens']",
                f"boundaries that rise from 0 to {T} over one packed row",
                flat.tolist()[:8],
            )
        starts[0, flat[:-1]] = True
        return starts
    positions = batch.get("position_ids")
    if positions is not None and positions.shape == ids.shape:
        restart = (
            (positions.to(ids.device)[:, 1:] <= positions.to(ids.device)[:, :-1])
            & real[:, 1:]
            & real[:, :-1]
        )
        starts[:, 1:] |= restart
    return starts


def read(
    op: str,
    batch: Any,
    device: torch.device,
    vocab: int | None = None,
    *,
    positions: bool = False,
    shift: bool = True,
) -> Batch:
    """Checks a batch (input_ids alone, or a mapping) and lays out its examples and labels.

    positions: the model takes position_ids, which then tell it where packed documents begin. shift:
        labels are next tokens.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise checks.fail(
            op,
            "batch",
            "a dict or BatchEncoding with input_ids, or a tensor of ids",
            batch,
            error=TypeError,
        )
    inputs = {k: (v.to(device) if isinstance(v, Tensor) else v) for k, v in batch.items()}
    labels = inputs.pop("labels", None)
    if "input_ids" not in batch:
        main = next((k for k in OTHER_INPUTS if isinstance(inputs.get(k), Tensor)), None)
        if main is None:
            raise checks.fail(op, "batch", "a key 'input_ids'", f"keys {sorted(map(str, batch))}")
        return _classifier(op, inputs, labels, inputs[main].shape[0], 1)
    ids = checks.tensor(op, "batch['input_ids']", inputs["input_ids"], (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 1:
        raise checks.fail(
            op, "batch['input_ids']", "shape (examples, tokens), at least (1, 1)", ids
        )
    if vocab is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise checks.fail(
            op,
            "batch['input_ids']",
            f"ids in [0, {vocab})",
            f"{int(ids.min())} to {int(ids.max())}",
            "is this the model's own tokenizer?",
        )
    B, T = ids.shape
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None and mask.dim() == 2:
        if mask.shape != ids.shape:
            raise checks.fail(
                op, "batch['attention_mask']", f"shape {tuple(ids.shape)} as input_ids", mask
            )
        real = mask != 0
    if labels is not None and (
        labels.dim() == 1 or labels.shape == (B, 1) != ids.shape
    ):  # a classifier: one label a row
        return _classifier(op, inputs, labels.flatten(), B, T)
    if labels is not None and labels.shape != ids.shape:
        raise checks.fail(op, "batch['labels']", f"shape {tuple(ids.shape)} as input_ids", labels)
    starts = _starts(inputs, ids, op, real)
    packed = bool(starts[:, 1:].any())
    inputs.pop("cu_seqlens", None)
    if packed and positions:
        if "position_ids" not in inputs:
            column = torch.arange(T, device=ids.device).expand(B, T)
            inputs["position_ids"] = column - torch.where(starts, column, 0).cummax(-1).values
        if mask is not None and bool(
            real.all()
        ):  # says nothing, and would keep transformers from telling the documents apart
            del inputs["attention_mask"]
    bounds = torch.cat((starts.flatten().nonzero().flatten(), torch.tensor([B * T], device=device)))
    labelled = labels is not None
    if labels is None:
        labels = ids.masked_fill(~real, IGNORED)
    elif bool(((labels != IGNORED) & ((labels < 0) | (labels >= (vocab or 1 << 62)))).any()):
        raise checks.fail(
            op,
            "batch['labels']",
            f"labels in [0, {vocab}) or {IGNORED}",
            f"{int(labels.min())} to {int(labels.max())}",
        )
    if not shift:
        labels = labels.long()
        return Batch(inputs, labels, (labels != IGNORED) & real, bounds, (B, T), labelled)
    targets = torch.full_like(ids, IGNORED, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    counted = torch.zeros_like(starts)
    # the next token must exist, be real, and belong to the same document
    counted[:, :-1] = real[:, :-1] & real[:, 1:] & ~starts[:, 1:] & (targets[:, :-1] != IGNORED)
    return Batch(inputs, targets, counted, bounds, (B, T), labelled)


def _classifier(op: str, inputs: dict[str, Any], labels: Any, B: int, T: int) -> Batch:
    device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
    bounds = torch.arange(B + 1, device=device) * T
    if labels is None:
        targets = torch.full((B,), IGNORED, dtype=torch.int64, device=device)
        return Batch(inputs, targets, torch.ones_like(targets, dtype=torch.bool), bounds, (B, T))
    checks.tensor(op, "batch['labels']", labels, (torch.int64, torch.int32))
    if labels.shape != (B,):
        raise checks.fail(
            op,
            "batch['labels']",
            f"shape ({B},) for a classifier"
            + (f" or ({B}, {T}) for a language model" if T > 1 else ""),
            labels,
        )
    return Batch(inputs, labels.long(), labels != IGNORED, bounds, (B, T), True)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Rows start..stop of a batch: tensors with the batch's leading size are cut, the rest is kept."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    size = next(batch[k] for k in ("input_ids", *OTHER_INPUTS) if k in batch).shape[0]
    return {
        k: (v[start:stop] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v)
        for k, v in batch.items()
    }


def example(batch: Any, ready: Batch, n: int) -> Any:
    """Example n of a batch as a batch of its own: a row, or a document cut out of a packed row."""
    if not ready.packed:
        return rows(batch, n, n + 1)
    B, T = ready.shape
    row, begin = divmod(int(ready.bounds[n]), T)
    end = begin + int(ready.bounds[n + 1] - ready.bounds[n])
    whole = {
        **(batch if isinstance(batch, Mapping) else {"input_ids": batch}),
        **{k: v for k, v in ready.inputs.items() if k == "position_ids"},
    }
    cut = {}
    for k, v in whole.items():
        if isinstance(v, Tensor) and v.dim() >= 2 and tuple(v.shape[:2]) == (B, T):
            v = v[row : row + 1, begin:end]
        if k != "cu_seqlens" and not (k == "attention_mask" and k not in ready.inputs):
            cut[k] = v
    return cut


def snippet(batch: Any, tokens: int) -> Any:
    """One or two rows, cut to `tokens` of their real tokens in all.

    a small batch of the same kind, for a check of the method.
    """
    whole = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = whole.get("input_ids")
    positions, labels = whole.get("position_ids"), whole.get("labels")
    if not isinstance(ids, Tensor) or (isinstance(labels, Tensor) and labels.dim() == 1):
        return rows(whole, 0, 2)
    document = isinstance(positions, Tensor)  # one row, so that one document can be cut out of it
    part = dict(rows(whole, 0, 1 if document else 2))
    cu = part.pop("cu_seqlens", None)
    part.pop("labels", None)
    width, each = ids.shape[1], max(2, tokens // part["input_ids"].shape[0])
    mask = part.get("attention_mask")
    first = (
        int((mask != 0).int().argmax(-1).max())
        if isinstance(mask, Tensor) and mask.dim() == 2
        else 0
    )
    stop = min(width if cu is None else int(cu[1]), first + each)
    if isinstance(positions, Tensor):
        restart = (positions[0, first + 1 : stop] <= positions[0, first : stop - 1]).nonzero()
        stop = first + 1 + int(restart[0]) if restart.numel() else stop
    return {
        k: (
            v[:, first:stop]
            if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[1] == width
            else v
        )
        for k, v in part.items()
    }


def neighbours(ready: Batch, width: int) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """The end of a document with the beginning of the next one, that beginning alone, and where it
    starts; None if there is none.
    """
    B, T = ready.shape
    for begin, end in pairwise(ready.bounds.tolist()):
        row, at = divmod(begin, T)
        if at and end - begin > 1:
            before, stop = max(0, at - width), min(at + width, end - row * T)

            def cut(a: int, b: int, row: int = row) -> dict[str, Any]:
                return {
                    k: (
                        v[row : row + 1, a:b]
                        if isinstance(v, Tensor) and v.dim() >= 2 and tuple(v.shape[:2]) == (B, T)
                        else v
                    )
                    for k, v in ready.inputs.items()
                }

            return cut(before, stop), cut(at, stop), at - before
    return None
