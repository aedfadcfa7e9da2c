"""What `accelerate launch` runs on each rank: `-m tests.tools.launched OUT.json DEVICES RUN...`.

Each run is four steps of transformers' Trainer with EWC and the exact KL, or the reason why they
are refused; one launch takes several, since most of its time is imports.

A run is words with "+" between: "ewc" and "kl"; "replay-lm" and "replay-kl"; "callback" for an
EWCCallback among the trainer's callbacks; "evaluate" for evaluations of seven rows between the
steps and behind them, "dispatch" for batches that rank 0 reads for all. DEVICES: "gpus" to have
Accelerate take gloo on CPUs for a GPU's backend, without which it has no FSDP; "cpus" to say that
there is no GPU, without which it has no DDP on gloo; or "any".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from fasttax import EWC
from fasttax.integrations.transformers import EWCCallback, attach
from tests.tools import tiny_lm

STRENGTH, BETA = 20.0, 0.3
RANKS = 2
EVALUATED = 7  # rows, two a batch: the last rank's last batch has one, and one of the first again
OURS = ("attach:", "EWCCallback:", "FullKL:", "EWC:", "deepspeed.attach:")  # how refusals begin

# --- the launchers --------------------------------------------------------------------------------


def _deepspeed(stage: int) -> dict[str, Any]:
    return {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": stage,
            "gradient_accumulation_steps": 2,
            "zero3_init_flag": stage == 3,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
        },
    }


def _fsdp(version: int) -> dict[str, Any]:
    wrap: dict[str, Any] = {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_use_orig_params": True,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_sync_module_states": False,  # which asks for an accelerator by name
    }
    return {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": version, **wrap},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "DDP": {"distributed_type": "MULTI_GPU"},  # of MULTI_CPU it makes one process on one machine
    "FSDP1": _fsdp(1),
    "FSDP2": _fsdp(2),
    "ZeRO-1": _deepspeed(1),
    "ZeRO-2": _deepspeed(2),
    "ZeRO-3": _deepspeed(3),
}


class Outcome(NamedTuple):
    """What a run left: the trained weights by name, the log of its steps, that of its evaluations
    with what the last one returned behind it; or the refusal alone.
    """

    weights: dict[str, Tensor]
    log: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    refused: str = ""


def launch(name: str, runs: list[str], folder: Path, port: int) -> list[Outcome]:
    """Runs this module under `accelerate launch` and returns what rank 0 wrote.

    Raises:
        RuntimeError: it wrote nothing, or did not run on all ranks; with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, out = folder / "accelerate.json", folder / "out.json"
    shared: dict[str, Any] = {"num_processes": RANKS, "num_machines": 1, "machine_rank": 0}
    shared |= {"main_process_port": port, "mixed_precision": "no", "debug": False}
    shared["use_cpu"] = False
    config.write_text(json.dumps({**shared, **CONFIGS[name]}))
    devices = {"FSDP": "gpus", "DDP": "cpus"}.get(name.rstrip("12"), "any")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "tests.tools.launched", str(out), devices, *runs]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    ran = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    if not out.is_file():
        raise RuntimeError(f"{name}: {ran.stdout[-2000:]}\n{ran.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    if found["kind"] == "NO" or found["ranks"] != RANKS:  # it has each rank train by itself
        raise RuntimeError(f"{name}: {found['ranks']} {found['kind']}: {ran.stderr[-6000:]}")
    weights = torch.load(out.with_suffix(".pt"))
    return [Outcome(w, *rest) for w, rest in zip(weights, found["runs"], strict=True)]


# --- on each rank ---------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of which the first 1 to 5 tokens do not count."""

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tiny_lm.ids()[i]
        labels = ids.clone()
        labels[: 1 + i % 5] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def held(model: Any) -> EWC:
    """An EWC whose gradient is not 0 at the first step."""
    fisher, anchor = {}, {}
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(i)
        fisher[name] = torch.rand(p.shape, generator=generator)
        anchor[name] = p.detach() + 0.02 * torch.randn(p.shape, generator=generator).to(p)
    return EWC(model, fisher, strength=STRENGTH, anchor=anchor)


def gathered(parameters: list[Any]) -> Any:
    """Whole parameters within, where ZeRO-3 has scattered them."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def trainer(folder: Path, **changes: Any) -> Trainer:
    """The one that every launcher runs: 4 rows a step, by accumulation and ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        "ddp_backend": "gloo" if ranks > 1 else None,
    }
    callbacks = changes.pop("callbacks", None)
    args = TrainingArguments(**{**options, **changes})
    return Trainer(
        tiny_lm.model(),
        args,
        train_dataset=Rows(),
        eval_dataset=Rows(EVALUATED),
        callbacks=callbacks,
    )


