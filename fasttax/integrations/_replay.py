"""General text beside the trainer's own: its loss, or the KL to a reference on it, at every step.

The gradient is put into p.grad as a step begins, where the micro-batches' are added to it: once a
step whatever the accumulation, part of the gradient that is clipped, averaged by DDP with the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.fisher import batches
from fasttax.fisher.task import Task, takes
from fasttax.integrations._fsdp1 import refuse_fsdp1
from fasttax.integrations._heads import logits_of, vocabulary, watched
from fasttax.integrations._kl_forward import Forward
from fasttax.integrations._kl_reference import Reference, RefModel, loaded, reference_of
from fasttax.integrations._kl_sums import Asker, Policy
from fasttax.integrations._models import causal_lm
from fasttax.integrations._trainer import add_callback, loss_scale, publish

KINDS = ("lm", "kl")
KEYS = ("loader", "kind", "weight", "every", "ref_model")
KL: dict[str, Any] = {"kind": "policy_ref", "beta": 0.5, "temperature": 1.0}  # token_kl's defaults
END = object()


@dataclass(frozen=True)
class ReplayOptions:
    """A `replay` argument, checked.

    Attributes:
        op: that was given it.
        batches: what is read, again and again.
        kind: one of KINDS.
        weight: of the loss.
        every: how many steps go by from one replay to the next.
        ref_model: as FullKL's, for kind "kl".
    """

    op: str
    batches: Batches
    kind: str
    weight: float
    every: int
    ref_model: RefModel

    @staticmethod
    def of(op: str, replay: Any, ref_model: RefModel = None) -> ReplayOptions:
        """Of a loader, or of a mapping with a loader and what is said of it.

        Args:
            op: for errors.
            replay: the argument.
            ref_model: where the mapping has none.

        Raises:
            ValueError, TypeError: a key or a value does not fit.
        """
        given = dict(replay) if isinstance(replay, Mapping) else {"loader": replay}
        checks.keys(op, "replay", given, KEYS)
        if "loader" not in given:
            raise checks.fail(
                op,
                "replay",
                "a loader of batches, or a mapping with one: {'loader': batches, 'kind': 'lm'}",
                f"the keys {sorted(given)}",
            )
        kind = checks.choice(op, "replay['kind']", given.get("kind", "lm"), KINDS)
        own = given.get("ref_model")
        if own is not None and kind == "lm":
            raise checks.fail(
                op,
                "replay['ref_model']",
                "none with kind 'lm', whose loss is the text's own",
                own,
                "pass kind='kl', or leave ref_model out",
            )
        return ReplayOptions(
            op,
            Batches(op, given["loader"]),
            kind,
            checks.positive(op, "replay['weight']", given.get("weight", 1.0)),
            checks.count(op, "replay['every']", given.get("every", 1)),
            loaded(ref_model if own is None else own),
        )


class Batches:
    """The batches of a loader without an end: it begins anew where it is exhausted.

    Args:
        op: for errors.
        loader: anything that can be iterated over again and again.
        argument: its name, for errors.

    Raises:
        ValueError, TypeError: it is empty, or holds no batches.
    """

    def __init__(self, op: str, loader: Any, argument: str = "replay['loader']") -> None:
        self.op, self.loader, self.argument = op, loader, argument
        self._iterator: Iterator[Any] | None = None
        self._passes = 0
        wrong = isinstance(loader, (str, bytes, Mapping, Tensor))
        if wrong or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise self._error("an iterable of batches, as a DataLoader or a list", loader)
        if operator.length_hint(loader, 1) == 0:
            raise self._error("at least one batch", "an empty loader", error=ValueError)

    def _error(self, expected: str, got: Any, way_out: str = "", error: Any = TypeError) -> Any:
        return checks.fail(self.op, self.argument, expected, got, way_out, error)

    def take(self) -> Any:
        """The next batch.

        Raises:
            ValueError: the loader has none, or can't be read a second time.
        """
        for _ in range(2):
            if self._iterator is None:
                if self._passes and hasattr(self.loader, "set_epoch"):
                    self.loader.set_epoch(self._passes)
                self._iterator = iter(self.loader)
                self._passes += 1
            batch = next(self._iterator, END)
            if batch is not END:
                return batch
            self._iterator = None
        if isinstance(self.loader, Iterator):
            raise self._error(
                "a loader that can be read again",
                "an iterator that is used up",
                "pass a DataLoader or a list of batches; list(iterator) keeps them",
                ValueError,
            )
        raise self._error("at least one batch", "an empty loader", error=ValueError)

    def close(self) -> None:
        """Lets go of the pass that is under way, with its workers."""
        self._iterator = None


class Replay(TrainerCallback):
    """Adds weight * the mean loss of a batch of general text to the gradient of every k-th step.

    Args:
        trainer: a transformers Trainer, or one of TRL's.
        options: what is read, and what its loss is.

    Raises:
        ValueError, TypeError: no causal language model, or a reference that does not fit it.
    """

    def __init__(self, trainer: Any, options: ReplayOptions) -> None:
        self.trainer, self.options = trainer, options
        self._primed = False
        self._since_log: Tensor | None = None  # (sum, tokens)
        self._recheck = False  # the head, which weights that are trained may have come apart from
        self._watch()

    def _watch(self) -> None:
        """Looks at the trainer's model of the moment; Trainer(model_init=...) makes new ones."""
        trainer, options = self.trainer, self.options
        lm = causal_lm(options.op, "trainer.model", trainer.model)
        self.task = Task.of(lm, "softmax", None)
        if self.task.in_place:
            raise checks.fail(
                options.op,
                "trainer.model",
                "a model that predicts the next token, for replay",
                f"{type(lm).__name__}, whose labels are its own tokens'",
                "leave replay out",
            )
        self.policy = Policy(lm, trainer.accelerator.autocast)
        self.ref: Reference | None = None
        if options.kind == "kl":
            asker = Asker(options.op, "replay['ref_model']")
            self.ref = reference_of(asker, trainer, lm, options.ref_model, KL["temperature"])

    # --- the gradient -----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on where a resumed run was.

        Raises:
            ValueError: FSDP1.
        """
        self._primed, self._since_log = False, None
        refuse_fsdp1(self.options.op, "replay", self.trainer.model_wrapped)
        if not args.ignore_data_skip:
            for _ in range(state.global_step // self.options.every):
                self.options.batches.take()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of every k-th step's batch.

        A window that was broken off keeps its gradient, and with it this one.
        """
        if self._primed or (state.global_step + 1) % self.options.every:
            return
        if causal_lm(self.options.op, "trainer.model", self.trainer.model) is not self.policy.model:
            self._watch()
        modes = [(m, m.training) for m in self.trainer.model.modules()]
        self.trainer.model.train()
        try:
            total, tokens = self.summed(self.options.batches.take())
        finally:
            for module, mode in modes:
                module.training = mode
        accelerator = self.trainer.accelerator
        # gradients are averaged over the ranks: this is the mean over the tokens of all
        everywhere = accelerator.reduce(tokens.detach().clone(), reduction="sum").clamp(min=1)
        scale = self.options.weight * accelerator.num_processes / everywhere
        (total * (scale * loss_scale(kwargs.get("optimizer"), total.device))).backward()
        self._primed = True
        pair = torch.stack((total.detach().float(), tokens.float()))
        self._since_log = pair if self._since_log is None else self._since_log + pair

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is used."""
        self._primed = False

    def summed(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's tokens, with its graph, and their number."""
        model, lm = self.trainer.model, self.policy.model
        device = self.trainer.accelerator.device
        positions = takes(lm, "position_ids")
        read = batches.read(
            self.options.op, batch, device, self.task, vocabulary(lm), positions=positions
        )
        shape = read.counted.shape
        if len(shape) != 2 or shape != read.targets.shape or shape[1] < 2:
            raise checks.fail(
                self.options.op,
                self.options.batches.argument,
                "batches with input_ids (B, T) of 2 tokens or more, and labels (B, T) or none",
                f"labels {tuple(read.targets.shape)}",
            )
        inputs = dict(read.inputs)
        if takes(lm, "use_cache"):
            inputs["use_cache"] = False
        forward = self._forward(model, inputs, read)
        with torch.autocast(device.type, enabled=False):
            rows = self.policy.rows(forward, self._recheck)
            self._recheck = False
            if self.ref is None:
                total = -self.policy.logp(rows, read.targets[read.counted], 1.0, "sum")
            else:
                total, _ = self.ref.sums(forward, rows, KL, 1.0, False)
        return total, read.counted.sum()

    def _forward(self, model: Any, inputs: dict[str, Any], read: batches.Batch) -> Forward:
        """The policy's, with logits of all positions only where its head is not proven."""
        shortcut, names = self.policy.shortcut, frozenset(inputs)
        sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        short = shortcut.possible() and not sharded and not self.task.encoder_decoder
        short = short and not (shortcut.known(names) and shortcut.way(names) is None)
        keep = {"logits_to_keep": 1} if short else {}
        autocast = self.policy.autocast

        def whole() -> Any:
            with autocast():
                return model(**inputs)

        with watched(shortcut.modules) as states, autocast():
            output = model(**inputs, **keep)
        logits = None if short else logits_of(output)
        return Forward(
            inputs=inputs,
            states=states,
            logits=logits,
            mask=read.counted,
            batch=None,
            shifted=not self.task.encoder_decoder,
            again=whole,
        )

    # --- the log ----------------------------------------------------------------------------------

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Publishes the mean over all ranks' tokens since the last training log."""
        if logs is None or "loss" not in logs or self._since_log is None:
            return
        sums, self._since_log, self._recheck = self._since_log, None, True
        total, tokens = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        publish(state, logs, {f"replay/{self.options.kind}": total / max(tokens, 1.0)})


def add_replay(handle: Handle, trainer: Any, options: ReplayOptions) -> None:
    """Puts a replay into a trainer until the handle undoes it.

    Raises:
        ValueError, TypeError: as `Replay`; the trainer has one of this kind already.
    """
    there = (c for c in trainer.callback_handler.callbacks if isinstance(c, Replay))
    if any(c.options.kind == options.kind for c in there):
        raise checks.fail(
            options.op,
            "replay",
            f"a trainer without a replay of kind {options.kind!r}",
            "one that has it already",
            "undo() that one first; a loader may hold both texts",
        )
    callback = Replay(trainer, options)
    handle.on_undo(options.batches.close)
    add_callback(handle, trainer, callback)
