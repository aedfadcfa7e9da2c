"""What a batch says about examples and labels.

Which token belongs to which example, and which predictions count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fasttax._base import checks, waits
from fasttax.fisher.task import Task

IGNORED = -100  # the label that transformers and torch.nn.CrossEntropyLoss leave out
# of tokens that are to count, as TRL and chat templates name them; collators make labels of them
_MASKS = ("completion_mask", "assistant_masks")
# transformers' names for what has no ids
OTHER_INPUTS = ("pixel_values", "input_values", "input_features", "inputs_embeds")


@dataclass
class Batch:
    """A batch ready for a model.

    Attributes:
        inputs: the model's arguments.
        targets: (B, T) int64 next tokens; (B,) classes for a classifier; IGNORED where there is
            none. (B, C) floats of a likelihood that has a label for each output.
        counted: bool, (B, T) or (B,): predictions in the loss.
        bounds: (examples + 1,) int64 on the CPU over the B * T tokens in order.
        shape: (B, T).
        labelled: the labels came with the batch.
        likelihood: of the labels, as far as it is known; `settled` where the logits are.
        classes: float labels of several columns are classes that may hold together.
        ranges: of ids and labels that lie on a GPU, which nobody has looked at yet.
    """

    inputs: dict[str, Any]
    targets: Tensor
    counted: Tensor
    bounds: Tensor
    shape: tuple[int, int]
    labelled: bool = False
    likelihood: str | None = None
    classes: bool = False
    ranges: waits.Ranges = field(default_factory=waits.Ranges)

    def on(self, device: torch.device) -> Batch:
        """With all on `device` but the boundaries, which stay on the CPU."""
        inputs = {
            k: waits.over(v, device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()
        }
        return replace(
            self,
            inputs=inputs,
            targets=waits.over(self.targets, device),
            counted=waits.over(self.counted, device),
            bounds=self.bounds.cpu(),
        )

    def settled(self, logits: Tensor) -> Batch:
        """With what the logits tell: one label an example of a classifier, and the likelihood.

        Raises:
            ValueError: the likelihood cannot be known, or does not fit the outputs.
        """
        likelihood = self._likelihood(logits)
        if logits.dim() != 2 or self.targets.dim() != 2 or self.labelled:
            return replace(self, likelihood=likelihood)
        B, T = self.shape
        targets = torch.zeros(B, dtype=torch.int64, device=logits.device)
        bounds = torch.arange(B + 1, device="cpu") * T
        everything = torch.ones_like(targets, dtype=torch.bool)
        return replace(
            self, targets=targets, counted=everything, bounds=bounds, likelihood=likelihood
        )

    def _likelihood(self, logits: Tensor) -> str:
        floats = self.labelled and self.targets.is_floating_point()
        columns = logits.shape[-1]
        if self.likelihood == "softmax" and (columns == 1 or floats):
            got = "float labels" if floats else "one output, which a softmax makes 1 always"
            raise checks.fail(
                "DiagonalFisher", "likelihood", "'bernoulli' or 'gaussian'", f"'softmax' for {got}"
            )
        if self.likelihood is not None:
            return self.likelihood
        if floats and self.classes and columns > 1 and self.targets.shape == logits.shape:
            return "bernoulli"
        if floats or columns == 1:
            raise checks.fail(
                "DiagonalFisher",
                "likelihood",
                "'bernoulli' or 'gaussian' for a model with one output, or with float labels",
                "'auto', which the model's config says nothing of",
                "pass likelihood='gaussian' for a squared error, 'bernoulli' for a sigmoid's",
            )
        return "softmax"

    @property
    def examples(self) -> int:
        """How many there are: B rows, or the documents in them."""
        return self.bounds.numel() - 1

    @property
    def packed(self) -> bool:
        """Whether a row holds several examples."""
        return self.examples != self.shape[0]


# --- reading --------------------------------------------------------------------------------------


def read(
    op: str,
    batch: Any,
    device: torch.device,
    task: Task,
    vocab: int | None = None,
    *,
    positions: bool = False,
) -> Batch:
    """Checks a batch and lays out its examples and labels.

    Args:
        op: for errors.
        batch: as `named` takes it.
        device: where its tensors go.
        task: what the model says of its labels.
        vocab: how many ids the model knows.
        positions: the model takes position_ids, which then tell it where packed documents begin.

    It is looked at where it lies and goes to the device then: of one on the CPU nothing waits for
    the device. On a GPU ids and labels are looked at later (Batch.ranges), and packed rows cost a
    copy of their boundaries to the CPU.

    Raises:
        ValueError, TypeError: the batch does not fit.
    """
    ranges = waits.Ranges()
    ready = _read(op, batch, device, task, vocab, ranges, positions=positions)
    return replace(ready.on(device), ranges=ranges)


def _read(
    op: str,
    batch: Any,
    device: torch.device,
    task: Task,
    vocab: int | None,
    ranges: waits.Ranges,
    *,
    positions: bool,
) -> Batch:
    given = named(batch, task.first)
    if not isinstance(given, Mapping):
        expected = "a tokenizer's dict with input_ids, a tensor, or (inputs, labels)"
        raise checks.fail(op, "batch", expected, checks.describe(batch), error=TypeError)
    found = main_input(given)
    home = device if found is None else given[found].device
    inputs = {k: (v.to(home) if isinstance(v, Tensor) else v) for k, v in given.items()}
    labels = inputs.pop("labels", None)
    ignored = next((k for k in _MASKS if isinstance(inputs.get(k), Tensor)), None)
    if labels is None and ignored is not None:
        way_out = f"pass labels=input_ids.masked_fill({ignored} == 0, -100)"
        raise checks.fail(op, "batch", "labels", f"{ignored}, which no model reads", way_out)
    main = main_input(inputs)
    if main is None or (task.arguments and main not in task.arguments):
        expected = f"a key {task.first or 'input_ids'!r}, or any tensor that the model takes"
        raise checks.fail(op, "batch", expected, *_no_tensors(given))
    of_decoder = isinstance(labels, Tensor) and labels.dim() == 2
    if task.encoder_decoder and (of_decoder or labels is None):
        if _holds_ids(main, inputs[main]):
            inputs[main] = _ids(op, main, inputs[main], vocab, ranges)
        return _sequences(op, inputs, labels, inputs[main].shape[0])
    if not _holds_ids(main, inputs[main]):
        return _classifier(op, inputs, labels, inputs[main].shape[0], 1, task)
    ids = inputs[main] = _ids(op, main, inputs[main], vocab, ranges)
    B, T = ids.shape
    real = _real(op, inputs, ids)
    if labels is not None and of_examples(labels, ids, task):
        return _classifier(op, inputs, labels, B, T, task)
    packs = inputs.get("cu_seqlens") is not None or inputs.get("position_ids") is not None
    starts = _starts(op, inputs, ids, real)
    inputs.pop("cu_seqlens", None)
    bounds = torch.arange(B + 1, device="cpu") * T
    if packs:
        begins = starts.flatten().cpu().nonzero().flatten()
        if positions and len(begins) > B:
            _tell_documents(inputs, starts, real)
        bounds = torch.cat((begins, bounds[-1:]))
    targets = _targets(op, labels, ids, real, vocab, ranges)
    counted = real & (targets != IGNORED)
    if task.shifts(labels is not None):
        # the next token must exist, be real, and belong to the same document
        next_counts = counted[:, 1:] & ~starts[:, 1:] & real[:, :-1]
        nothing = torch.full((B, 1), IGNORED, device=home)
        targets = torch.cat((targets[:, 1:], nothing), 1)
        counted = torch.cat((next_counts, torch.zeros_like(counted[:, :1])), 1)
    return Batch(inputs, targets, counted, bounds, (B, T), labels is not None, task.likelihood)


def _no_tensors(given: Mapping[str, Any]) -> tuple[str, str]:
    """What came of a batch without a main input, and the way out."""
    lists = [k for k, v in given.items() if hasattr(v, "__len__") and not isinstance(v, Tensor)]
    if not lists:
        return f"keys {sorted(map(str, given))}", ""
    got = f"no tensors but lists of {', '.join(sorted(map(str, lists)))}"
    return got, "tokenizer(..., return_tensors='pt', padding=True) gives tensors"


def named(batch: Any, first: str | None = None) -> Any:
    """A batch as a mapping from the model's argument names, and "labels".

    Args:
        batch: a mapping; a tensor; or (inputs, labels), as data loaders of classifiers give.
        first: the name of the model's first argument, of a model that takes no input_ids.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor):
        return {first or "input_ids": batch[0], "labels": batch[1]}
    if isinstance(batch, Tensor):
        return {first or "input_ids": batch}
    return batch


