"""What a model says of its own labels: their likelihood, and which prediction each belongs to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from fasttax._base import checks, wrappers

LIKELIHOODS = ("auto", "softmax", "bernoulli", "gaussian")
# config.problem_type of transformers' classifiers
_PROBLEMS = {
    "regression": "gaussian",
    "multi_label_classification": "bernoulli",
    "single_label_classification": "softmax",
}
# the losses of transformers (PreTrainedModel.loss_type) whose labels are of the whole example
_OF_EXAMPLES = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification")
_IN_PLACE = ("ForMaskedLM", "ForTokenClassification")  # a label belongs to its own token
_OF_INPUTS = (*_OF_EXAMPLES, "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Task:
    """What is known of a model's labels before it has seen a batch.

    Attributes:
        likelihood: "softmax", "bernoulli" or "gaussian"; None where the model does not say.
        shift: labels of (B, T) are next tokens; None: those that come with a batch are so unless
            `in_place`, and ids without labels are.
        in_place: the model's class says that a label belongs to its own token.
        encoder_decoder: labels are those of the decoder's positions, in place.
        classes: the model is one of transformers', which takes float labels of several columns as
            classes that may hold together.
        first: the name of the forward's first argument, of a model that takes no input_ids.
        arguments: the forward's arguments by name; empty where it takes any.
    """

    likelihood: str | None
    shift: bool | None
    in_place: bool
    encoder_decoder: bool
    classes: bool
    first: str | None
    arguments: frozenset[str]

    @staticmethod
    def of(model: nn.Module, likelihood: str, shift: bool | None) -> Task:
        """Of a model, where the user's own options say nothing else.

        Args:
            model: the model.
            likelihood: one of LIKELIHOODS; "auto" asks the model.
            shift: None asks the model.

        Raises:
            ValueError: `shift` is none of None, True and False.
        """
        if shift not in (None, True, False):
            raise checks.fail("DiagonalFisher", "shift", "None, True or False", repr(shift))
        bare = unwrapped(model)
        config = getattr(bare, "config", None)
        loss = getattr(bare, "loss_type", None)
        known = likelihood
        if likelihood == "auto":
            known = _PROBLEMS.get(getattr(config, "problem_type", None) or "", "")
            if not known and loss in _OF_EXAMPLES and getattr(config, "num_labels", 0) == 1:
                known = "gaussian"  # transformers takes one label as a regression's
        sequences = bool(getattr(config, "is_encoder_decoder", False)) and loss not in _OF_INPUTS
        in_place, first, arguments = loss in _IN_PLACE, *_arguments(bare)
        return Task(known or None, shift, in_place, sequences, config is not None, first, arguments)

    def shifts(self, labelled: bool) -> bool:
        """Whether the labels of a batch are next tokens; `labelled`: they came with it."""
        if self.shift is not None:
            return self.shift
        return not (labelled and self.in_place)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of PEFT and torch, whose forward takes anything."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        children = dict(inner.named_children())
        inside = next((children[name] for name in wrappers.TORCH if name in children), None)
        if inside is None or _named(_of_forward(inner)):
            break
        inner = inside
    wrapped: nn.Module = inner
    return wrapped


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in {a.name for a in _of_forward(unwrapped(model))}


def _of_forward(model: nn.Module) -> list[inspect.Parameter]:
    """The forward's; a scripted or traced one has no Python signature, but a schema of its own."""
    schema: Any = getattr(model.forward, "schema", None)
    if schema is None:
        return [*inspect.signature(model.forward).parameters.values()]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(argument.name, kind) for argument in schema.arguments[1:]]


def _arguments(model: nn.Module) -> tuple[str | None, frozenset[str]]:
    """The first argument's name where there is no input_ids, and all names."""
    arguments = _of_forward(model)
    names = _named(arguments)
    if any(a.kind == a.VAR_KEYWORD for a in arguments):
        return _first(names), frozenset()
    return _first(names), frozenset(names)


def _named(arguments: list[inspect.Parameter]) -> list[str]:
    return [a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]


def _first(names: list[str]) -> str | None:
    return names[0] if names and "input_ids" not in names else None
