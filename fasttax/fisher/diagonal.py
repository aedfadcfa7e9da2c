"""DiagonalFisher: the diagonal Fisher information, exact per example at a backward pass's price.

    F_i = mean over examples n of ( sum over n's tokens t of d log p(y_t | x_<t) / d theta_i )^2

with labels y_t drawn from the model's own distribution (labels="sample", an unbiased estimate of
the true Fisher, Kunstner et al. 2019, arXiv:1905.12558) or taken from the data (labels="true", the
empirical Fisher). Squares are accumulated in float32, for a float64 model in float64.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttax._base import checks, files, waits
from fasttax._base.packed import STORAGES
from fasttax._base.version import __version__
from fasttax.fisher import labels as scores
from fasttax.fisher import loop, sharding
from fasttax.fisher.delta_w import LORA, base_weights
from fasttax.fisher.error import SamplingError
from fasttax.fisher.estimate import FisherEstimate
from fasttax.fisher.layout import Layout
from fasttax.fisher.observation import Loss, Observation
from fasttax.fisher.passes import Pass
from fasttax.fisher.plan import TIED, Filter, plan, select
from fasttax.fisher.products import fast_linear
from fasttax.fisher.resuming import differing, lacking
from fasttax.fisher.rules.routing import RoutingBlock
from fasttax.fisher.sums import Slot, Sums
from fasttax.fisher.tap import Tap
from fasttax.fisher.task import LIKELIHOODS, Task
from fasttax.fisher.verify import check_isolation, verify
from fasttax.fisher.view import View, bare

LABELS = ("sample", "true", "exact_head")
UNITS = ("example", "token", "batch")
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
            et al. 2023, arXiv:2305.14342: unbiased with sampled labels, its variance grows with the
            batch), so it refuses true labels.
        params: None for all trainable parameters, a predicate (name, parameter) -> bool, or names
            and patterns with *.
        tied: a weight that embedding and head share is squared as one, cross terms included
            ("exact"), or use by use ("sum_of_squares").
        lora: "factors" treats adapter factors as the parameters they are; "delta_w" gives, in their
            place, the Fisher of W + scale B A by the base weight's name, which a frozen or
            quantised base has too.
        generator: for label sampling; None is a generator of its own, seeded with 0.
        mc_samples: label draws a batch, averaged; each costs a backward.
        likelihood: what the labels are drawn from, and their loss: "softmax" over classes or
            tokens, "bernoulli" for a sigmoid at each output, "gaussian" of variance 1 around each
            output (squared error). "auto" is what the model's config says (problem_type; one label
            of transformers is a regression's), else softmax.
        shift: labels of (B, T) are next tokens; False for models that predict each token in place.
            None: the labels that a batch of transformers' masked language models or token
            classifiers has are in place, all others are next tokens. An encoder-decoder's labels
            are its decoder's, in place.
        fallback: "loop" differentiates one example at a time where a parameter has no rule: exact
            for any model, slow.
        verify: on the first batch, checks the method against autograd on 16 tokens, parameter by
            parameter, so that a weight used in a way the taps do not see is an error and not a
            wrong number.

    Raises:
        ValueError, TypeError: an option does not fit, or parameters cannot be covered (each is
            named, with the way out).

    Example:
        >>> estimator = fasttax.DiagonalFisher(model, labels="sample")
        >>> for batch in loader:
        ...     estimator.update(batch)
        >>> fisher = estimator.finalize()
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
        likelihood: str = "auto",
        shift: bool | None = None,
        fallback: str | None = None,
        verify: bool = True,
    ) -> None:
        op = "DiagonalFisher"
        if not isinstance(model, nn.Module):
            raise checks.fail(op, "model", "a torch.nn.Module", model, error=TypeError)
        self.labels = checks.choice(op, "labels", labels, LABELS)
        self.unit = checks.choice(op, "unit", unit, UNITS)
        self.tied = checks.choice(op, "tied", tied, TIED)
        self.lora = checks.choice(op, "lora", lora, LORA)
        self.mc_samples = checks.count(op, "mc_samples", mc_samples)
        self.fallback = fallback
        self._check_options(op)
        self.model = bare(model)
        checks.choice(op, "likelihood", likelihood, LIKELIHOODS)
        self.task = Task.of(self.model, likelihood, shift)
        self.params = select(op, self.model, params)
        slots = {n: Slot.of(p) for n, p in self.params.items()}
        dense = {}
        if lora == "delta_w":
            dense = base_weights(op, self.model, self.params, slots)
        self.sums = self._sums_of(slots)
        taps: list[Tap] = []
        blocks: list[RoutingBlock] = []
        if fallback is None:
            taps, blocks = plan(op, self.model, self.params, dense, self.sums)
        self.device = next(iter(slots.values())).device
        self.view = View(
            self.model, model, self.device, taps, blocks, self.unit, self.labels, self.task
        )
        for name, p in self.params.items() if generator is None else ():
            checks.has_memory(op, name, p)
        self.generator = generator or torch.Generator(self.device).manual_seed(0)
        self.examples = self.batches = 0
        self._tokens, self._more_tokens = 0, None  # type: int, Tensor | None
        self._ranges = waits.Ranges()
        #: how many batches, and their `_base.hashes.chained`, where who calls knows them all
        self.hashed = (0, "")
        self._settle()
        self.error = SamplingError({n: self.sums.watched_numel(n) for n in slots})
        hashed = ((n, s.param) for n, s in slots.items() if s.param is not None)
        self._hash = files.weights_hash(hashed)
        self._unverified = verify and fallback is None and not self.sums.shards
        self._unproven = self._unverified
        self._packed_unverified = verify
        self._reduced = False

    def _sums_of(self, slots: Mapping[str, Slot]) -> Sums:
        return Sums(slots, self.tied, 1 / self.mc_samples)

    def _settle(self) -> None:
        """What is left to do once the taps are known."""

    def _check_options(self, op: str) -> None:
        """Refuses options that exclude each other."""
        if self.fallback not in (None, "loop"):
            raise checks.fail(op, "fallback", "None or 'loop'", repr(self.fallback))
        if self.labels == "true" and self.mc_samples != 1:
            expected = "1 with labels='true', which draws none"
            raise checks.fail(op, "mc_samples", expected, self.mc_samples)
        if self.unit == "batch" and self.labels == "true":
            raise checks.fail(
                op,
                "labels",
                "'sample' or 'exact_head' with unit='batch'",
                "'true'",
                "a squared sum of true-label gradients is biased by the squared mean gradient",
            )
        if self.fallback is None:
            return
        for option, value, fits in (
            ("unit", self.unit, ("example",)),
            ("labels", self.labels, ("sample", "true")),
            ("lora", self.lora, ("factors",)),
        ):
            if value not in fits:
                expected = f"{' or '.join(map(repr, fits))} with fallback='loop'"
                raise checks.fail(op, option, expected, repr(value))

    @property
    def drawing(self) -> torch.Generator | None:
        """The generator of labels; None where they are the data's."""
        return None if self.labels == "true" else self.generator

    @property
    def tokens(self) -> int:
        """How many predictions counted; on a GPU a look waits for the batches so far."""
        if self._more_tokens is not None:
            self._tokens, self._more_tokens = self._tokens + int(self._more_tokens), None
        return self._tokens

    @tokens.setter
    def tokens(self, value: int) -> None:
        self._tokens, self._more_tokens = value, None

    # --- one batch --------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Any] | Tensor | tuple[Tensor, Tensor]) -> None:
        """Forward, labels, backward, accumulate.

        p.grad, RNG state, training flag and hooks are afterwards as they were. float32 linear
        layers on a CPU run by fasttax's products where those measured faster than torch's.

        Args:
            batch: input_ids (B, T), or a dict or BatchEncoding with input_ids and, as they apply,
                attention_mask, labels (-100 leaves a token out; (B,) for a classifier, (B,
                outputs) floats of a likelihood that has a label for each), position_ids or
                cu_seqlens of packed rows (each document is an example). A token's label is the
                next token of its own document. What has no ids: pixel_values and its like, a dict
                by the names of the model's own arguments, its first argument alone, or (inputs,
                labels).

        Raises:
            ValueError, TypeError, IndexError: the batch does not fit, or on a CPU its logits are
                not finite; nothing is accumulated. Of what lies on a GPU finalize, reduce and
                checkpoint say so: update does not wait for the device.
        """
        self._check_whole("update")
        ready = self.view.read(batch)
        if self._packed_unverified and ready.packed:
            check_isolation(self.view, ready)
            self._packed_unverified = False
        several = ready.shape[0] > 1  # one row proves nothing of how rows lie
        if self._unverified and (several or self.batches == 0):
            verify(self.view, self.sums, self.drawing, batch)
            self._unverified = not several
        if self.fallback == "loop":
            loop.update(
                self.view, self.sums, batch, ready, draws=self.mc_samples, drawing=self.drawing
            )
            self._count(ready.examples, ready.counted.sum(), ready.ranges)
            return
        current = Pass(Layout(self.unit, ready.shape, ready.bounds))
        with (
            self.sums.recording([current]),
            self.view.tapped(),
            fast_linear(self.model),
        ):
            with current.explained():
                logits = self.view.forward(ready)
            ready = ready.settled(logits)
            for draw in range(self.mc_samples):
                score = scores.score(logits, ready, self.drawing)
                if self.labels == "exact_head":
                    current.head, current.score = self.view.head(current, logits, ready), score
                logits.backward(score.to(logits.dtype), retain_graph=draw + 1 < self.mc_samples)
                self.sums.finish(current)
        self._count(ready.examples, ready.counted.sum(), ready.ranges)

    @contextlib.contextmanager
    def observe(
        self,
        *,
        cu_seqlens: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        loss: Loss | None = None,
    ) -> Iterator[None]:
        """Inside, the user's own forward and backward add to the estimate; p.grad is untouched.

        The losses are SUMs of per-token losses, without a GradScaler's factor. Several losses of
        one forward are one: their gradients are summed before squaring, in one backward or in
        several (with retain_graph=True before the last). Every forward of the model is a batch of
        its own.

        Args:
            cu_seqlens: boundaries of the examples in one packed row. Without it, rows of the batch
                are the examples.
            shape: (B, T) of the batch, where the model's input does not show it.
            loss: n -> the loss of the batch's example n alone, by a forward of its own, as
                `lambda n: F.cross_entropy(model(x[n : n + 1]), y[n : n + 1], reduction="sum")`.
                The first batch is held against it; with fallback="loop" every batch is estimated
                by it, and what runs inside says only how many examples there are.

        The first batch counts when it is proven (unless verify=False): the taps' gradients summed
        over the examples are those that autograd gives for the whole, of every parameter; the
        second example, run alone or by `loss`, gives the same; a cross-entropy is no mean.

        Raises:
            ValueError: the estimator's options allow update() alone, or the first batch shows that
                the squares would not be those of the examples.
            RuntimeError: no gradient was seen.
        """
        op = "DiagonalFisher.observe"
        self._check_whole("observe")
        if self.fallback is not None and loss is None:
            way_out = "give the loss of one example, or use update()"
            raise checks.fail(op, "loss", "a function with fallback='loop'", "None", way_out)
        if self.labels == "exact_head":
            got, way_out = repr(self.labels), "use update()"
            raise checks.fail(op, "labels", "'sample' or 'true'", got, way_out)
        sharding.refuse_context_parallel(op, self.unit)
        self.view.check_mode()
        bounds = None
        if cu_seqlens is not None:
            checks.tensor(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
            bounds, shape = cu_seqlens, (1, int(cu_seqlens[-1]))
        elif shape is not None:
            bounds = torch.arange(shape[0] + 1, device="cpu") * shape[1]
        proven = not self._unproven
        block = Observation(op, self.view, self.sums, shape, bounds, proven=proven, loss=loss)
        with block.running() if self.fallback is None else block.looping():
            yield
        self._unproven = not block.proven
        layouts = [p.layout for p in block.seen]
        tokens = sum(int(layout.known()[2][-1]) for layout in layouts)
        self._count(sum(layout.examples for layout in layouts), torch.tensor(tokens, device="cpu"))

    def _count(self, examples: int, tokens: Tensor, ranges: waits.Ranges | None = None) -> None:
        self.examples += examples
        self._more_tokens = tokens if self._more_tokens is None else self._more_tokens + tokens
        self.batches += 1
        self.error.batch(self.sums.watched, tokens if self.unit == "token" else examples)
        if ranges is not None:
            self._ranges.join(ranges)

    def relative_error(self) -> float:
        """The estimate's own relative error, from the spread between batches.

        Standard error over norm, on 64 coordinates a parameter. It halves with four times the
        examples. NaN before the second batch.
        """
        return self.error.relative()

    def _check_whole(self, method: str) -> None:
        if self.sums.damaged:
            raise RuntimeError(
                f"DiagonalFisher.{method}: an earlier batch failed halfway, so that some of its "
                "layers or examples are counted and others are not; start a new DiagonalFisher"
            )
        if self._reduced and method != "finalize":
            raise RuntimeError(
                f"DiagonalFisher.{method}: the sums are those of all ranks since reduce(); start a "
                "new DiagonalFisher"
            )
        if method not in ("update", "observe"):  # it waits for the device anyway
            self._ranges.check()

    # --- the whole --------------------------------------------------------------------------------

    def reduce(self, group: Any = None) -> None:
        """Sums squares and counts over the ranks of a torch.distributed group.

        All ranks then hold the single-process estimate. Under FSDP2 the squares are summed as they
        come, each rank keeping its shard, and this sums the counts.

        Raises:
            ValueError: torch.distributed is not initialised, or ranks of tensor parallelism would
                be summed.
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
        groups = [group]
        if group is None:
            groups = self.sums.data_groups or [None]
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
        """(examples, tokens) of all ranks of the groups."""
        counts = torch.tensor([self.examples, self.tokens], device=self.device)
        for group in groups:
            dist.all_reduce(counts, group=group)
        return int(counts[0]), int(counts[1])

    def finalize(self, normalize: str = "mean", storage: str = "fp32") -> FisherEstimate:
        """The estimate so far. Under FSDP2 and tensor parallelism all ranks call it.

        Args:
            normalize: "mean" per example (per token for unit="token"), or the "sum".
            storage: "fp32", "bf16" or "u8log".

        Raises:
            RuntimeError: no example was seen, or none with a prediction that counts.
            ValueError: some sums are not finite, on whichever rank.
        """
        checks.choice("DiagonalFisher.finalize", "normalize", normalize, NORMALIZE)
        checks.choice("DiagonalFisher.finalize", "storage", storage, STORAGES)
        self._check_whole("finalize")
        examples, tokens = self.examples, self.tokens
        if not self._reduced:
            examples, tokens = self._everywhere(self.sums.data_groups)
        if examples == 0:
            raise RuntimeError(
                "DiagonalFisher.finalize: no example was seen; call update(batch) first"
            )
        if tokens == 0:
            raise RuntimeError(
                f"DiagonalFisher.finalize: none of {examples} examples has a prediction that "
                "counts, so that all would be 0; give examples of two tokens or more, with labels "
                "other than -100 and an attention_mask that is not 0"
            )
        count = 1
        if normalize == "mean":
            count = max(1, tokens if self.unit == "token" else examples)
        metadata = {
            **self._facts(),
            "examples": examples,
            "tokens": tokens,
            "normalize": normalize,
            "storage": "fp32",
        }
        if self.batches > 1:
            metadata["relative_error"] = self.relative_error()
        return self._estimate(count, metadata, storage)

    def _estimate(self, count: int, metadata: dict[str, Any], storage: str) -> Any:
        """The sums over `count`, with what is known of them."""
        estimate = FisherEstimate(self.sums.over(count), metadata)
        return estimate if storage == "fp32" else estimate.to(storage)

    def _facts(self) -> dict[str, Any]:
        """What tells one estimation from another."""
        return {
            "estimator": "diagonal_fisher",
            "labels": self.labels,
            "unit": self.unit,
            "mc_samples": self.mc_samples,
            "tied": self.tied,
            "lora": self.lora,
            "shift": self.task.shift,
            "likelihood": self.task.likelihood,
            "fallback": self.fallback,
            "model": type(self.model).__name__,
            "model_hash": self._hash,
            "fasttax": __version__,
            "torch": torch.__version__,
        }

    # --- across a crash ---------------------------------------------------------------------------

    def checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Writes sums, counts and the generator's state.

        `resume` continues from there to the same bits. A path for each rank.
        """
        self._check_whole("checkpoint")
        tensors = self.sums.tensors()
        tensors |= {f"error.{k}": t for k, t in self.error.state().items()}
        tensors["generator"] = self.generator.get_state()
        counts: dict[str, Any] = {
            "examples": self.examples,
            "tokens": self.tokens,
            "batches": self.batches,
        }
        count, hashed = self.hashed
        if count == self.batches:
            counts["batches_hash"] = hashed
        files.write(path, "DiagonalFisher", tensors, {**self._facts(), **counts})

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Takes up what `checkpoint` wrote, for the same model and options.

        Raises:
            ValueError: the file is of another estimation; the differences are listed.
        """
        tensors, metadata = files.read(path, "DiagonalFisher")
        differences = differing(self._facts(), self.sums.tensors(), metadata, tensors)
        if differences:
            raise ValueError(
                f"DiagonalFisher.resume: {os.fspath(path)} was written by another estimation:\n  "
                + "\n  ".join(differences[:20])
                + "\ndelete the file to begin anew, or give the model and options that wrote it"
            )
        wrong = lacking(metadata, tensors, self.error.state())
        if wrong:
            raise ValueError(
                f"DiagonalFisher.resume: {os.fspath(path)} has no whole {wrong}; delete the file "
                "to begin anew"
            )
        self.generator.set_state(tensors["generator"])
        self.error.restore({k: tensors[f"error.{k}"] for k in self.error.state()})
        for n, t in self.sums.tensors().items():
            t.copy_(tensors[n])
        self.examples, self.tokens = metadata["examples"], metadata["tokens"]
        self.batches = metadata["batches"]
        self.hashed = self.batches, metadata.get("batches_hash", "")
