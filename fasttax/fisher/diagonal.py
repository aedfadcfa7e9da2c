"""The diagonal Fisher information of a model, exact per example at the price of an ordinary
backward pass.

    F_i = mean over examples n of ( sum over n's tokens t of d log p(y_t | x_<t) / d theta_i )^2

with labels y_t drawn from the model's own distribution (labels="sample", an unbiased estimate of
the true Fisher, Kunstner et al. 2019, arXiv:1905.12558) or taken from the data (labels="true", the
empirical Fisher). Squares are accumulated in float32, for a float64 model in float64.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttax._base import checks, files
from fasttax._base.packed import STORAGES
from fasttax.fisher import batches, labels, loop, sharding
from fasttax.fisher.error import SamplingError
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.passes import Pass
from fasttax.fisher.plan import LORA, TIED, Filter, delta_w, plan, select
from fasttax.fisher.sums import Slot, Sums
from fasttax.fisher.taps import LinearTap, require_input_grads

LABELS = ("sample", "true", "exact_head")
UNITS = ("example", "token", "batch")
FALLBACK = (None, "loop")
NORMALIZE = ("mean", "sum")


class DiagonalFisher:
    """Accumulates a model's diagonal Fisher batch by batch.

    Args:
        model: a decoder language model or a classifier whose output is, or has, `.logits`. A
            compiled model runs uncompiled here.
        labels: "sample" draws one label a token from the model's distribution; "true" uses the
            data's own next tokens; "exact_head" samples and takes the head's own Fisher in closed
            form over the whole vocabulary, without sampling error.
        unit: "example" squares each example's whole gradient, exactly as a loop over single
            examples would. "token" squares token by token (an approximation: it drops the products
            between tokens). "batch" squares the batch's summed gradient (Gauss-Newton-Bartlett, Liu
            et al. 2023, arXiv:2305.14342: unbiased with sampled labels, 10-25 times the variance),
            so it refuses true labels.
        params: None for all trainable parameters, a predicate (name, parameter) -> bool, or names
            and patterns with *.
        tied: a weight that embedding and head share is squared as one, cross terms included
            ("exact"), or use by use ("sum_of_squares").
        lora: "factors" treats adapter factors as the parameters they are; "delta_w" gives, in their
            place, the Fisher of W + scale B A by the base weight's name, which a frozen or
            quantised base has too.
        generator: for label sampling; None is a generator of its own, seeded with 0.
        mc_samples: label draws a batch, averaged; each costs a backward.
        shift: labels of (B, T) are next tokens; False for models that predict each token in place
            (masked language models).
        fallback: "loop" differentiates one example at a time where a parameter has no rule: exact
            for any model, slow.
        verify: on the first batch, checks the method against autograd on 16 tokens, parameter by
            parameter, so that a weight used in a way the taps do not see is an error and not a
            wrong number.

    Raises:
        ValueError, TypeError: an option does not fit, or parameters cannot be covered (each is
            named, with the way out).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        labels: str = "sample",
        unit: str = "example",
        params: Filter = None,
        tied: str = "exact",
        lora: str = "factors",
        generator: torch.Generator | None = None,
        mc_samples: int = 1,
        shift: bool = True,
        fallback: str | None = None,
        verify: bool = True,
    ) -> None:
        op = "DiagonalFisher"
        if not isinstance(model, nn.Module):
            raise checks.fail(op, "model", "a torch.nn.Module", model, error=TypeError)
        self._ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        compiled = model._modules.get("_orig_mod")
        self.model = model if compiled is None else compiled
        self.labels = checks.choice(op, "labels", labels, LABELS)
        self.unit = checks.choice(op, "unit", unit, UNITS)
        checks.choice(op, "tied", tied, TIED)
        self.lora = checks.choice(op, "lora", lora, LORA)
        if fallback not in FALLBACK:
            raise checks.fail(op, "fallback", "None or 'loop'", repr(fallback))
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
            raise checks.fail(op, "mc_samples", "an integer >= 1", mc_samples)
        if labels == "true" and mc_samples != 1:
            raise checks.fail(
                op, "mc_samples", "1 with labels='true', which draws none", mc_samples
            )
        if unit == "batch" and labels == "true":
            raise checks.fail(
                op,
                "labels",
                "'sample' or 'exact_head' with unit='batch'",
                "'true'",
                "a squared sum of true-label gradients is biased by the squared mean gradient",
            )
        if fallback == "loop" and (
            unit != "example" or labels == "exact_head" or lora == "delta_w"
        ):
            option, value, fits = (
                ("unit", unit, "'example'")
                if unit != "example"
                else ("labels", labels, "'sample' or 'true'")
                if labels == "exact_head"
                else ("lora", lora, "'factors'")
            )
            raise checks.fail(op, option, f"{fits} with fallback='loop'", repr(value))
        self.fallback, self.mc_samples, self.shift = fallback, mc_samples, shift
        self.params = select(op, self.model, params)
        slots = {n: Slot.of(p) for n, p in self.params.items()}
        extra = delta_w(op, self.model, self.params, slots) if lora == "delta_w" else {}
        slots = {n: s for n, s in slots.items() if n in self.params or n in extra}
        self.sums = Sums(slots, tied)
        self.sums.weight = None if mc_samples == 1 else 1 / mc_samples
        self._taps, self._blocks = (
            ([], []) if fallback == "loop" else plan(op, self.model, self.params, extra, self.sums)
        )
        self.device = next(iter(slots.values())).device
        self.generator = (
            torch.Generator(self.device).manual_seed(0) if generator is None else generator
        )
        self.examples = self.tokens = self.batches = 0
        self.error = SamplingError(
            {
                n: (self.sums.shards[n].local if n in self.sums.shards else s).shape.numel()
                for n, s in slots.items()
            }
        )
        hashed = ((n, s.param) for n, s in slots.items() if s.param is not None)
        self._hash = files.weights_hash(hashed)
        self._unverified = verify and fallback is None and not self.sums.shards
        self._packed_unverified = verify
        self._damaged = self._reduced = False

    @property
    def drawing(self) -> torch.Generator | None:
        """The generator of labels; None where they are the data's."""
        return None if self.labels == "true" else self.generator

    # --- one batch -----------------------------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Any] | Tensor) -> None:
        """Forward, labels, backward, accumulate.

        p.grad, RNG state, training flag and hooks are afterwards as they were.

        Args:
            batch: input_ids (B, T), or a dict or BatchEncoding with input_ids and, as they apply,
                attention_mask, labels (-100 leaves a token out; (B,) for a classifier),
                position_ids or cu_seqlens of packed rows (each document is an example). A token's
                label is the next token of its own document. pixel_values in place of ids are right
                too.

        Raises:
            ValueError, TypeError, IndexError: the batch does not fit; nothing is accumulated.
        """
        self._check_whole("update")
        ready = self._read(batch)
        if self._packed_unverified and ready.packed:
            loop.check_isolation(self, batch, ready)
            self._packed_unverified = False
        if self._unverified:
            loop.verify(self, batch)
            self._unverified = False
        if self.fallback == "loop":
            loop.update(self, batch, ready)
        else:
            current = Pass(self.unit, ready.shape, ready.bounds)
            with self._tapped([current]):
                logits = self._forward(ready)
                ready = ready.settled(logits)
                for draw in range(self.mc_samples):
                    score = labels.score(logits, ready, self.drawing)
                    if self.labels == "exact_head":
                        current.head, current.score = self._head(current, logits), score
                    logits.backward(score.to(logits.dtype), retain_graph=draw + 1 < self.mc_samples)
                    self.sums.finish(current)
        self._count(ready.examples, int(ready.counted.sum()))

    def _count(self, examples: int, tokens: int) -> None:
        self.examples += examples
        self.tokens += tokens
        self.batches += 1
        self.error.batch(self.sums.value, tokens if self.unit == "token" else examples)

    def relative_error(self) -> float:
        """The estimate's own relative error (standard error over norm, on 64 coordinates a
        parameter) from the spread between batches.

        It halves with four times the examples. NaN before the second batch.
        """
        return self.error.relative()

    def _check_whole(self, method: str) -> None:
        if self._damaged:
            raise RuntimeError(
                f"DiagonalFisher.{method}: an earlier batch failed halfway through its backward, "
                "so that some layers counted it and others "
                "did not; start a new DiagonalFisher"
            )
        if self._reduced and method != "finalize":
            raise RuntimeError(
                f"DiagonalFisher.{method}: the sums are those of all ranks since reduce(); start a "
                "new DiagonalFisher"
            )

    def _read(self, batch: Any) -> batches.Batch:
        op = "DiagonalFisher.update"
        if isinstance(batch, Mapping):
            sharding.refuse_context_parallel(op, self.unit, *batch.values())
        get_embedding: Any = getattr(self.model, "get_input_embeddings", None)
        embedding = (
            None if get_embedding is None or not hasattr(self.model, "config") else get_embedding()
        )
        vocab = getattr(embedding, "num_embeddings", None)
        self._check_model()
        return batches.read(
            op,
            batch,
            self.device,
            vocab,
            positions=_takes(self.model, "position_ids"),
            shift=self.shift,
        )

    def _check_model(self) -> None:
        if not self.model.training and not any(m.training for m in self.model.modules()):
            return
        for where, m in self.model.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training:
                raise ValueError(
                    f"DiagonalFisher: model: expected batch norms in eval mode, got {where} in "
                    "train mode, which mixes the examples; call model.eval()"
                )
        dropouts = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training
            for m in self.model.modules()
        )
        if dropouts or any(
            getattr(m, "attention_dropout", 0) not in (0, None) and m.training
            for m in self.model.modules()
        ):
            warnings.warn(
                "DiagonalFisher: the model is in train mode and has dropout; the estimate is of "
                "the dropped-out model "
                "(call model.eval())",
                stacklevel=4,
            )

    def _arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        cached = hasattr(self.model, "config") and hasattr(self.model, "generate")
        return {**({"use_cache": False} if cached else {}), **inputs}

    def _logits(self, output: Any) -> Any:
        return output if isinstance(output, Tensor) else getattr(output, "logits", None)

    def _forward(self, batch: batches.Batch) -> Tensor:
        logits = self._logits(self.model(**self._arguments(batch.inputs)))
        expected = f"an output with logits of shape {(*batch.targets.shape, 'V')}"
        way_out = "for a classifier pass labels of shape (B,); for anything else use observe() with your own loss"
        if not isinstance(logits, Tensor):
            raise checks.fail(
                "DiagonalFisher.update", "model", expected, type(logits).__name__, way_out
            )
        classifies = logits.dim() == 2 and logits.shape[0] == batch.shape[0] and not batch.labelled
        if classifies and self.labels == "true":
            raise checks.fail(
                "DiagonalFisher.update",
                "batch",
                "a key 'labels' of shape (B,) for a classifier with labels='true'",
                "none",
            )
        if not classifies and (logits.shape[:-1] != batch.targets.shape):
            raise checks.fail("DiagonalFisher.update", "model", expected, logits, way_out)
        return logits

    def _head(self, current: Pass, logits: Tensor) -> Any:
        """The tap of the head: the model's output embedding, or the linear layer whose output the
        logits are.
        """
        get_head: Any = getattr(self.model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        for tap in self._taps:
            if type(tap) is LinearTap and tap.module is head:
                return tap
        last = current.outputs.get(logits.data_ptr())
        if last is None:
            raise checks.fail(
                "DiagonalFisher.update",
                "labels",
                "a linear head among params whose output is the logits with 'exact_head'",
                "none found",
                "use labels='sample', or name the head in params=",
            )
        return last

    @contextlib.contextmanager
    def _tapped(self, passes: list[Pass]) -> Iterator[None]:
        """Taps in place and every parameter frozen, so that autograd computes no weight gradient.

        All undone at the end.
        """
        handles: list[Any] = []
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        parts: list[Any] = [*self._taps, *self._blocks]
        self.sums.current = passes[0]
        try:
            for p, _ in flags:
                p.requires_grad_(False)
            handles = [part.install() for part in parts]
            handles += require_input_grads(self.model)
            with (
                _uncompiled(self.model),
                torch.random.fork_rng(devices=loop.cuda_devices(self.model)),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                yield
        except BaseException:
            # some layers have added this batch, others have not
            self._damaged = self._damaged or any(p.seen for p in passes)
            raise
        finally:
            self.sums.current = None
            for handle in handles:
                handle.remove()
            for p, flag in flags:
                p.requires_grad_(flag)

    @contextlib.contextmanager
    def observe(
        self, *, cu_seqlens: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Inside, the user's own forward and backward of SUMs of per-token losses add to the
        estimate; p.grad is untouched.

        Several losses of one forward are one: their gradients are summed before squaring, in one
        backward or in several (with retain_graph=True before the last). Every forward of the model
        is a batch of its own.

        Args:
            cu_seqlens: boundaries of the examples in one packed row. Without it, rows of the batch
                are the examples.
            shape: (B, T) of the batch, where the model's input does not show it.
        """
        op = "DiagonalFisher.observe"
        self._check_whole("observe")
        if self.fallback == "loop" or self.labels == "exact_head":
            option = "fallback" if self.fallback == "loop" else "labels"
            raise checks.fail(
                op,
                option,
                "None" if option == "fallback" else "'sample' or 'true'",
                repr(getattr(self, option)),
                "use update()",
            )
        sharding.refuse_context_parallel(op, self.unit)
        self._check_model()
        bounds = None
        if cu_seqlens is not None:
            checks.tensor(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
            bounds, shape = cu_seqlens, (1, int(cu_seqlens[-1]))
        elif shape is not None:
            bounds = torch.arange(shape[0] + 1) * shape[1]
        passes = [Pass(self.unit, shape, bounds, observed=True)]

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if passes[-1].calls:
                passes.append(Pass(self.unit, shape, bounds, observed=True))
                self.sums.current = passes[-1]
            tensors = [
                t
                for t in (kwargs.get("input_ids"), *args, *kwargs.values())
                if isinstance(t, Tensor) and t.dim()
            ]
            sharding.refuse_context_parallel(op, self.unit, *tensors)
            if tensors and shape is None:
                passes[-1].batch = tensors[0].shape[0]

        quiet: Any = self._ddp.no_sync() if self._ddp is not None else contextlib.nullcontext()
        with quiet, self._tapped(passes):
            handle = self.model.register_forward_pre_hook(begin, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
            seen = [p for p in passes if p.seen]
            if not seen:
                raise RuntimeError(
                    "DiagonalFisher.observe: no gradient reached the model's layers; run forward "
                    "and backward of the loss inside the block"
                )
            for p in seen:
                self.sums.finish(p)
        self._count(sum(p.examples for p in seen), sum(int(p.layout()[2][-1]) for p in seen))

    # --- the whole -----------------------------------------------------------------------------------------------------

    def reduce(self, group: Any = None) -> None:
        """Sums squares and counts over the ranks of a torch.distributed group.

        All ranks then hold the single-process estimate.

        Under FSDP2 the squares are summed as they come, each rank keeping its shard, and this sums
        the counts.
        """
        op = "DiagonalFisher.reduce"
        if not dist.is_available() or not dist.is_initialized():
            raise checks.fail(
                op,
                "group",
                "an initialised torch.distributed",
                "none",
                "call torch.distributed.init_process_group first",
            )
        self._check_whole("reduce")
        groups = self.sums.data_groups or [None] if group is None else [group]
        if groups == [None] and self.sums.shards:
            raise checks.fail(
                op,
                "group",
                "the data-parallel group, since ranks of a tensor-parallel group hold shards of "
                "one estimate",
                "None",
            )
        self.sums.reduce(groups)
        self.examples, self.tokens = self._everywhere(groups)
        self._reduced = True

    def _everywhere(self, groups: list[Any]) -> tuple[int, int]:
        counts = torch.tensor([self.examples, self.tokens], device=self.device)
        for group in groups:
            dist.all_reduce(counts, group=group)
        return int(counts[0]), int(counts[1])

    def finalize(self, normalize: str = "mean", storage: str = "fp32") -> FisherEstimate:
        """The estimate so far: "mean" per example (per token for unit="token") or the "sum", as
        "fp32", "bf16" or "u8log".
        """
        checks.choice("DiagonalFisher.finalize", "normalize", normalize, NORMALIZE)
        checks.choice("DiagonalFisher.finalize", "storage", storage, STORAGES)
        self._check_whole("finalize")
        examples, tokens = (
            (self.examples, self.tokens)
            if self._reduced
            else self._everywhere(self.sums.data_groups)
        )
        if examples == 0:
            raise RuntimeError(
                "DiagonalFisher.finalize: no example was seen; call update(batch) first"
            )
        count = max(1, tokens if self.unit == "token" else examples)
        values = {}
        for name in self.sums.slots:
            value = self.sums.value(name)
            value = value / count if normalize == "mean" else value.clone()
            values[name] = (
                self.sums.shards[name].tensor(value) if name in self.sums.shards else value
            )
        metadata = {
            **self._facts(),
            "examples": examples,
            "tokens": tokens,
            "normalize": normalize,
            "storage": "fp32",
        }
        if self.batches > 1:
            metadata["relative_error"] = self.relative_error()
        estimate = FisherEstimate(values, metadata)
        return estimate if storage == "fp32" else estimate.to(storage)

    def _facts(self) -> dict[str, Any]:
        from fasttax._base.version import __version__

        options = {
            "labels": self.labels,
            "unit": self.unit,
            "mc_samples": self.mc_samples,
            "tied": self.sums.tied,
            "lora": self.lora,
        }
        versions = {"fasttax": __version__, "torch": torch.__version__}
        return {
            "estimator": "diagonal_fisher",
            **options,
            "model": type(self.model).__name__,
            "model_hash": self._hash,
            **versions,
        }

    # --- across a crash -------------------------------------------------------------------------------------------------

    def checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Writes sums, counts and the generator's state.

        `resume` continues from there to the same bits. A path for each rank.
        """
        self._check_whole("checkpoint")
        tensors = {f"sum.{n}": self.sums.value(n) for n in self.sums.slots}
        tensors |= {f"error.{k}": t for k, t in self.error.state().items()}
        tensors["generator"] = self.generator.get_state()
        files.write(
            path,
            "DiagonalFisher",
            tensors,
            {
                **self._facts(),
                "examples": self.examples,
                "tokens": self.tokens,
                "batches": self.batches,
            },
        )

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Takes up what `checkpoint` wrote, for the same model and options."""
        tensors, metadata = files.read(path, "DiagonalFisher")
        facts = {k: v for k, v in self._facts().items() if k not in ("fasttax", "torch")}
        differences = [
            f"{k}: {metadata.get(k)!r} in the file, {v!r} here"
            for k, v in facts.items()
            if metadata.get(k) != v
        ]
        shapes = {n: tuple(self.sums.value(n).shape) for n in self.sums.slots}
        stored = {
            n.removeprefix("sum."): tuple(t.shape)
            for n, t in tensors.items()
            if n.startswith("sum.")
        }
        differences += [
            f"{n}: {stored.get(n, 'missing')} in the file, {shapes.get(n, 'missing')} here"
            for n in sorted({*stored, *shapes})
            if stored.get(n) != shapes.get(n)
        ]
        if differences:
            raise ValueError(
                f"DiagonalFisher.resume: {os.fspath(path)} was written by another estimation:\n  "
                + "\n  ".join(differences[:20])
                + "\ndelete the file to begin anew, or give the model and options that wrote it"
            )
        for n in shapes:
            self.sums.value(n).copy_(tensors[f"sum.{n}"])
        self.error.restore(
            {k.removeprefix("error."): t for k, t in tensors.items() if k.startswith("error.")}
        )
        self.generator.set_state(tensors["generator"])
        self.examples, self.tokens, self.batches = (
            metadata[k] for k in ("examples", "tokens", "batches")
        )
        self._unverified = False


def _takes(model: nn.Module, argument: str) -> bool:
    import inspect

    wrapped: Any = model
    while hasattr(wrapped, "get_base_model"):  # PEFT's forward takes anything
        wrapped = wrapped.get_base_model()
    return argument in inspect.signature(wrapped.forward).parameters


def _uncompiled(model: nn.Module) -> Any:
    """Compiled parts run eagerly: hooks that come after compilation are not in the compiled code."""
    compiled = any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
