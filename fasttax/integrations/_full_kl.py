"""beta * mean KL(policy, reference) in the loss of somebody else's trainer.

The KL is made of what the trainer's own forward computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttax._base import checks
from fasttax._base.choices import KlKind
from fasttax._base.handle import Handle
from fasttax._base.scalars import number_on
from fasttax.integrations import _kl_sequence as sequence
from fasttax.integrations._heads import backbones, logits_of
from fasttax.integrations._kl_cached import CachedReference
from fasttax.integrations._kl_checks import GENERATING, OP, check_served, is_a
from fasttax.integrations._kl_events import Evaluation, KLEvents
from fasttax.integrations._kl_forward import (
    Forward,
    Hook,
    by_name,
    counted,
    loss_is_unshifted,
    of_completions,
    shared,
)
from fasttax.integrations._kl_reference import Reference, RefModel, loaded, reference_of
from fasttax.integrations._kl_sums import Asker, ModelReference, Policy, Rows
from fasttax.integrations._models import causal_lm
from fasttax.integrations._replay import ReplayOptions, add_replay
from fasttax.integrations._trainer import add_callback, refuse_deepspeed
from fasttax.integrations.control import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.kl.call import KINDS

# GRPO losses that divide by the tokens of the whole accumulation window
TOKEN_LOSSES = ("cispo", "dapo", "vespo")


class FullKL(Handle):
    """Adds beta * KL(policy, reference) to a trainer's loss, exact over the vocabulary.

    The KL is averaged over the tokens that the trainer's loss counts. The policy's hidden states
    (or logits, where the model makes them anyway) are those of the trainer's own forward: there is
    no second one. The reference is called once a batch, without a graph, with what the trainer
    gave the policy (a prompt that PEFT puts in front is the policy's alone); its hidden states are
    kept while the trainer goes over the batch again (GRPO, RLOO: num_iterations > 1). `undo()`
    takes everything back.

    Heads are multiplied in the trainer's precision: under bf16=True in bfloat16, of float32 weights
    too, whose gradients are float32.

    Hidden states stand for logits only where the head on them has been seen to give the model's own
    logits: at the first forward, and for the policy at each step that is logged. Where it does not
    (layers before the last matrix, an adapter on it, columns cut off), both models' own logits are
    taken, for which a policy that made none is called once more.

    Works in GRPO (where it takes the place of k3: the trainer's beta must be 0), RLOO, DPO, KTO,
    SFT and transformers' own Trainer. Under accumulation it is the mean over the window's tokens
    where the trainer's own loss is one (num_items_in_batch; GRPO's dapo, cispo and vespo), else the
    mean of the micro-batches' means.

    Evaluation losses stay the trainer's own. `evaluate()` returns and logs `eval_kl/<kind>` beside
    them, the mean KL over the tokens that they count.

    Args:
        trainer: one of those.
        ref_model: a causal language model with the policy's vocabulary (moved to the policy's
            device; run in eval mode and without a graph); None takes the trainer's own reference
            (`trainer.ref_model`, or under PEFT the model without its adapter); a TopKReference or
            the path of one needs no model in memory (not in GRPO and RLOO, whose sequences are
            new).
        beta: the coefficient, >= 0 (at 0 the KL is logged alone), or an `AdaptiveKL`, which every
            optimizer step updates with the mean over all ranks.
        kind: "policy_ref", "ref_policy", "jsd" or "renyi", as in `token_kl`.
        temperature: of both distributions; None is the trainer's sampling temperature in GRPO and
            RLOO, else 1. A TopKReference of fewer than all tokens must have been made at it.
        jsd_beta: the reference's share of the mixture in "jsd", the order in "renyi".
        estimator: "token" differentiates each token's KL where the sequences stand. In GRPO and
            RLOO, whose sequences are the policy's own samples, that is a part of the gradient of
            the sequences' KL alone (a smaller one the further the policy has moved): "sequence"
            adds the other, REINFORCE on the KL of the tokens to come (Tang & Munos 2025,
            arXiv:2506.09477), at the price of the log-probs' GEMMs. Value, divisor and log are the
            same. It has no baseline, so more variance; samples of older weights are reweighed by
            the ratio of the prefix (GRPO) or refused (RLOO), and sampling is taken to be from the
            policy itself (top_p, top_k and min_p off).
        replay: general text beside the trainer's own, as in `integrations.transformers.attach`: a
            loader, or {"loader": ..., "kind": "lm" | "kl", "weight": ..., "every": ...}. Without a
            "ref_model" of its own kind "kl" takes the reference from here.
        evaluate: measure the KL in `evaluate()` too, at the price of the reference's forward.

    Logs `kl/<kind>`, the mean over the tokens since the last log; `kl/policy_ref`, `kl/ref_policy`
    and `entropy` (where the trainer has none of its own) over the tokens of the step that is
    logged; `kl/beta` under an AdaptiveKL. A TopKReference knows its `kind` alone.

    Raises:
        ValueError, TypeError: an argument does not fit, as a reference of another vocabulary; GRPO
            with beta != 0; PPO and Reward; DeepSpeed's ZeRO-3; a second FullKL on one trainer; in
            the first step, a loss that calls the model with embeddings or a cache that the policy
            has computed.
        RuntimeError: in training, when the policy's forward was not seen, so that the KL would
            silently be missing.

    Example:
        >>> from fasttax.integrations.trl import FullKL
        >>> with FullKL(trainer, base, beta=0.1):
        ...     result = trainer.train()
    """

    def __init__(
        self,
        trainer: Any,
        ref_model: RefModel,
        beta: float | AdaptiveKL,
        kind: KlKind = "policy_ref",
        *,
        temperature: float | None = None,
        jsd_beta: float = 0.5,
        estimator: str = "token",
        replay: Any = None,
        evaluate: bool = True,
    ) -> None:
        super().__init__()
        check_served(trainer)
        self.kind = checks.choice(OP, "kind", kind, KINDS)
        self.control = beta if isinstance(beta, AdaptiveKL) else None
        self._beta = 0.0 if isinstance(beta, AdaptiveKL) else checks.number(OP, "beta", beta, low=0)
        if temperature is None:
            temperature = trainer.temperature if is_a(trainer, *GENERATING) else 1.0
        self.options: dict[str, Any] = {
            "kind": kind,
            "beta": KINDS[kind].check_beta(OP, "jsd_beta", jsd_beta),
            "temperature": checks.number(OP, "temperature", temperature, low=0, open_low=True),
        }
        self.estimator = checks.choice(OP, "estimator", estimator, sequence.ESTIMATORS)
        if estimator == "sequence":
            generates, rloo = is_a(trainer, *GENERATING), is_a(trainer, "RLOOTrainer")
            sequence.check(OP, trainer, self.options, generates=generates, rloo=rloo)
        self.trainer = trainer
        self._ref_model = loaded(ref_model)
        if replay is not None:
            refuse_deepspeed(OP, trainer, "replay")
        more = None if replay is None else ReplayOptions.of(OP, replay, self._ref_model)
        self._hooks: list[RemovableHandle] = []
        self.events = KLEvents(trainer, self.control)
        self._inputs: dict[str, Any] | None = None  # the batch whose loss is being computed
        self._num_items: Any = None  # that its loss is given
        self._states: dict[nn.Module, Any] = {}  # outputs of the policy's backbones
        self._terms: list[_Term] = []  # of the batch's forwards
        self._evaluation: Evaluation | None = None
        self._measures = False  # the loss that is being computed is an evaluation's
        with self.or_undone():
            self._install(more)
            if evaluate:
                self._evaluation = Evaluation(self, trainer, kind)

    def __repr__(self) -> str:
        ended = "" if self.active else ", undone"
        name = type(self.trainer).__name__
        return f"FullKL({name}, {self.ref}, beta={self.beta:g}, kind={self.kind!r}{ended})"

    @property
    def beta(self) -> float:
        """The coefficient, an AdaptiveKL's as it is at present."""
        return self._beta if self.control is None else self.control.beta

    def _install(self, replay: ReplayOptions | None) -> None:
        trainer = self.trainer
        self.on_undo(self._unwatch)
        self._watch()
        self.replace(trainer, "compute_loss", self._with_kl(trainer.compute_loss), "compute_loss")
        add_callback(self, trainer, self.events)
        if replay is not None:
            add_replay(self, trainer, replay)

    # --- seeing the policy's forward --------------------------------------------------------------

    def _watch(self) -> None:
        """Looks at the trainer's model of the moment; Trainer(model_init=...) makes new ones."""
        self._unwatch()
        trainer = self.trainer
        lm = causal_lm(OP, "trainer.model", trainer.model)
        self.policy = Policy(lm, trainer.accelerator.autocast)
        self.ref = _reference_of(trainer, lm, self._ref_model, self.options["temperature"])
        self._shifted: bool | None = None  # until a loss of the model's own has told
        for module, seen in (
            *((module, self._see_backbone) for module in backbones(lm)),
            (trainer.model, self._see_model),
        ):
            self._hooks.append(module.register_forward_hook(Hook(seen), with_kwargs=True))

    def _unwatch(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _see_backbone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._inputs is not None and (self._measures or torch.is_grad_enabled()):
            self._states[module] = output

    def _see_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Runs as the policy's forward ends, where FSDP2's head is still whole."""
        if self._inputs is None or not (self._measures or torch.is_grad_enabled()):
            return
        given = by_name(module, self.policy.model, args, kwargs)
        batch, self._inputs = self._inputs, None  # what is called from here on is no new forward
        states, self._states = self._states, {}
        if self._measures:
            if _is_of_others(given, batch):
                self._inputs = batch
            else:
                self._measure(self._forward(module, given, batch, states, output), given)
            return
        try:
            with torch.set_grad_enabled(self.beta > 0):
                self._terms.append(
                    self._term(self._forward(module, given, batch, states, output), batch)
                )
        finally:
            self._inputs = batch

    def _forward(
        self,
        module: nn.Module,
        given: dict[str, Any],
        batch: dict[str, Any],
        states: dict[nn.Module, Any],
        output: Any,
    ) -> Forward:
        labels, logits = given.get("labels", batch.get("labels")), logits_of(output)
        if labels is None:
            labels = of_completions(given.get("input_ids"), batch)
        shifted = "shift_labels" not in given and self._labels_are_shifted(given, output)
        labels = given.get("shift_labels", labels)
        inputs = shared(given)
        if not shifted and "labels" in given and "decoder_input_ids" not in given:
            inputs["labels"] = labels  # of which an encoder-decoder makes the decoder's inputs
        mask = counted(labels, shifted, list(batch), batch.get("tool_mask"))
        if logits is not None and logits.shape[1] < mask.shape[1]:
            logits = None  # of some positions
        if logits is not None and logits.shape[0] != mask.shape[0]:
            raise checks.fail(
                OP,
                "trainer",
                f"logits of the {mask.shape[0]} rows of labels",
                logits,
                "use a model that gives one prediction for each label",
            )

        def again() -> Any:
            everything = {k: v for k, v in given.items() if k not in ("fused_lm_head", "labels")}
            everything.pop("logits_to_keep", None)
            return module.forward(**everything)

        return Forward(
            inputs=inputs,
            states=states,
            logits=logits,
            mask=mask,
            batch=batch.get("completion_ids"),
            shifted=shifted,
            again=again,
        )

    def _labels_are_shifted(self, given: dict[str, Any], output: Any) -> bool:
        """Whether position t predicts the label t + 1, by the loss that the model returned."""
        if self._shifted is None:
            if getattr(self.policy.model.config, "is_encoder_decoder", False):
                self._shifted = False
                return False
            logits, labels = logits_of(output), given.get("labels")
            if logits is None or not isinstance(labels, Tensor) or labels.dim() != 2:
                return True
            if logits.shape[1] < labels.shape[1] or not bool((labels != -100).any()):
                return True
            loss = getattr(output, "loss", None)
            self._shifted = not loss_is_unshifted(
                logits, labels, loss, given.get("num_items_in_batch")
            )
        return self._shifted

    def _term(self, forward: Forward, batch: dict[str, Any]) -> _Term:
        """A forward's KL, as it is in the loss where it is the batch's only one."""
        log, tokens = self.events.log_is_due(), forward.mask.sum()
        divisor = self._divisor(batch, tokens)
        scale = (self.beta or 1.0) / divisor
        with torch.autocast(forward.mask.device.type, enabled=False):
            rows = self.policy.rows(forward, log)
            if self.estimator == "sequence":
                total, values = self._of_sequences(forward, rows, batch, log)
                scaled = total * scale
            else:
                scaled, values = self.ref.sums(forward, rows, self.options, scale, log)
        self.events.record(values, tokens)
        return _Term(scaled, divisor, values[self.kind], tokens)

    def _measure(self, forward: Forward, given: dict[str, Any]) -> None:
        """Takes the KL of an evaluation's forward."""
        assert self._evaluation is not None
        forward = replace(forward, mask=self._evaluation.own(forward.mask, given))
        tokens = forward.mask.sum()
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            rows = self.policy.rows(forward, False)
            try:
                kl = self.ref.sums(forward, rows, self.options, 1.0, False)[1][self.kind]
            except KeyError:  # of a file, which has the sequences of training
                kl = None
        self._evaluation.add(kl, tokens)

    def _divisor(self, batch: dict[str, Any], tokens: Tensor) -> Tensor:
        """By which the sum over the tokens of a batch's forwards is a mean as the trainer's is."""
        count = tokens.clamp(min=1)
        share = _share(batch, count, self._shifted is not False)
        divisor: Tensor = _divisor(self.trainer, batch, count, self._num_items, share)
        return divisor

    def _of_sequences(
        self, forward: Forward, rows: Rows, batch: dict[str, Any], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum that has the gradient of the sequences' KL, and the sums for the log."""
        assert isinstance(self.ref, ModelReference)
        kl, values = self.ref.by_token(forward, rows, self.options, log)
        ids = sequence.sampled(forward.inputs["input_ids"], forward.mask)
        logp = self.policy.logp(rows, ids, self.options["temperature"], "none")
        old = sequence.old_logp(batch, forward.mask)
        return sequence.sequence_sum(kl, logp, old, forward.mask), values

    # --- measuring it in an evaluation ------------------------------------------------------------

    def _evaluating(
        self, compute_loss: Callable[..., Any], model: Any, inputs: Any, options: dict[str, Any]
    ) -> Any:
        """A loss without the KL, which is taken of the policy's first forward on the batch.

        What a loss calls after that has no gradient either, and may be of the trainer's reference.
        """
        if self._evaluation is None or self._evaluation.sums is None:
            return compute_loss(model, inputs, **options)
        self._inputs, self._states, self._measures = dict(inputs), {}, True
        try:
            return compute_loss(model, inputs, **options)
        finally:
            self._inputs, self._states, self._measures = None, {}, False

    # --- adding it to the loss --------------------------------------------------------------------

    def _with_kl(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def with_kl(
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            if not self.trainer.model.training or not torch.is_grad_enabled():
                return self._evaluating(compute_loss, model, inputs, options)
            made = getattr(self.trainer, "model_init", None) is not None
            if made and causal_lm(OP, "trainer.model", self.trainer.model) is not self.policy.model:
                self._watch()
            batch = dict(inputs)
            self._inputs, self._num_items = batch, num_items_in_batch
            self._states, self._terms = {}, []
            self.events.asked = True
            try:
                result = compute_loss(model, inputs, **options)
            finally:
                self._inputs, self._states = None, {}
            terms, self._terms = self._terms, []
            if not terms:
                raise RuntimeError(
                    "FullKL: the policy's forward was not seen while the trainer computed its "
                    "loss, so the KL would be missing; make FullKL on the trainer that trains, "
                    "after it is built"
                )
            tokens = _total(term.tokens for term in terms)
            self.events.steer(_total(term.kl for term in terms), tokens)
            if self.beta == 0:  # for the log alone: 0 times an infinite KL would be NaN
                return result
            divisor = self._divisor(batch, tokens)
            # of one forward the quotient is 1: its gradients are not gone over again
            kl = _total(term.scaled * (term.divisor / divisor) for term in terms)
            if not return_outputs:
                return result + kl.to(result.dtype)
            loss, *others = result
            return (loss + kl.to(loss.dtype), *others)

        with_kl.fasttax_full_kl = True  # type: ignore[attr-defined]
        return with_kl


def _is_of_others(given: dict[str, Any], batch: dict[str, Any]) -> bool:
    """Whether a forward is of other sequences than the batch's own, as KTO's KL_input_ids."""
    ids = given.get("input_ids")
    return any(ids is value for name, value in batch.items() if name != "input_ids")


class _Term(NamedTuple):
    """What a forward adds to the loss."""

    scaled: Tensor  # beta (1 where that is 0) times the sum of its KL, over the divisor
    divisor: Tensor  # where this is the batch's only forward
    kl: Tensor  # the sum, without a graph
    tokens: Tensor


def _total(values: Iterable[Tensor]) -> Tensor:
    """Of at least one."""
    first, *others = values
    return sum(others, start=first)


def _reference_of(trainer: Any, policy: Any, ref_model: Any, temperature: float) -> Reference:
    """What `ref_model` stands for."""
    asker = Asker(OP)
    if isinstance(ref_model, TopKReference) and is_a(trainer, *GENERATING):
        raise checks.fail(
            *asker,
            "a model: the sequences of GRPO and RLOO are new at every step",
            "a cached reference",
        )
    keep = getattr(trainer, "num_iterations", 1) > 1
    reference = reference_of(asker, trainer, policy, ref_model, temperature, keep=keep)
    if isinstance(reference, CachedReference):
        reference.check_packing(trainer)
    return reference


def _share(batch: dict[str, Any], tokens: Tensor, shifted: bool) -> Any:
    """Weight of a forward where a loss has several over the same tokens, each of which adds its KL.

    The batch's tokens over those of all forwards, at most 1: forwards over its parts are a whole.
    """
    labels = batch.get("labels", batch.get("completion_mask"))
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 1.0
    if "labels" in batch:
        real = (labels[:, 1:] if shifted else labels) != -100
    else:
        real = labels != 0
        if isinstance(tools := batch.get("tool_mask"), Tensor):
            real = real & (tools != 0)
    return (real.sum().clamp(min=1) / tokens).clamp(max=1.0)


def _divisor(
    trainer: Any, inputs: dict[str, Any], tokens: Tensor, num_items: Any, share: Any
) -> Any:
    """What makes the sum over a micro-batch's tokens the trainer's kind of mean.

    Args:
        trainer: whose loss the KL is added to.
        inputs: its batch.
        tokens: of the micro-batch's forwards, at least 1.
        num_items: the tokens of the accumulation window over all ranks, where Trainer counts them.
        share: the batch's tokens in `tokens`, as `_share` has it.
    """
    steps = trainer.current_gradient_accumulation_steps
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.19
    if scaled is None:
        # as Trainer.training_step decides
        takes_items = trainer.model_accepts_loss_kwargs and num_items is not None
        scaled = takes_items or trainer.compute_loss_func is not None
        if scaled and num_items is not None:
            items = number_on(num_items, tokens.device).clamp(min=1) / share
            if not trainer.args.average_tokens_across_devices:
                return items
            return items / (trainer.accelerator.num_processes // trainer.get_tp_size())
    if not scaled:
        return tokens  # training_step divides by the micro-batches
    of_window = getattr(trainer, "loss_type", None) in TOKEN_LOSSES
    if of_window and "num_items_in_batch" in inputs:
        # the generation batch's tokens, over all ranks
        items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        return items * steps / trainer.args.steps_per_generation / share
    return tokens * steps
