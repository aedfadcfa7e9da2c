"""fasttax in LLaMA-Factory: EWC and an exact KL from its YAML, or by its callbacks.

    # in the place of llamafactory-cli train
    python -m fasttax.integrations.llamafactory train.yaml

    # in train.yaml, beside LLaMA-Factory's own keys
    fasttax:
      ewc: {fisher: fisher.safetensors, strength: 10.0}
      kl: {beta: 0.1}

LLaMA-Factory makes model and trainer inside `run_exp(args, callbacks)`: `FasttaxCallback` finds the
trainer as it is made. It serves any other framework that takes transformers' callbacks alike.
Written against llamafactory 0.9.5.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttax._base import checks
from fasttax._base.handle import Handle
from fasttax.integrations.transformers import attach

try:
    from transformers import Trainer, TrainerCallback

    from fasttax.integrations._options import FasttaxOptions, arguments, read
    from fasttax.integrations._trainer import calling
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fasttax.integrations.llamafactory: {error.name} is not installed; run `pip install "
        "llamafactory`",
        name=error.name,
    ) from error

OP = "FasttaxCallback"


class FasttaxCallback(TrainerCallback):
    """`attach(trainer, ewc=..., kl=...)` for a trainer that a framework makes by itself.

    As the trainer is made, the weights that it starts from become EWC's anchor and, without another
    reference, the KL's. As training begins both are attached, as it ends taken out.

    Args:
        ewc: {"fisher": "fisher.safetensors", "strength": 10.0, "storage": "fp32", "where":
            "pre_clip"}.
        kl: {"beta": 0.1, "kind": "policy_ref", "reference_model": ..., "reference_cache": ...,
            "temperature": ..., "jsd_beta": 0.5, "estimator": "token"}.

    Raises:
        ValueError: neither, or keys and values that do not fit; later as `EWC` and `attach`.
        RuntimeError: training begins in a trainer whose making was not seen.

    Example:
        >>> from llamafactory.train.tuner import run_exp
        >>> from fasttax.integrations.llamafactory import FasttaxCallback
        >>> run_exp({"stage": "sft"}, callbacks=[FasttaxCallback(kl={"beta": 0.1})])
    """

    def __init__(
        self, ewc: Mapping[str, Any] | None = None, kl: Mapping[str, Any] | None = None
    ) -> None:
        block = {"ewc": ewc, "kl": kl}
        self.options: FasttaxOptions = read(OP, block, "leave the callback out")
        self._trainer: Any = None
        self._arguments: dict[str, Any] = {}
        self._handle: Handle | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the weights that training starts from."""
        self._trainer = calling(Trainer, lambda found: self in found.callback_handler.callbacks)
        if self._trainer is None:
            raise RuntimeError(
                f"{OP}: expected a transformers Trainer that is being made, got none"
            )
        self._arguments = arguments(OP, self.options, self._trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches, and has what was attached see that training begins."""
        if self._trainer is None:
            raise RuntimeError(
                f"{OP}: expected to be among the trainer's callbacks as it is made, got a trainer "
                "that was made before; pass callbacks=[...] to it, or use attach(trainer, ...)"
            )
        if self._handle is not None:  # a run that was broken off, as where memory ran out
            self._handle.undo()
        handler = self._trainer.callback_handler
        before = list(handler.callbacks)
        self._handle = attach(self._trainer, **self._arguments)
        for callback in [c for c in handler.callbacks if not any(c is b for b in before)]:
            callback.on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes both out."""
        if self._handle is not None:
            self._handle.undo()
        self._handle = None


def run_exp(args: Mapping[str, Any], callbacks: Sequence[Any] = ()) -> None:
    """LLaMA-Factory's `run_exp` with the block `fasttax` of its arguments.

    Args:
        args: a YAML's mapping: LLaMA-Factory's keys, and "fasttax": {"ewc": ..., "kl": ...}.
        callbacks: others than fasttax's.

    Raises:
        ValueError: no block, or one that does not fit.

    Example:
        >>> from fasttax.integrations.llamafactory import run_exp
        >>> run_exp({"stage": "sft", "fasttax": {"kl": {"beta": 0.1}}})
    """
    from llamafactory.train import tuner

    rest = dict(args)
    block = rest.pop("fasttax", None)
    options = read(OP, block, "train by llamafactory-cli")
    given = options.model_dump(exclude_none=True)
    tuner.run_exp(rest, callbacks=[FasttaxCallback(**given), *callbacks])


def main(arguments: Sequence[str]) -> None:
    """Trains as a YAML says, the one argument."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise checks.fail(
            "python -m fasttax.integrations.llamafactory",
            "arguments",
            "the path of one YAML",
            " ".join(arguments) or "none",
        )
    import yaml

    run_exp(yaml.safe_load(Path(arguments[0]).read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
