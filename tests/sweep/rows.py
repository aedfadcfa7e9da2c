"""A row of the table: everything that the sweep asks of one class."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import time
import traceback

import torch
import transformers

from tests.sweep import batches, checks, kl, models
from tests.sweep.result import REFUSED, Case, Row

# What every child needs: a Trainer imports datasets when it is made, and a first model generation
IMPORTED = (
    "datasets",
    "transformers.models.bart.modeling_bart",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_seq2seq",
)


def row(case: Case) -> Row:
    """All checks of one class, in this process."""
    start = time.perf_counter()
    found = Row(case.name, case.family)
    try:
        model = models.build(case)
        batch = batches.batch(case, model)
        truth = checks.definition(case, model, batch)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found.unbuilt = f"{reason} [{os.path.basename(at.filename)}:{at.lineno}]"
        return found
    found.parameters = sum(p.numel() for p in model.parameters())
    outcomes = found.outcomes
    outcomes["update"] = checks.fisher(lambda: checks.updated(case, model, batch), truth, model)
    if outcomes["update"].kind == REFUSED:
        outcomes["advice"] = checks.fisher(
            lambda: checks.updated(case, model, batch, fallback="loop"), truth, model
        )
    outcomes["observe"] = checks.fisher(lambda: checks.observed(case, model, batch), truth, model)
    if case.family in kl.FAMILIES and "labels" in batch:
        for check in ("kl_self", "kl"):
            ref = copy.deepcopy(model) if check == "kl_self" else kl.perturbed(model)
            outcomes[check] = kl.full_kl(case, model, ref, batch)
    found.seconds = round(time.perf_counter() - start, 1)
    return found


def prepare() -> None:
    """Imports what every child needs, once, and takes it out of the garbage collector's way."""
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