def replayed() -> list[dict[str, Tensor]]:
    """General text: two rows a step of all ranks together, the second half as long."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    mine = slice(rank * RANKS // ranks, (rank + 1) * RANKS // ranks)
    batches = []
    for i in range(3):
        ids = tiny_lm.ids()[RANKS * i : RANKS * (i + 1)].flip(-1)
        counts = torch.ones_like(ids)
        counts[1, ids.shape[1] // 2 :] = 0
        batches.append({"input_ids": ids[mine], "attention_mask": counts[mine]})
    return batches


def whole(made: Any) -> dict[str, Tensor]:
    """The trained weights, by name; every rank calls it."""
    if isinstance(made.model_wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(made.model_wrapped):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in made.model_wrapped.named_parameters()
            }
    out = {}
    for name, p in made.model.named_parameters():
        with gathered([p]):
            full = p.full_tensor() if hasattr(p, "full_tensor") else p
            out[name] = full.detach().clone()
    return out


def trained(folder: Path, run: str, devices: str = "cpus") -> Outcome:
    """Of this process, which may be one of several."""
    what = run.split("+")
    changes: dict[str, Any] = {"use_cpu": devices == "cpus"}
    if "evaluate" in what:
        changes |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    if "dispatch" in what:
        changes["accelerator_config"] = {"dispatch_batches": True}
    made = trainer(folder, **changes)
    options: dict[str, Any] = {}
    if "kl" in what:
        options["kl"] = {"ref_model": tiny_lm.model(1), "beta": BETA}
    with gathered(list(made.model.parameters())):
        ewc = held(made.model)
    for kind in ("lm", "kl"):
        if f"replay-{kind}" in what:
            options["replay"] = {"loader": replayed(), "kind": kind, "weight": 5.0}
            options["replay"] |= {"every": 2} if kind == "lm" else {"ref_model": tiny_lm.model(1)}
    if "callback" in what:
        made.add_callback(EWCCallback(ewc))
    if "ewc" in what:
        options["ewc"] = ewc
    if options:
        attach(made, **options)
    transformers.set_seed(5)
    made.train()
    weights = whole(made)
    log = [e for e in made.state.log_history if "loss" in e]
    if "evaluate" not in what:
        return Outcome(weights, log, [])
    returned = made.evaluate()
    evaluations = [e for e in made.state.log_history if "eval_loss" in e]
    return Outcome(weights, log, [*evaluations, returned])


def trained_or_refused(folder: Path, run: str, devices: str) -> Outcome:
    try:
        return trained(folder, run, devices)
    except (ValueError, TypeError) as error:
        if not str(error).startswith(OURS):
            raise
        return Outcome({}, [], [], str(error))


def _as_if_gpus() -> None:
    """Accelerate shards on accelerators alone; gloo does what NCCL would."""

    def prepared(self: Any, *given: Any, **others: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepared  # noqa: SLF001


def main(arguments: list[str]) -> None:
    """Writes what rank 0 has of each run; the weights beside it."""
    path, devices, runs = Path(arguments[0]), arguments[1], arguments[2:]
    if devices == "gpus":
        _as_if_gpus()
    outcomes = [trained_or_refused(path.parent, run, devices) for run in runs]
    state = PartialState()
    result = {"ranks": state.num_processes, "kind": state.distributed_type.value}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save([outcome.weights for outcome in outcomes], path.with_suffix(".pt"))
        path.write_text(json.dumps({**result, "runs": [outcome[1:] for outcome in outcomes]}))


if __name__ == "__main__":
    main(sys.argv[1:])
