"""beta * mean KL(policy, reference) in the loss of somebody else's trainer, from what its own
forward computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from transformers import TrainerCallback

from fasttax._base import checks
from fasttax.integrations._handle import Handle
from fasttax.integrations._models import Head, backbone, causal_lm, frozen, head, hidden_states
from fasttax.integrations.control import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import (
    add_callback,
    checkpoint_folder,
    publish,
    refuse_deepspeed,
    write_state,
)
from fasttax.kl.call import KINDS
from fasttax.kl.linear import linear_token_kl
from fasttax.kl.token_stats import token_stats
from fasttax.kl.topk import topk_kl

GENERATING = ("GRPOTrainer", "RLOOTrainer")
# GRPO losses that divide by the tokens of the whole accumulation window
TOKEN_LOSSES = (
    "cispo",
    "dapo",
    "vespo",
)
STATE_FILE = "fasttax_kl.json"
ROWS = 256  # tokens whose logits exist at a time, for a top-k reference and for the log


class FullKL(Handle):
    """Adds beta * KL(policy, reference), exact over the vocabulary, averaged over the tokens that
    the trainer's loss counts.

    The policy's hidden states (or logits, where the model makes them anyway) are those of the
    trainer's own forward: there is no second one. The reference runs once a batch, without a graph;
    its hidden states are kept while the trainer goes over the batch again (GRPO, RLOO:
    num_iterations > 1). `undo()` takes everything back.

    Works in GRPO (where it takes the place of k3: the trainer's beta must be 0), RLOO, DPO, KTO,
    SFT and transformers' own Trainer. Under accumulation it is the mean over the window's tokens
    where the trainer's own loss is one (num_items_in_batch; GRPO's dapo, cispo and vespo), else the
    mean of the micro-batches' means. Evaluation losses stay the trainer's own.

    Args:
        trainer: one of those.
        ref_model: a causal language model with the policy's vocabulary (moved to the policy's
            device; run in eval mode and without a graph); None takes the trainer's own reference
            (`trainer.ref_model`, or under PEFT the model without its adapter); a TopKReference or
            the path of one needs no model in memory (not in GRPO and RLOO, whose sequences are
            new).
        beta: the coefficient, >= 0, or an `AdaptiveKL`, which every optimizer step updates with the
            mean over all ranks.
        kind: "policy_ref", "ref_policy" or "jsd", as in `token_kl`.
        temperature: of both distributions; None is the trainer's sampling temperature in GRPO and
            RLOO, else 1.
        jsd_beta: the reference's share of the mixture in "jsd".

    Logs `kl/<kind>`, the mean over the tokens since the last log; `kl/policy_ref`, `kl/ref_policy`
    and `entropy` (where the trainer has none of its own) over the tokens of the step that is
    logged; `kl/beta` under an AdaptiveKL. A TopKReference knows its `kind` alone.

    Raises:
        ValueError, TypeError: an argument does not fit; GRPO with beta != 0; DeepSpeed; a second
            FullKL on one trainer.
        RuntimeError: in training, when the policy's forward was not seen, so that the KL would
            silently be missing.
    """

    def __init__(
        self,
        trainer: Any,
        ref_model: nn.Module | TopKReference | str | os.PathLike[str] | None,
        beta: float | AdaptiveKL,
        kind: str = "policy_ref",
        *,
        temperature: float | None = None,
        jsd_beta: float = 0.5,
    ) -> None:
        super().__init__()
        op = "FullKL"
        if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
            raise checks.fail(
                op, "trainer", "a transformers.Trainer or one of TRL's", trainer, error=TypeError
            )
        names = [c.__name__ for c in type(trainer).__mro__]
        generates = any(name in GENERATING for name in names)
        refuse_deepspeed(op, trainer.args, trainer.optimizer)
        if trainer.args.n_gpu > 1:
            raise checks.fail(
                op,
                "trainer",
                "one GPU a process",
                f"DataParallel over {trainer.args.n_gpu}",
                "launch with torchrun or accelerate",
            )
        if hasattr(trainer.compute_loss, "fasttax_full_kl"):
            raise checks.fail(
                op,
                "trainer",
                "one without a FullKL",
                "one that has it already",
                "undo() that one first",
            )
        if "GRPOTrainer" in names and trainer.beta != 0:
            raise checks.fail(
                op,
                "trainer",
                "GRPO with beta=0.0, whose k3 estimate this takes the place of",
                f"beta={trainer.beta:g}",
                "pass GRPOConfig(beta=0.0) and the coefficient here",
            )
        self.kind = checks.choice(op, "kind", kind, KINDS)
        self.control = beta if isinstance(beta, AdaptiveKL) else None
        self._beta = 0.0 if isinstance(beta, AdaptiveKL) else checks.number(op, "beta", beta, low=0)
        default = trainer.temperature if generates else 1.0
        temperature = checks.number(
            op, "temperature", default if temperature is None else temperature, low=0, open_low=True
        )
        self.options: dict[str, Any] = {
            "kind": kind,
            "beta": KINDS[self.kind].check_beta(op, "jsd_beta", jsd_beta),
            "temperature": temperature,
        }
        self.trainer = trainer
        self.policy = causal_lm(op, "trainer.model", trainer.model)
        self.ref = self._reference(ref_model, generates)
        self._kept: Any = (
            WeakIdKeyDictionary() if getattr(trainer, "num_iterations", 1) > 1 else None
        )
        self._inputs: dict[str, Any] | None = None  # the batch whose loss is being computed
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = (
            None  # the backbone's arguments and output
        )
        self._sum: Tensor | None = None
        self._count: Any = 0
        self._asked = False  # for a loss, in this step
        self._totals: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # by metric: sum and number of tokens since the last log
        self._window: list[Tensor] = []  # (sum, count) since the last step, for the controller
        self.replace(trainer, "compute_loss", self._with_kl(trainer.compute_loss), "compute_loss")
        hooks = (
            backbone(self.policy).register_forward_hook(self._see_backbone, with_kwargs=True),
            trainer.model.register_forward_hook(self._see_model, with_kwargs=True),
        )
        self._restore.extend(hook.remove for hook in hooks)
        add_callback(self, trainer, _Events(self))

    def __repr__(self) -> str:
        return f"FullKL({type(self.trainer).__name__}, {self.ref}, beta={self.beta:g}, kind={self.kind!r}{'' if self.active else ', undone'})"

    @property
    def beta(self) -> float:
        return self._beta if self.control is None else self.control.beta

    def _reference(self, ref_model: Any, generates: bool) -> _ModelReference | TopKReference:
        op, trainer = "FullKL", self.trainer
        if isinstance(ref_model, (str, os.PathLike)):
            ref_model = TopKReference.load(ref_model)
        if isinstance(ref_model, TopKReference):
            if generates:
                raise checks.fail(
                    op,
                    "ref_model",
                    "a model: the sequences of GRPO and RLOO are new at every step",
                    "a cached reference",
                )
            return ref_model
        if ref_model is None:
            ref_model = getattr(trainer, "ref_model", None)
        if ref_model is None:
            if not hasattr(trainer.model, "peft_config"):
                raise checks.fail(
                    op,
                    "ref_model",
                    "a model or a TopKReference",
                    "None, and the trainer has neither a reference nor an adapter",
                    "pass a frozen copy of the base model",
                )
            return _ModelReference(self.policy, trainer.accelerator.autocast, adapter=trainer.model)
        lm = causal_lm(
            op,
            "ref_model",
            trainer.accelerator.unwrap_model(ref_model)
            if isinstance(ref_model, nn.Module)
            else ref_model,
        )
        if lm is self.policy:
            raise checks.fail(
                op,
                "ref_model",
                "a model of its own",
                "the policy itself, from which it would never differ",
                "pass a frozen copy",
            )
        if not any(hasattr(p, "full_tensor") for p in lm.parameters()):
            lm.to(trainer.accelerator.device)
        return _ModelReference(lm, trainer.accelerator.autocast)

    # --- seeing the policy's forward -----------------------------------------------------------------------------------

    def _see_backbone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._inputs is not None and torch.is_grad_enabled():
            self._call = (args, kwargs, output)

    def _see_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Runs as the policy's forward ends, where FSDP2's head is still whole."""
        if self._inputs is None or self._call is None or not torch.is_grad_enabled():
            return
        call, self._call = self._call, None
        labels, T = (
            kwargs.get("labels", self._inputs.get("labels")),
            hidden_states(call[2]).shape[1],
        )
        if kwargs.get("shift_labels") is not None:
            mask = kwargs["shift_labels"] != -100
        elif labels is None:
            raise checks.fail(
                "FullKL",
                "trainer",
                "a batch with labels, by which the loss counts tokens",
                f"keys {sorted(map(str, self._inputs))}",
            )
        else:
            # prompt-learning PEFT puts virtual tokens in front
            mask = nn.functional.pad(labels[:, 1:] != -100, (T - labels.shape[1], 1))
        if (tools := self._inputs.get("tool_mask")) is not None:  # GRPO: tokens that a tool wrote
            mask = mask & nn.functional.pad(tools != 0, (T - 1 - tools.shape[1], 1), value=True)
        with torch.autocast(mask.device.type, enabled=False):
            values = self._values(call, getattr(output, "logits", None), mask)
        self._count = self._count + mask.sum()
        self._sum = values[self.kind] if self._sum is None else self._sum + values[self.kind]
        for name, value in values.items():
            key, nothing = name if name == "entropy" else f"kl/{name}", value.new_zeros(())
            total, count = self._totals.get(key, (nothing, nothing))
            self._totals[key] = (total + value.detach(), count + mask.sum())

    def _values(
        self, call: tuple[tuple[Any, ...], dict[str, Any], Any], logits: Tensor | None, mask: Tensor
    ) -> dict[str, Tensor]:
        """Sums over the tokens of `mask`, (B, T) by the position that predicts."""
        args, kwargs, output = call
        options, own = self.options, head(self.policy)
        if isinstance(self.ref, TopKReference):
            return {self.kind: self._topk(args, kwargs, hidden_states(output)[mask], own, mask)}
        if logits is not None and logits.shape[:-1] == mask.shape:
            wanted = (
                "kl_policy_ref",
                "kl_ref_policy",
                "entropy",
                *(() if KINDS[self.kind].row else ("kl",)),
            )
            stats = token_stats(
                logits[mask],
                self.ref.logits(args, kwargs, mask),
                outputs=wanted,
                reduction="sum",
                **options,
            )
            found = {
                "policy_ref": stats.kl_policy_ref,
                "ref_policy": stats.kl_ref_policy,
                "entropy": stats.entropy,
            }
            found.setdefault(self.kind, stats.kl)
            return {name: value for name, value in found.items() if value is not None}
        rows, ref = self._reference_rows(args, kwargs, mask)
        kl = linear_token_kl(
            hidden_states(output)[mask],
            own.weight,
            rows,
            ref.weight,
            bias=own.bias,
            ref_bias=ref.bias,
            softcap=own.softcap,
            ref_softcap=ref.softcap,
            logit_scale=own.logit_scale,
            ref_logit_scale=ref.logit_scale,
            reduction="sum",
            **options,
        )
        if not self._log_is_due():
            return {self.kind: kl}
        return {**self._looked_at(hidden_states(output)[mask], own, rows, ref), self.kind: kl}

    def _log_is_due(self) -> bool:
        args, state = self.trainer.args, self.trainer.state
        every = (
            max(1, int(state.logging_steps or args.logging_steps))
            if args.logging_strategy == "steps"
            else 0
        )
        return bool(every and (state.global_step + 1) % every == 0) or (
            args.logging_first_step and state.global_step == 0
        )

    @torch.no_grad()
    def _looked_at(
        self, hidden: Tensor, own: Head, ref_hidden: Tensor, ref: Head
    ) -> dict[str, Tensor]:
        """Both KLs and the entropy, for the log alone.

        Two more GEMMs, at the steps that are logged.
        """
        options = {
            **self.options,
            "kind": "policy_ref",
            "softcap": own.softcap,
            "ref_softcap": ref.softcap,
            "logit_scale": own.logit_scale,
            "ref_logit_scale": ref.logit_scale,
            "reduction": "sum",
        }
        sums = torch.zeros(3, device=hidden.device)
        for i in range(0, hidden.shape[0], ROWS):
            x, y = (
                nn.functional.linear(h[i : i + ROWS].to(m.weight.dtype), m.weight, m.bias).float()
                for h, m in ((hidden, own), (ref_hidden, ref))
            )
            stats = token_stats(
                x, y, outputs=("kl_policy_ref", "kl_ref_policy", "entropy"), **options
            )
            sums += torch.stack(
                [
                    s
                    for s in (stats.kl_policy_ref, stats.kl_ref_policy, stats.entropy)
                    if s is not None
                ]
            )
        return dict(zip(("policy_ref", "ref_policy", "entropy"), sums.unbind(), strict=True))

    def _reference_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Head]:
        assert isinstance(self.ref, _ModelReference)
        assert self._inputs is not None
        batch = self._inputs.get("completion_ids")
        if self._kept is None or batch is None:
            return self.ref.rows(args, kwargs, mask)
        if batch not in self._kept:
            self._kept[batch] = self.ref.rows(args, kwargs, mask)[0]
        return self._kept[batch], self.ref.head()

    def _topk(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, own: Head, mask: Tensor
    ) -> Tensor:
        assert isinstance(self.ref, TopKReference)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise checks.fail(
                "FullKL",
                "ref_model",
                "a model: the trainer passes embeddings, not ids",
                "a cached reference",
            )
        logp, top = self.ref.rows(ids, kwargs.get("attention_mask"))
        logp, top = logp[mask[:, :-1]], top[mask[:, :-1]]

        def part(
            h: Tensor, logp: Tensor, top: Tensor, weight: Tensor, bias: Tensor | None
        ) -> Tensor:
            logits = nn.functional.linear(h.to(weight.dtype), weight, bias)
            return topk_kl(
                logits,
                logp,
                top,
                **self.options,
                softcap=own.softcap,
                logit_scale=own.logit_scale,
                reduction="sum",
            )

        pieces = [
            checkpoint(
                part,
                *(x[i : i + ROWS] for x in (hidden, logp, top)),
                own.weight,
                own.bias,
                use_reentrant=False,
            )
            for i in range(0, hidden.shape[0], ROWS)
        ]
        return torch.stack(pieces).sum() if pieces else hidden.sum() * 0

    # --- adding it to the loss -----------------------------------------------------------------------------------------

    def _with_kl(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def with_kl(
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            if not self.trainer.model.training or not torch.is_grad_enabled():
                return compute_loss(
                    model,
                    inputs,
                    return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )
            self._inputs, self._call, self._sum, self._count = dict(inputs), None, None, 0
            self._asked = True
            try:
                result = compute_loss(
                    model,
                    inputs,
                    return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )
            finally:
                self._inputs = self._call = None
            kl, self._sum = self._sum, None
            if kl is None:
                raise RuntimeError(
                    "FullKL: the policy's forward was not seen while the trainer computed its "
                    "loss, so the KL would be missing; "
                    "make FullKL on the trainer that trains, after it is built"
                )
            if self.control is not None:
                self._window.append(torch.stack((kl.detach(), self._count.to(kl))))
            loss = result[0] if return_outputs else result
            loss = loss + self.beta * kl.to(loss.dtype) / self._denominator(
                inputs, num_items_in_batch
            )
            return (loss, *result[1:]) if return_outputs else loss

        with_kl.fasttax_full_kl = True  # type: ignore[attr-defined]
        return with_kl

    def _denominator(self, inputs: dict[str, Any], num_items: Any) -> Any:
        """Of the sum over the micro-batch's tokens: what makes it the trainer's kind of mean."""
        trainer, count = self.trainer, self._count.clamp(min=1)
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:  # as Trainer.training_step decides
            if num_items is None or not (
                trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
            ):
                return count
            ranks = (
                trainer.accelerator.num_processes // trainer.get_tp_size()
                if trainer.args.average_tokens_across_devices
                else 1
            )
            return torch.as_tensor(num_items, device=count.device).clamp(min=1) / ranks
        if not scaled:
            return count  # training_step divides by the micro-batches
        steps = trainer.current_gradient_accumulation_steps
        if (
            getattr(trainer, "loss_type", None) in TOKEN_LOSSES and "num_items_in_batch" in inputs
        ):  # of the generation batch
            return (
                inputs["num_items_in_batch"].clamp(min=1)
                / trainer.accelerator.num_processes
                * steps
                / trainer.args.steps_per_generation
            )
        return count * steps


class _ModelReference:
    """A frozen model, or the policy with its adapter switched off."""

    def __init__(self, model: nn.Module, autocast: Callable[[], Any], adapter: Any = None) -> None:
        self.model, self.autocast, self.adapter = model, autocast, adapter

    def __repr__(self) -> str:
        return f"reference {type(self.model).__name__}{'' if self.adapter is None else ' without its adapter'}"

    def _switch(self) -> Any:
        if self.adapter is None:
            return nullcontext()
        if (
            "ref" in self.adapter.peft_config
        ):  # TRL keeps a loaded adapter's first state under this name
            from trl.trainer.utils import use_adapter

            return use_adapter(self.adapter, adapter_name="ref")
        return self.adapter.disable_adapter()

    def rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Head]:
        """Hidden states of the tokens of `mask`, and the head."""
        with (
            frozen(self.model),
            self._switch(),
            self.autocast(),
        ):  # as the policy's own forward, or equal weights would differ
            return hidden_states(backbone(self.model)(*args, **kwargs))[mask], self.head()

    def head(self) -> Head:
        h = head(self.model)
        # the reference gets no gradient
        return replace(
            h, weight=h.weight.detach(), bias=None if h.bias is None else h.bias.detach()
        )

    def logits(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
        rows, h = self.rows(args, kwargs, mask)
        with torch.no_grad(), self.autocast():
            logits = nn.functional.linear(rows, h.weight, h.bias) * h.logit_scale
        return logits if h.softcap is None else h.softcap * torch.tanh(logits / h.softcap)


class _Events(TrainerCallback):
    def __init__(self, owner: FullKL) -> None:
        self.owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = checkpoint_folder(args, state) / STATE_FILE
        if self.owner.control is not None and path.is_file():
            self.owner.control.load_state_dict(json.loads(path.read_text()))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.owner.control is not None and state.is_world_process_zero:
            write_state(
                checkpoint_folder(args, state) / STATE_FILE, self.owner.control.state_dict()
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        owner = self.owner
        if not owner._asked:
            raise RuntimeError(
                f"FullKL: {type(owner.trainer).__name__} made a step without calling compute_loss, "
                "so the KL would be missing; "
                "it works in GRPO, RLOO, DPO, KTO, SFT and transformers' Trainer"
            )
        owner._asked = False
        if owner.control is not None and owner._window:
            total = owner.trainer.accelerator.reduce(
                torch.stack(owner._window).sum(0), reduction="sum"
            )
            owner._window.clear()
            owner.control.update(float(total[0] / total[1].clamp(min=1)))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        owner = self.owner
        if logs is None or "loss" not in logs or not owner._totals:
            return
        names = list(owner._totals)
        pairs = owner.trainer.accelerator.reduce(
            torch.stack([torch.stack(owner._totals[n]) for n in names]).float(), reduction="sum"
        )
        owner._totals.clear()
        values = {
            n: total / max(1.0, count)
            for n, (total, count) in zip(names, pairs.tolist(), strict=True)
            if n not in logs
        }
        publish(
            state,
            logs,
            values if owner.control is None else {**values, "kl/beta": owner.control.beta},
        )
