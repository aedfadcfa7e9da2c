"""attach's features in transformers' Trainer on this machine's GPU: as on the CPU.

Without a GPU test_gpu_launches.py runs them on the fake CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fasttax.integrations import AdaptiveKL
from fasttax.integrations.reference import TopKReference
from fasttax.integrations.transformers import attach
from tests.tools import launched, tiny_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROWS = [launched.Rows()[k]["input_ids"] for k in range(16)]
GENERAL = [{"input_ids": tiny_lm.ids()[k : k + 2].flip(-1)} for k in (0, 2)]
FEATURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "EWC": lambda model: {"ewc": launched.held(model)},
    "KL": lambda model: {"kl": {"ref_model": tiny_lm.model(1), "beta": AdaptiveKL(0.5, 0.1)}},
    "KL to a cache": lambda model: {
        "kl": {"ref_model": TopKReference.make(tiny_lm.model(1), ROWS, k=8), "beta": 0.1}
    },
    "replay of text": lambda model: {"replay": {"loader": GENERAL, "weight": 5.0}},
    "replay of a KL": lambda model: {
        "replay": {"loader": GENERAL, "kind": "kl", "ref_model": tiny_lm.model(1), "weight": 5.0}
    },
    "projection": lambda model: {"project": {"general": GENERAL, "directions": 2}},
    "quadratic log": lambda model: {
        "log_quadratic": {"ref_model": tiny_lm.model(), "batches": GENERAL}
    },
    "evaluation": lambda model: {
        "ewc": launched.held(model),
        "kl": {"ref_model": tiny_lm.model(1), "beta": 0.3},
    },
}


def trained(name: str, folder: Path, on_cpu: bool) -> tuple[list[Tensor], list[dict[str, float]]]:
    changes: dict[str, Any] = {"use_cpu": on_cpu}
    if name == "evaluation":
        changes |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    made = launched.trainer(folder, **changes)
    assert made.model.device.type == ("cpu" if on_cpu else "cuda")
    options = FEATURES[name](made.model)
    transformers.set_seed(5)
    with attach(made, **options):
        made.train()
    return [p.detach().cpu() for p in made.model.parameters()], made.state.log_history


@pytest.mark.parametrize("name", FEATURES)
def test_is_as_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # without DataParallel
    before = next(tiny_lm.model().parameters()).detach()
    (here, log), (there, found) = (trained(name, tmp_path, on_cpu) for on_cpu in (True, False))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)
    assert float((here[0] - before).abs().max()) > 1e-3
    assert len(log) == len(found)
    for cpus, gpus in zip(log, found, strict=True):
        assert cpus.keys() == gpus.keys()
        for key in cpus:
            if "runtime" not in key and "per_second" not in key and key != "total_flos":
                assert gpus[key] == pytest.approx(cpus[key], rel=1e-2, abs=1e-4), key
