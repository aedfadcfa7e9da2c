"""The diagonal Fisher information of a model, exact per example at the price of an ordinary backward pass.

    F_i = mean over examples n of ( sum over n's tokens t of d log p(y_t | x_<t) / d theta_i )^2

with labels y_t drawn from the model's own distribution (labels="sample", an unbiased estimate of the true Fisher, Kunstner et al.
2019, arXiv:1905.12558) or taken from the data (labels="true", the empirical Fisher). Squares are accumulated in float32, for a
float64 model in float64.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasttax import _batches, _checks, _files, _labels
from fasttax._plan import TIED, Filter, plan, select
from fasttax._taps import TiedEmbeddingTap, require_input_grads
from fasttax.estimate import STORAGES, FisherEstimate

LABELS = ("sample", "true")
UNITS = ("example", "token", "batch")
LORA = ("factors",)
FALLBACK = (None, "loop")
NORMALIZE = ("mean", "sum")


class DiagonalFisher:
    """Accumulates a model's diagonal Fisher batch by batch.

    Args:
        model: a decoder language model (or a classifier) whose output is, or has, `.logits`.
        labels: "sample" draws one label a token from the model's distribution; "true" uses the data's own next tokens.
        unit: "example" squares each example's whole gradient, exactly as a loop over single examples would. "token" squares
            token by token (an approximation: it drops the products between tokens). "batch" squares the batch's summed
            gradient (Gauss-Newton-Bartlett, Liu et al. 2023, arXiv:2305.14342: unbiased with sampled labels, 10-25 times the
            variance), so it refuses true labels.
        params: None for all trainable parameters, a predicate (name, parameter) -> bool, or names and patterns with *.
        tied: a weight that embedding and head share is squared as one, cross terms included ("exact"), or use by use
            ("sum_of_squares").
        lora: "factors" treats adapter factors as the parameters they are.
        generator: for label sampling; None is a generator of its own, seeded with 0.
        fallback: "loop" differentiates one example at a time where a parameter has no rule: exact for any model, slow.
        verify: on the first batch, checks the method against autograd on 16 tokens, parameter by parameter, so that a
            weight used in a way the taps do not see is an error and not a wrong number.

    Raises:
        ValueError, TypeError: an option does not fit, or parameters cannot be covered (each is named, with the way out).
    """

    def __init__(self, model: nn.Module, *, labels: str = "sample", unit: str = "example", params: Filter = None, tied: str = "exact",
                 lora: str = "factors", generator: torch.Generator | None = None, fallback: str | None = None, verify: bool = True) -> None:  # fmt: skip
        op = "DiagonalFisher"
        if not isinstance(model, nn.Module):
            raise _checks.fail(op, "model", "a torch.nn.Module", model, error=TypeError)
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.labels = _checks.choice(op, "labels", labels, LABELS)
        self.unit = _checks.choice(op, "unit", unit, UNITS)
        _checks.choice(op, "tied", tied, TIED)
        _checks.choice(op, "lora", lora, LORA)
        if fallback not in FALLBACK:
            raise _checks.fail(op, "fallback", "None or 'loop'", repr(fallback))
        if unit == "batch" and labels == "true":
            raise _checks.fail(op, "labels", "'sample' with unit='batch'", "'true'",
                               "a squared sum of true-label gradients is biased by the squared mean gradient")  # fmt: skip
        if fallback == "loop" and unit != "example":
            raise _checks.fail(op, "unit", "'example' with fallback='loop'", repr(unit))
        self.model, self.fallback = model, fallback
        self._params = select(op, model, params)
        self._taps = [] if fallback == "loop" else plan(op, model, self._params, tied, self)
        device = next(iter(self._params.values())).device
        self.generator = torch.Generator(device).manual_seed(0) if generator is None else generator
        self.examples = self.tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._hash = _files.weights_hash(self._params.items())
        self._unverified = verify and fallback is None
        self._layout: tuple[tuple[int, ...], Tensor] | None = None  # (B, T) and boundaries of the batch in flight
        self._uses = Counter(name for tap in self._taps for name in tap.names.values())
        self._recorded: Counter[str] = Counter()  # by this backward
        self._damaged = False

    # --- the taps' side ------------------------------------------------------------------------------------------------

    def batch_size(self) -> int | None:
        return None if self._layout is None else self._layout[0][0]

    def segments(self, leading: torch.Size, where: str) -> Tensor:
        """Boundaries of the units over a layer's rows, from the leading shape of its input."""
        if self._layout is None:  # observe() without a layout: rows of the first layer seen are the examples
            shape = (leading[0], leading[1] if len(leading) > 1 else 1)
            self._layout = (shape, torch.arange(leading[0] + 1) * shape[1])
        (B, T), bounds = self._layout
        rows = leading.numel()
        packed = bounds.numel() - 1 != B
        if self.unit == "batch":
            return torch.tensor([0, rows])
        if tuple(leading[:2]) == (B, T) or (len(leading) == 1 and leading[0] == B * T):
            per_token = rows // (B * T)
            return torch.arange(B * T + 1) * per_token if self.unit == "token" else bounds.cpu() * per_token
        if leading[0] == B and not packed:
            return torch.arange(rows + 1) if self.unit == "token" else torch.arange(B + 1) * (rows // B)
        raise ValueError(
            f"DiagonalFisher: {where}: expected an input that keeps the batch's {B} rows (of {T} tokens) apart, got leading shape "
            f"{tuple(leading)}; leave its parameters out with params=, or pass fallback='loop'"
        )

    def add(self, name: str) -> Tensor:
        """The accumulator of parameter `name`, to be added to by each of its taps once a backward."""
        self._recorded[name] += 1
        if self._recorded[name] > self._uses[name]:
            raise RuntimeError(f"DiagonalFisher: {name} took part twice in one backward (a module called more than once, or two losses): its uses "
                               "would be squared apart; sum the losses into one backward, leave it out with params=, or pass fallback='loop'")  # fmt: skip
        return self._sum(name)

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            p = self._params[name]
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            self._sums[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        return self._sums[name]

    def weight(self, examples: int) -> Tensor | None:
        return None

    # --- one batch -----------------------------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Any] | Tensor) -> None:
        """Forward, labels, backward, accumulate. p.grad, RNG state, training flag and hooks are afterwards as they were.

        Args:
            batch: input_ids (B, T), or a dict or BatchEncoding with input_ids and, as they apply, attention_mask, labels (-100
                leaves a token out; (B,) for a classifier), position_ids or cu_seqlens of packed rows (each document is an
                example). A token's label is the next token of its own document.

        Raises:
            ValueError, TypeError, IndexError: the batch does not fit; nothing is accumulated.
        """
        self._check_whole("update")
        ready = self._read(batch)
        if self._unverified:
            self._verify(batch)
            self._unverified = False
        if self.fallback == "loop":
            self._update_loop(batch, ready)
        else:
            with self._tapped((ready.shape, ready.bounds)):
                logits = self._forward(ready)
                logits.backward(self._score(logits, ready))
        self.examples += ready.examples
        self.tokens += int(ready.counted.sum())

    def _check_whole(self, method: str) -> None:
        if self._damaged:
            raise RuntimeError(f"DiagonalFisher.{method}: an earlier batch failed halfway through its backward, so that some layers counted it and others "
                               "did not; start a new DiagonalFisher")  # fmt: skip

    def _read(self, batch: Any) -> _batches.Batch:
        get_embedding: Any = getattr(self.model, "get_input_embeddings", None)
        embedding = None if get_embedding is None else get_embedding()
        vocab = getattr(embedding, "num_embeddings", None)
        device = next(iter(self._params.values())).device
        if self.model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules()):
            warnings.warn("DiagonalFisher: the model is in train mode and has dropout; the estimate is of the dropped-out model "
                          "(call model.eval())", stacklevel=3)  # fmt: skip
        return _batches.read("DiagonalFisher.update", batch, device, vocab)

    def _forward(self, batch: _batches.Batch) -> Tensor:
        inputs = dict(batch.inputs)
        if hasattr(self.model, "config") and hasattr(self.model, "generate"):
            inputs.setdefault("use_cache", False)
        output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[: batch.targets.dim()] != batch.targets.shape or logits.dim() != batch.targets.dim() + 1:
            raise _checks.fail("DiagonalFisher.update", "model", f"an output with logits of shape {(*batch.targets.shape, 'V')}",
                               logits if isinstance(logits, Tensor) else type(output).__name__,
                               "for a classifier pass labels of shape (B,); for anything else use observe() with your own loss")  # fmt: skip
        return logits

    def _score(self, logits: Tensor, batch: _batches.Batch) -> Tensor:
        return _labels.score(logits, batch, self.generator if self.labels == "sample" else None)

    @contextlib.contextmanager
    def _tapped(self, layout: tuple[tuple[int, ...], Tensor] | None) -> Iterator[None]:
        """Taps in place and every parameter frozen, so that autograd computes no weight gradient; all undone at the end."""
        handles, flags = [], [(p, p.requires_grad) for p in self.model.parameters()]
        devices = sorted({p.device.index for p, _ in flags if p.device.type == "cuda"})
        self._layout, self._recorded = layout, Counter()
        try:
            for p, _ in flags:
                p.requires_grad_(False)
            handles = [tap.install() for tap in self._taps] + require_input_grads(self.model)
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                yield
        except BaseException:
            self._damaged = self._damaged or bool(self._recorded)  # some layers have added this batch, others have not
            raise
        finally:
            for handle in handles:
                handle.remove()
            for p, flag in flags:
                p.requires_grad_(flag)
            for tap in self._taps:
                if isinstance(tap, TiedEmbeddingTap):
                    tap.seen.clear()
                    tap.ids = None

    @contextlib.contextmanager
    def observe(self, *, cu_seqlens: Tensor | None = None, shape: tuple[int, int] | None = None) -> Iterator[None]:
        """Inside, the user's own forward and one backward of the SUM of per-token losses add to the estimate; p.grad is untouched.

        Args:
            cu_seqlens: boundaries of the examples in one packed row. Without it, rows of the batch are the examples.
            shape: (B, T) of the batch, where the first layer's input does not show it.
        """
        layout = None
        if cu_seqlens is not None:
            _checks.tensor("DiagonalFisher.observe", "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
            layout = ((1, int(cu_seqlens[-1])), cu_seqlens.long())
        elif shape is not None:
            layout = (shape, torch.arange(shape[0] + 1) * shape[1])
        with self._tapped(layout):
            yield
            if self._recorded and self._layout is not None:
                self.examples += self._layout[1].numel() - 1
                self.tokens += int(self._layout[1][-1])
            else:
                raise RuntimeError("DiagonalFisher.observe: no gradient reached the model's layers; run forward and backward of the loss inside the block")

    def _update_loop(self, batch: Any, ready: _batches.Batch) -> None:
        if ready.packed:
            raise _checks.fail("DiagonalFisher.update", "batch", "unpacked rows with fallback='loop'", "packed rows", "pass one document a row, padded")
        params = list(self._params.values())
        flags = [p.requires_grad for p in params]
        devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
        try:
            for p in params:
                p.requires_grad_(True)
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                for n in range(ready.shape[0]):
                    for name, g in zip(self._params, self._gradients(self._read(_batches.rows(batch, n, n + 1))), strict=True):
                        if g is not None:
                            total = self._sum(name)
                            total += g.to(total.dtype) ** 2
        finally:
            for p, flag in zip(params, flags, strict=True):
                p.requires_grad_(flag)

    def _gradients(self, ready: _batches.Batch) -> list[Tensor | None]:
        """By .backward(), since reentrant checkpointing refuses torch.autograd.grad; every p.grad is put back."""
        everything = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        wanted = {id(p) for p in self._params.values()}
        root = require_input_grads(self.model)
        try:
            for p, _, _ in everything:
                p.requires_grad_(id(p) in wanted)
                p.grad = None
            logits = self._forward(ready)
            logits.backward(self._score(logits, ready))
            return [p.grad for p in self._params.values()]
        finally:
            for handle in root:
                handle.remove()
            for p, flag, grad in everything:
                p.requires_grad_(flag)
                p.grad = grad

    def _verify(self, batch: Any) -> None:
        """Taps against autograd on a 16-token example, parameter by parameter."""
        small = self._read(_batches.snippet(batch, 16))
        if not bool(small.counted.any()):
            return
        state = self.generator.get_state()
        kept, self._sums = self._sums, {}
        flags = [(p, p.requires_grad) for p in self._params.values()]
        try:
            with self._tapped((small.shape, small.bounds)):
                logits = self._forward(small)
                logits.backward(self._score(logits, small))
            self.generator.set_state(state)
            for p, _ in flags:
                p.requires_grad_(True)
            devices = sorted({p.device.index for p, _ in flags if p.device.type == "cuda"})
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                truth = self._gradients(small)
            slack = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p, _ in flags) and not torch.is_autocast_enabled() else 0.1
            wrong = []
            for (name, p), g in zip(self._params.items(), truth, strict=True):
                expected = torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() ** 2
                got = self._sums.get(name, torch.zeros_like(expected)).float()
                error, size = float((got.sqrt() - expected.sqrt()).norm()), float(expected.sqrt().norm())
                if self.unit == "example" and error > slack * size + 1e-12:
                    wrong.append(f"{name}: off by {error / max(size, 1e-30):.1e} of its gradient's norm")
                elif self.unit != "example" and (size > 0) != bool(got.any()):
                    wrong.append(f"{name}: {'no' if size > 0 else 'a'} gradient seen where autograd has {'one' if size > 0 else 'none'}")
        finally:
            self._sums, self._damaged = kept, False
            self.generator.set_state(state)
            for p, flag in flags:
                p.requires_grad_(flag)
        if wrong:
            raise ValueError("DiagonalFisher: the layers' taps disagree with autograd on:\n  " + "\n  ".join(wrong[:10])
                             + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "") + "\nthese weights are used outside their own module's "
                             "forward (or in a way it does not show); leave them out with params=, or pass fallback='loop'")  # fmt: skip

    # --- the whole -----------------------------------------------------------------------------------------------------

    def reduce(self, group: Any = None) -> None:
        """Sums squares and counts over the ranks of a torch.distributed group: all ranks then hold the single-process estimate."""
        if not dist.is_available() or not dist.is_initialized():
            raise _checks.fail("DiagonalFisher.reduce", "group", "an initialised torch.distributed", "none", "call torch.distributed.init_process_group first")
        for name in self._params:  # one order on every rank, also where a rank has seen nothing
            dist.all_reduce(self._sum(name), group=group)
        counts = torch.tensor([self.examples, self.tokens], device=next(iter(self._params.values())).device)
        dist.all_reduce(counts, group=group)
        self.examples, self.tokens = (int(c) for c in counts)

    def finalize(self, normalize: str = "mean", storage: str = "fp32") -> FisherEstimate:
        """The estimate so far: "mean" per example (per token for unit="token") or the "sum", as "fp32", "bf16" or "u8log"."""
        _checks.choice("DiagonalFisher.finalize", "normalize", normalize, NORMALIZE)
        _checks.choice("DiagonalFisher.finalize", "storage", storage, STORAGES)
        self._check_whole("finalize")
        if self.examples == 0:
            raise RuntimeError("DiagonalFisher.finalize: no example was seen; call update(batch) first")
        count = self.tokens if self.unit == "token" else self.examples
        values = {name: self._sum(name) / count if normalize == "mean" else self._sum(name).clone() for name in self._params}
        from fasttax import __version__

        metadata = {
            "estimator": "diagonal_fisher", "labels": self.labels, "unit": self.unit, "examples": self.examples, "tokens": self.tokens,
            "normalize": normalize, "storage": "fp32", "model": type(self.model).__name__, "model_hash": self._hash,
            "fasttax": __version__, "torch": torch.__version__,
        }  # fmt: skip
        estimate = FisherEstimate(values, metadata)
        return estimate if storage == "fp32" else estimate.to(storage)


