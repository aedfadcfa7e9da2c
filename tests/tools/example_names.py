"""What the examples in docstrings take for granted, tiny, each made where an example names it.

`torch` and `fasttax` are imported in all of them. The site prints the docstrings below.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fasttax
from tests.tools import tiny_lm

B, T, V, H = 2, 5, 11, 8  # rows, tokens, vocabulary, hidden


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Names:
    """The names, made once an example."""

    # --- tensors --------------------------------------------------------------------------------

    @functools.cached_property
    def logits(self) -> Tensor:
        """(2, 5, 11), the policy's."""
        return _random(0, B, T, V).requires_grad_()

    @functools.cached_property
    def ref_logits(self) -> Tensor:
        """(2, 5, 11), the reference's."""
        return _random(1, B, T, V)

    @functools.cached_property
    def mask(self) -> Tensor:
        """(2, 5), true where a token counts."""
        return torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    @functools.cached_property
    def response_mask(self) -> Tensor:
        """(2, 3), of the last three tokens."""
        return torch.tensor([[1, 1, 1], [1, 1, 0]])

    @functools.cached_property
    def ids(self) -> Tensor:
        """(2, 5), the sampled tokens."""
        return torch.arange(B * T).reshape(B, T) % V

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(2, 5, 8), the policy's last hidden states."""
        return _random(2, B, T, H).requires_grad_()

    @functools.cached_property
    def ref_hidden(self) -> Tensor:
        """(2, 5, 8), the reference's."""
        return _random(3, B, T, H)

    @functools.cached_property
    def head(self) -> nn.Linear:
        """The policy's head, a weight (11, 8)."""
        return nn.Linear(H, V, bias=False)

    @functools.cached_property
    def ref_head(self) -> nn.Linear:
        """The reference's."""
        return nn.Linear(H, V, bias=False).requires_grad_(False)

    # --- a model and its text -------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> Any:
        """A transformers causal language model, in training."""
        return tiny_lm.model(0)

    @functools.cached_property
    def base(self) -> Any:
        """What it was before."""
        return tiny_lm.model(1).eval()

    @functools.cached_property
    def loader(self) -> list[dict[str, Tensor]]:
        """Batches of input_ids, attention_mask and labels."""
        rows = tiny_lm.ids(4)
        return [
            {"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r}
            for r in rows.split(2)
        ]

    @property
    def general_text(self) -> list[dict[str, Tensor]]:
        """The same of text as the base was trained on."""
        return self.loader

    @property
    def task_batches(self) -> list[dict[str, Tensor]]:
        """The same of the new task, labels -100 on its prompts."""
        return self.loader

    @property
    def batch(self) -> dict[str, Tensor]:
        """One of them."""
        return self.loader[0]

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids, a list a sequence."""
        return tiny_lm.ids(4).tolist()

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model's parameters."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    # --- what fasttax makes ---------------------------------------------------------------------

    @functools.cached_property
    def fisher(self) -> Any:
        """The model's FisherEstimate."""
        return fasttax.estimate_fisher(self.model, self.loader, progress=False)

    @functools.cached_property
    def base_fisher(self) -> Any:
        """The base's."""
        return fasttax.estimate_fisher(self.base, self.loader, progress=False)

    @functools.cached_property
    def ewc(self) -> Any:
        """An EWC of the model."""
        return fasttax.EWC(self.model, self.fisher, strength=10.0)

    @functools.cached_property
    def report(self) -> Any:
        """A TaxReport with checkpoints of a run "dpo", of two stages."""
        made = fasttax.tax.TaxReport(0.62, 0.31)
        made.add("sft-200", 0.60, 0.45, kl=0.2, run="dpo", stage="sft")
        made.add("dpo-500", 0.57, 0.52, kl=0.8, run="dpo", stage="dpo")
        return made

    @property
    def capability(self) -> Callable[[Any], float]:
        """A model's capability: here minus its loss on general text."""
        return lambda merged: -merged(**self.batch).loss.item()

    @property
    def alignment(self) -> Callable[[Any], float]:
        """What its training was for, measured."""
        return lambda merged: -merged(**self.loader[1]).loss.item()

    # --- trainers -------------------------------------------------------------------------------

    @functools.cached_property
    def trainer(self) -> Any:
        """TRL's SFTTrainer of the model."""
        from transformers import PrinterCallback

        from tests.tools import trl_runs

        made = trl_runs.make("sft", Path("out"), model=self.model, save_strategy="no")
        made.remove_callback(PrinterCallback)  # its log is no part of an example
        return made

    @functools.cached_property
    def engine(self) -> Any:
        """A DeepSpeed engine of the model: DeepSpeed's names, and a step of SGD."""
        return _Engine(self.model)

    @functools.cached_property
    def lightning(self) -> ModuleType:
        """The package."""
        return importlib.import_module("lightning")

    @functools.cached_property
    def module(self) -> Any:
        """A LightningModule that trains the model."""
        model = self.model
        parent: Any = self.lightning.LightningModule

        class Module(parent):
            def __init__(self) -> None:
                super().__init__()
                self.lm = model

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return self.lm(input_ids=batch, labels=batch).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Module()

    @property
    def options(self) -> dict[str, Any]:
        """A Lightning Trainer's other arguments."""
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return {"max_steps": 2, "accelerator": "cpu", **dict.fromkeys(quiet, False)}

    @property
    def rows(self) -> Any:
        """Its loader, of token ids."""
        return torch.utils.data.DataLoader(tiny_lm.ids(4), batch_size=2)

    @property
    def worker(self) -> Any:
        """verl's actor, which calls verl's loss: on two sequences without padding."""
        return SimpleNamespace(update_actor=lambda batch: _update_actor(self.logits))


def _update_actor(logits: Tensor) -> None:
    from fasttax.integrations import verl

    student = logits.detach().reshape(1, -1, V)
    offsets = torch.tensor([0, 7, student.shape[1]])
    top = fasttax.topk_logprobs(_random(1, student.shape[1], V), 4)
    teacher = [torch.nested.nested_tensor_from_jagged(t, offsets) for t in top]
    losses = getattr(importlib.import_module(verl.MODULE), verl.NAME)
    found = losses(student, *teacher, None, "thd")["distillation_losses"]
    assert bool((found >= 0).all())


class _Engine:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **batch: Tensor) -> Any:
        return self.module(**batch)

    def zero_optimization_stage(self) -> int:
        return 2

    def gradient_accumulation_steps(self) -> int:
        return 1

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def backward(self, loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    def step(self) -> None:
        with torch.no_grad():
            for p in self.module.parameters():
                p.sub_(0.1 * p.grad)
        self.module.zero_grad()


NAMES = {name: found.__doc__ for name, found in vars(Names).items() if not name.startswith("_")}


# --- packages that pin other versions of torch or transformers ----------------------------------


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


def _factory_run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
    """LLaMA-Factory's: it makes the trainer by itself, and trains."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        "out", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_lm.ids(4)]
    made = Trainer(tiny_lm.model(), arguments, train_dataset=rows, callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    made.train()


def _forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
) -> dict[str, Tensor]:
    """verl's arguments; tests/integrations/test_rlhf.py has its values."""
    raise NotImplementedError


def stand_ins() -> dict[str, ModuleType]:
    """Modules by name, for the packages that are not installed here."""
    made: dict[str, ModuleType] = {}
    if importlib.util.find_spec("axolotl") is None:
        made["axolotl"] = _module("axolotl")
        made["axolotl.integrations"] = _module("axolotl.integrations")
        base = type("BasePlugin", (), {})
        made["axolotl.integrations.base"] = _module("axolotl.integrations.base", BasePlugin=base)
    if importlib.util.find_spec("llamafactory") is None:
        tuner = _module("llamafactory.train.tuner", run_exp=_factory_run_exp)
        made["llamafactory"] = _module("llamafactory")
        made["llamafactory.train"] = _module("llamafactory.train", tuner=tuner)
        made["llamafactory.train.tuner"] = tuner
    if importlib.util.find_spec("verl") is None:
        from fasttax.integrations import verl

        name = verl.MODULE
        parents = [name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1)]
        made |= {parent: _module(parent) for parent in parents}
        made[name] = _module(name, compute_forward_kl_topk=_forward_kl_topk)
        alone = {"get_ulysses_sequence_parallel_world_size": lambda: 1}
        made |= {"verl.utils": _module("verl.utils")}
        made |= {"verl.utils.ulysses": _module("verl.utils.ulysses", **alone)}
    return {name: found for name, found in made.items() if name not in sys.modules}


def namespace(used: set[str]) -> dict[str, Any]:
    """`torch`, `fasttax`, and those of NAMES that an example uses."""
    made = Names()
    names = {name: getattr(made, name) for name in sorted(used & set(NAMES))}
    return {"torch": torch, "fasttax": fasttax, **names}
