"""A forward of the policy as FullKL sees it: its inputs, its outputs, the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fasttax._base import checks
from fasttax.integrations._heads import arguments_of
from fasttax.kl.token_stats import token_stats

# arguments of a forward that say what to return, or are read by the loss or by PEFT's prompts
UNSHARED = (
    *("labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep"),
    *("num_logits_to_keep", "return_dict", "output_hidden_states", "output_attentions"),
    *("output_router_logits", "task_ids", "adapter_names"),
)
# what the policy itself has made of the batch
OF_THE_POLICY = (
    *("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values", "cache"),
    *("cache_params", "mems", "state", "past_buckets_states", "past"),
)
SAME_LOSS = 1e-3  # relative: a loss in the logits' dtype against one in float32


@dataclass(frozen=True)
class Forward:
    """A forward of the policy, and which tokens of it count.

    Attributes:
        inputs: of the model, as a reference is given them, too.
        states: the outputs of the policy's backbones, by module.
        logits: (B, T, V), where the policy made those of all positions.
        mask: (B, L), by the position that predicts; a prompt's T - L virtual tokens are in front.
        batch: the same object whenever the trainer goes over this batch again; None: never.
        shifted: whether position t predicts the label t + 1.
        again: another forward of the policy, with its gradient, that makes all logits.
    """

    inputs: Mapping[str, Any]
    states: Mapping[nn.Module, Any]
    logits: Tensor | None
    mask: Tensor
    batch: Tensor | None
    shifted: bool
    again: Callable[[], Any]

    @property
    def names(self) -> frozenset[str]:
        """Of the inputs."""
        return frozenset(self.inputs)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the mask's N tokens that count, in turn.

        On a GPU this is a forward's one host sync: how many there are. The heads' GEMMs would take
        the others too without it: 4 products of 2 x 4096 x 152k x 3584 operations for a prompt of
        4096 tokens, 18 ms at an H100's 990 TFLOP/s.
        """
        rows, columns = self.mask.nonzero().unbind(1)
        return rows, columns

    def counted(self, x: Tensor) -> Tensor:
        """The rows (N, ...) of x (B, T, ...) that count."""
        virtual = _virtual(self.mask, x.shape[1])
        rows, columns = self.places
        return x[rows, columns + virtual]


def in_front(mask: Tensor, T: int) -> Tensor:
    """A mask (B, L) with T - L positions in front that do not count."""
    return nn.functional.pad(mask, (_virtual(mask, T), 0))


def _virtual(mask: Tensor, T: int) -> int:
    """How many positions, of T, a prompt has in front of the mask's."""
    if mask.shape[1] > T:
        raise checks.fail(
            "FullKL",
            "trainer",
            f"a model that gives an output for each of the {mask.shape[1]} labels of a row",
            f"{T} outputs",
            "call the model without logits_to_keep",
        )
    return T - mask.shape[1]


# --- the model's arguments ------------------------------------------------------------------------


def by_name(
    model: nn.Module, inner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names, those that are None left out.

    Args:
        model: that was called.
        inner: the language model in it, whose names serve where the wrapper has none.
        args: by position.
        kwargs: by name.
    """
    names = arguments_of(model)
    if len(names) < len(args):
        names = arguments_of(inner)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None}


def shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the policy's arguments a reference can be given as well.

    Raises:
        ValueError: an argument was computed by the policy, so the reference would not be itself.
    """
    for name, value in given.items():
        trained = isinstance(value, Tensor) and value.requires_grad
        if name in OF_THE_POLICY or trained or hasattr(value, "get_seq_length"):
            raise checks.fail(
                "FullKL",
                "trainer",
                "a loss that calls the model with the batch alone (input_ids), which the reference "
                "reads by embeddings and states of its own",
                f"{name}, which the policy has computed",
                "pass input_ids and no embeds, cache or encoder outputs to the model; or, without "
                "FullKL, add fasttax.token_kl(logits, ref_logits) to the loss",
            )
    return {name: value for name, value in given.items() if name not in UNSHARED}


# --- the tokens that count ------------------------------------------------------------------------


def counted(labels: Any, shifted: bool, names: list[str], tools: Any = None) -> Tensor:
    """(B, L): the tokens that the trainer's loss counts, by the position that predicts.

    Args:
        labels: (B, L), or None where the loss has none.
        shifted: whether position t predicts labels[:, t + 1], or labels[:, t].
        names: keys of the batch, for the error.
        tools: GRPO's tool_mask (B, C) of the last C tokens, 0 for those that a tool wrote.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise checks.fail(
            "FullKL",
            "trainer",
            "a batch with labels (B, T), by which the loss counts tokens",
            f"keys {sorted(names)}" if labels is None else labels,
            "give the batch labels that are -100 where the loss counts nothing",
        )
    mask = labels != -100
    if shifted:
        mask = nn.functional.pad(mask[:, 1:], (0, 1))
    if tools is not None:
        before = mask.shape[1] - 1 - tools.shape[1]
        mask = mask & nn.functional.pad(tools != 0, (before, 1), value=True)
    return mask


def of_completions(ids: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Labels (B, L) of the completions' tokens, where a trainer gives the model none.

    So do TRL's before 1.15: DPO and KTO with a completion_mask over input_ids, GRPO and RLOO with
    one over the completion_ids that stand behind the prompts.

    Args:
        ids: input_ids as the model got them.
        batch: the trainer's.
    """
    mask = batch.get("completion_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if "completion_ids" in batch:
        prompt = batch.get("prompt_ids")
        if not isinstance(prompt, Tensor):
            return None
        mask = nn.functional.pad(mask, (prompt.shape[1], 0))
    if mask.shape != ids.shape:
        return None
    return torch.where(mask != 0, ids, -100)


@torch.no_grad()
def loss_is_unshifted(logits: Tensor, labels: Tensor, loss: Any, items: Any) -> bool:
    """Whether a model's loss takes labels[:, t] for what position t predicts.

    So do encoder-decoders, whose decoders of class ForCausalLM (Bart, TrOCR, Whisper) and masked
    models. Any other loss, one with more terms than the cross-entropy too, is taken for shifted.

    Args:
        logits: (B, T, V), T >= L.
        labels: (B, L).
        loss: the model's own, or None.
        items: num_items_in_batch as the model got it, or None.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool((labels != -100).any()):
        return False
    logits = logits[:, -labels.shape[1] :]
    if _is_loss_of(logits[:, :-1], labels[:, 1:], loss, items):
        return False
    return _is_loss_of(logits, labels, loss, items)


def _is_loss_of(logits: Tensor, labels: Tensor, loss: Tensor, items: Any) -> bool:
    real = labels != -100
    logp = token_stats(logits[real], ids=labels[real], outputs=("logp",)).logp
    assert logp is not None
    total = -logp.double().sum()
    divisors = [logp.numel()] if items is None else [logp.numel(), items]
    return any(
        bool((total / n - loss.double()).abs() <= SAME_LOSS * loss.double().abs()) for n in divisors
    )


# --- hooks that stay behind -----------------------------------------------------------------------


class Hook:
    """A forward hook that a copy or a pickle of its module does not take along, run uncompiled.

    A bound method would bring the trainer, its data and the reference into every deep copy of the
    policy, as those that callbacks keep for averaged weights. Traced with a compiled policy it
    would cut the model, and what is called in it, into two dozen graphs where two do.
    """

    def __init__(self, seen: Callable[..., None] | None = None) -> None:
        self.seen = None if seen is None else torch.compiler.disable(seen)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Tells of the forward."""
        if self.seen is not None:
            self.seen(module, args, kwargs, output)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
