"""Parts of a batch: rows, documents, and a few tokens for a check of the method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from fasttax.fisher.batches import Batch, main_input, named, of_examples
from fasttax.fisher.task import Task

_OF_IMAGES = ("pixel", "image", "video", "patch")  # how arguments that hold images begin
# where documents begin in all of a packed row, which a kernel would follow beyond a part's end;
# of a part transformers' flash attention takes them from position_ids
_OF_THE_WHOLE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def rows_of(batch: Any) -> int | None:
    """How many rows a batch has; None where no tensor of it says."""
    given = named(batch)
    main = main_input(given) if isinstance(given, Mapping) else None
    return None if main is None else given[main].shape[0]


def take(batch: Any, start: int, stop: int) -> Any:
    """The examples start..stop of an unpacked batch.

    Tensors with the batch's leading size are cut, and those of images with a multiple of it, of
    which each row has as many (images, patches); the rest is kept.
    """
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if not isinstance(batch, Mapping):
        return tuple(t[start:stop] for t in batch)
    size = rows_of(batch)
    part = dict(batch)
    for k, v in part.items():
        if not isinstance(v, Tensor) or not v.dim() or not size or v.shape[0] % size:
            continue
        each = v.shape[0] // size
        if each == 1 or (each and k.startswith(_OF_IMAGES)):
            part[k] = v[start * each : stop * each]
    return part


def _unbounded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Without the boundaries that flash attention is given of the whole batch."""
    return {k: v for k, v in inputs.items() if k not in _OF_THE_WHOLE}


def _span(
    inputs: Mapping[str, Any], shape: tuple[int, int], row: int, begin: int, end: int
) -> dict[str, Any]:
    """Tokens begin..end of one row: of tensors (B, T, ...), the rest is kept."""
    part = _unbounded(inputs)
    for k, v in part.items():
        if isinstance(v, Tensor) and tuple(v.shape[:2]) == shape:
            part[k] = v[row : row + 1, begin:end]
    return part


def example(batch: Any, ready: Batch, n: int) -> Any:
    """Example n of a batch as a batch of its own: a row, or a document cut out of a packed row."""
    if not ready.packed:
        return take(batch, n, n + 1)
    row, begin = divmod(int(ready.bounds[n]), ready.shape[1])
    end = begin + int(ready.bounds[n + 1] - ready.bounds[n])
    whole = dict(named(batch))
    if "position_ids" in ready.inputs:
        whole["position_ids"] = ready.inputs["position_ids"]
    if "attention_mask" not in ready.inputs:
        whole.pop("attention_mask", None)
    whole.pop("cu_seqlens", None)
    return _span(whole, ready.shape, row, begin, end)


def snippet(batch: Any, tokens: int, task: Task) -> Any:
    """A small batch of the same kind, for a check of the method.

    One or two rows, cut to `tokens` of their real tokens in all.
    """
    whole = named(batch, task.first)
    ids, labels, positions = (whole.get(k) for k in ("input_ids", "labels", "position_ids"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or task.encoder_decoder:
        return take(whole, 0, 2)
    if isinstance(labels, Tensor) and of_examples(labels, ids, task):
        return take(whole, 0, 2)
    rows = 2
    if isinstance(positions, Tensor):
        rows = 1  # so that one document can be cut out of it
    part = _unbounded(take(whole, 0, rows))
    cu = part.pop("cu_seqlens", None)
    width, first = ids.shape[1], 0
    mask = part.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        first = int((mask != 0).int().argmax(-1).max())  # left padding
    stop = min(width, first + max(2, tokens // part["input_ids"].shape[0]))
    if cu is not None:
        stop = min(stop, int(cu[1]))
    if isinstance(positions, Tensor):
        restart = (positions[0, first + 1 : stop] <= positions[0, first : stop - 1]).nonzero()
        stop = min([stop, *(first + 1 + restart.flatten()).tolist()])
    for k, v in part.items():
        if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[1] == width:
            part[k] = v[:, first:stop]
    return part


class Meeting(NamedTuple):
    """The end of a document with the beginning of the next one, and that beginning alone."""

    both: dict[str, Any]
    alone: dict[str, Any]
    start: int  # the beginning's first token in `both`


def neighbours(ready: Batch, width: int) -> Meeting | None:
    """The first two documents of one row that meet, `width` tokens of each; None if none do."""
    T = ready.shape[1]
    for begin, end in pairwise(ready.bounds.tolist()):
        row, at = divmod(begin, T)
        if at and end - begin > 1:
            before, stop = max(0, at - width), min(at + width, end - row * T)
            both, alone = (
                _span(ready.inputs, ready.shape, row, first, stop) for first in (before, at)
            )
            return Meeting(both, alone, at - before)
    return None