def main_input(inputs: Mapping[str, Any]) -> str | None:
    """The name of the tensor whose first dimension counts the rows; None without any."""
    known = ("input_ids", *OTHER_INPUTS)
    order = [*known, *(k for k in inputs if k not in known and k != "labels")]
    found = (k for k in order if isinstance(inputs.get(k), Tensor) and inputs[k].dim())
    return next(found, None)


def _holds_ids(name: str, x: Tensor) -> bool:
    """Whether an input is of tokens: by its name, or integers (B, T)."""
    if name == "input_ids":
        return True
    return name not in OTHER_INPUTS and x.dim() == 2 and x.dtype in (torch.int64, torch.int32)


def of_examples(labels: Tensor, ids: Tensor, task: Task) -> bool:
    """Whether labels belong to examples, not to their tokens."""
    B = ids.shape[0]
    if labels.dim() == 1 or labels.shape == (B, 1) != ids.shape:
        return True
    return labels.is_floating_point() or task.likelihood in ("bernoulli", "gaussian")


def _sequences(op: str, inputs: dict[str, Any], labels: Tensor | None, B: int) -> Batch:
    """Of an encoder-decoder: labels are those of the decoder's positions."""
    name = "batch['labels']"
    decoder = inputs.get("decoder_input_ids")
    if labels is None:
        if not isinstance(decoder, Tensor):
            expected = "labels (B, T of the decoder), or decoder_input_ids, for an encoder-decoder"
            raise checks.fail(op, "batch", expected, f"keys {sorted(map(str, inputs))}")
        mask = inputs.get("decoder_attention_mask", torch.ones_like(decoder))
        targets = torch.full_like(decoder, IGNORED, dtype=torch.int64)
        counted = checks.attention_mask(op, "batch['decoder_attention_mask']", mask)
    else:
        checks.tensor(op, name, labels, (torch.int64, torch.int32))
        targets = labels.long()
        counted = targets != IGNORED
        if decoder is None and "decoder_inputs_embeds" not in inputs:
            inputs["labels"] = labels  # the model makes its decoder's input of them
    if targets.shape[0] != B:
        raise checks.fail(op, name, f"{B} rows as input_ids", targets)
    T = targets.shape[1]
    bounds = torch.arange(B + 1, device="cpu") * T
    return Batch(inputs, targets, counted, bounds, (B, T), labels is not None, "softmax")