def estimate_fisher(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], *, labels: str = "sample", unit: str = "example",
                    max_examples: int | None = None, progress: bool = True, params: Filter = None, tied: str = "exact",
                    lora: str = "factors", generator: torch.Generator | None = None, fallback: str | None = None,
                    normalize: str = "mean", storage: str = "fp32") -> FisherEstimate:  # fmt: skip
    """The diagonal Fisher of `model` over `batches`, with a progress bar; options as in `DiagonalFisher` and its `finalize`.

    Args:
        batches: an iterable of what `DiagonalFisher.update` takes.
        max_examples: stop after this many rows; the last batch is cut to fit.
        progress: show examples done, examples/s and the time left.

    Example:
        >>> fisher = fasttax.estimate_fisher(model, loader, max_examples=256)
        >>> ewc = fasttax.EWC(model, fisher, strength=1e3)
    """
    if max_examples is not None and (not isinstance(max_examples, int) or isinstance(max_examples, bool) or max_examples < 1):
        raise _checks.fail("estimate_fisher", "max_examples", "None or an integer >= 1", max_examples)
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise _checks.fail("estimate_fisher", "batches", "an iterable of batches", batches, "for one batch pass [batch]", TypeError)
    estimator = DiagonalFisher(model, labels=labels, unit=unit, params=params, tied=tied, lora=lora, generator=generator, fallback=fallback)
    _checks.choice("estimate_fisher", "normalize", normalize, NORMALIZE)
    _checks.choice("estimate_fisher", "storage", storage, STORAGES)
    with tqdm(total=max_examples, unit="ex", desc="Fisher", disable=not progress) as bar:
        for batch in batches:
            room = None if max_examples is None else max_examples - estimator.examples
            if room is not None and isinstance(batch, (Mapping, Tensor)):
                ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
                batch = _batches.rows(batch, 0, room) if isinstance(ids, Tensor) and ids.shape[0] > room else batch
            before = estimator.examples
            estimator.update(batch)
            bar.update(estimator.examples - before)
            if max_examples is not None and estimator.examples >= max_examples:
                break
    if estimator.examples == 0:
        raise _checks.fail("estimate_fisher", "batches", "at least one batch", "an empty iterable")
    return estimator.finalize(normalize=normalize, storage=storage)