def _ids(op: str, key: str, x: Any, vocab: int | None, ranges: waits.Ranges) -> Tensor:
    name = f"batch[{key!r}]"
    ids = checks.tensor(op, name, x, (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 1:
        raise checks.fail(op, name, "shape (examples, tokens), at least (1, 1)", ids)
    if vocab is None:
        return ids

    def error(got: str) -> Exception:
        way_out = "is this the model's own tokenizer?"
        return checks.fail(op, name, f"ids in [0, {vocab})", got, way_out)

    if waits.waits(ids):
        ranges.add(name, ids, 0, vocab - 1, error)
        return ids.clamp(0, vocab - 1)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise error(f"{int(ids.min())} to {int(ids.max())}")
    return ids


def _real(op: str, inputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(B, T) bool: tokens that are no padding."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return ~_behind(inputs, ids)
    if mask.shape != ids.shape:
        expected = f"shape {tuple(ids.shape)} as input_ids"
        raise checks.fail(op, "batch['attention_mask']", expected, mask)
    return checks.attention_mask(op, "batch['attention_mask']", mask)


def _behind(inputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(B, T) bool: what collators put behind packed documents to fill a row, at position 0 each."""
    positions = inputs.get("position_ids")
    if positions is None or positions.shape != ids.shape or inputs.get("cu_seqlens") is not None:
        return torch.zeros_like(ids, dtype=torch.bool)
    behind = (positions != 0).flip(1).cummax(1).values.flip(1).logical_not()
    behind[:, 0] = False
    return behind


def _starts(op: str, inputs: Mapping[str, Any], ids: Tensor, real: Tensor) -> Tensor:
    """(B, T) bool: tokens that begin a document; a row's first token always does."""
    starts = torch.zeros_like(real)
    starts[:, 0] = True
    cu, positions = inputs.get("cu_seqlens"), inputs.get("position_ids")
    if cu is not None:
        starts[0, _boundaries(op, cu, *ids.shape)[:-1]] = True
    elif positions is not None and positions.shape == ids.shape:
        restarts = positions[:, 1:] <= positions[:, :-1]
        starts[:, 1:] = restarts & real[:, 1:] & real[:, :-1]
    return starts


def _boundaries(op: str, cu: Any, B: int, T: int) -> Tensor:
    name = "batch['cu_seqlens']"
    flat = checks.tensor(op, name, cu, (torch.int32, torch.int64)).long()
    whole = flat.numel() >= 2 and int(flat[0]) == 0 and int(flat[-1]) == T
    if B != 1 or not whole or bool((flat[1:] <= flat[:-1]).any()):
        expected = f"boundaries that rise from 0 to {T} over one packed row"
        raise checks.fail(op, name, expected, flat.tolist()[:8])
    return flat


def _tell_documents(inputs: dict[str, Any], starts: Tensor, real: Tensor) -> None:
    """Position ids that restart with every document, by which a model keeps them apart."""
    if "position_ids" not in inputs:
        column = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
        inputs["position_ids"] = column - torch.where(starts, column, 0).cummax(-1).values
    if inputs.get("attention_mask") is not None and bool(real.all()):
        # says nothing, and would keep transformers from telling the documents apart
        del inputs["attention_mask"]


def _targets(
    op: str,
    labels: Tensor | None,
    ids: Tensor,
    real: Tensor,
    vocab: int | None,
    ranges: waits.Ranges,
) -> Tensor:
    """(B, T) int64: each token's own label; IGNORED where there is none."""
    if labels is None:
        return ids.long().masked_fill(~real, IGNORED)
    name = "batch['labels']"
    if labels.shape != ids.shape:
        raise checks.fail(op, name, f"shape {tuple(ids.shape)} as input_ids", labels)
    labels, most = labels.long(), (vocab or 1 << 62) - 1

    def error(got: str) -> Exception:
        expected = "labels >= 0" if vocab is None else f"labels in [0, {vocab})"
        return checks.fail(op, name, f"{expected} or {IGNORED}", got)

    given = labels.masked_fill(labels == IGNORED, 0)
    if waits.waits(labels):
        ranges.add(name, given, 0, most, error)
        return torch.where(labels == IGNORED, IGNORED, given.clamp(0, most))
    if given.numel() and bool(((given < 0) | (given > most)).any()):
        raise error(f"{int(labels.min())} to {int(labels.max())}")
    return labels


def _classifier(op: str, inputs: dict[str, Any], labels: Any, B: int, T: int, task: Task) -> Batch:
    device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
    bounds = torch.arange(B + 1, device="cpu") * T
    likelihood, classes = task.likelihood, task.classes
    every = torch.ones(B, dtype=torch.bool, device=device)
    if labels is None:
        targets = torch.full((B,), IGNORED, dtype=torch.int64, device=device)
        return Batch(inputs, targets, every, bounds, (B, T), False, likelihood, classes)
    name, expected = "batch['labels']", f"shape ({B},) for a classifier"
    checks.tensor(op, name, labels, (torch.int64, torch.int32, *checks.FLOATS))
    if labels.is_floating_point() or task.likelihood in ("bernoulli", "gaussian"):
        if labels.dim() not in (1, 2) or labels.shape[0] != B:
            raise checks.fail(op, name, f"{expected}, or ({B}, outputs)", labels)
        targets = labels.reshape(B, -1).double()
        if not bool(targets.isfinite().all()):
            raise checks.fail(op, name, "finite labels", "NaN or infinity")
        return Batch(inputs, targets, every, bounds, (B, T), True, likelihood, classes)
    labels = labels.flatten() if labels.shape == (B, 1) else labels
    if labels.shape != (B,):
        if T > 1:
            expected += f" or ({B}, {T}) for a language model"
        raise checks.fail(op, name, expected, labels, "for anything else use observe()")
    counted = labels != IGNORED
    return Batch(inputs, labels.long(), counted, bounds, (B, T), True, likelihood, classes)
