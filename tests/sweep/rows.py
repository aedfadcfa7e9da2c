"""A row of the table: everything that the sweep asks of one class, each in a child process."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe, connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import transformers

from tests.sweep import batches, checks, kl, models
from tests.sweep.checks import CRASH, NONE, REFUSED, Outcome
from tests.sweep.models import Case

CPU_LIMIT = 60  # seconds that a class may compute; the slowest needs 8
WALL_LIMIT = 400.0  # seconds until one that waits for ever is given up
# What every child needs: a Trainer imports datasets when it is made, and a first model generation
IMPORTED = (
    "datasets",
    "transformers.models.bart.modeling_bart",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_seq2seq",
)
CHECKS = ("update", "advice", "observe", "kl_self", "kl")


@dataclass
class Row:
    """What came of one class.

    Attributes:
        unbuilt: why no tiny model of it could be made, or no gradient of it taken; "" where it was.
        outcomes: by check: `update`; `advice`, the loop that a refusal of `update` advises;
            `observe`; `kl_self`, FullKL against a copy of the policy; `kl`, against another model.
    """

    name: str
    family: str
    unbuilt: str = ""
    parameters: int = 0
    seconds: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """The checks that came out wrong or as an error that is no refusal, with what came."""
        return [
            f"{self.name}: {check}: {outcome.kind}: {outcome.detail}"
            for check, outcome in self.outcomes.items()
            if outcome.kind in (checks.WRONG, CRASH)
        ]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Row:
        """The row that `to_json` wrote."""
        found = json.loads(text)
        outcomes = {k: Outcome(**v) for k, v in found.pop("outcomes").items()}
        return Row(**found, outcomes=outcomes)


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
        problem = kl.untrainable(case, model, batch)
        for check in ("kl_self", "kl"):
            ref = copy.deepcopy(model) if check == "kl_self" else kl.perturbed(model)
            outcomes[check] = (
                Outcome(NONE, problem) if problem else kl.full_kl(case, model, ref, batch)
            )
    found.seconds = round(time.perf_counter() - start, 1)
    return found


# --- child processes -----------------------------------------------------------------------------


def prepare() -> None:
    """Imports what every child needs, once, and takes it out of the garbage collector's way."""
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()


def _child(case: Case, out: connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        out.send(row(case).to_json())


def _dead(case: Case, why: str) -> Row:
    return Row(case.name, case.family, outcomes={"update": Outcome(CRASH, why)})


def sweep(cases: list[Case], jobs: int = 1) -> Iterator[Row]:
    """Runs `cases`, `jobs` processes at a time.

    Yields:
        A row a class as it comes; one whose process hangs or dies says so.
    """
    context = get_context("fork")
    waiting = list(reversed(cases))
    running: dict[Any, tuple[BaseProcess, Case, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            here, there = Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, there), daemon=True)
            process.start()
            there.close()
            running[here] = (process, case, time.monotonic() + WALL_LIMIT)
        connection.wait(list(running), timeout=0.5)
        for here, (process, case, end) in list(running.items()):
            if here.poll():
                yield _received(here, process, case)
            elif time.monotonic() > end:
                process.kill()
                process.join()
                yield _dead(case, f"no end after {WALL_LIMIT:.0f} s")
            else:
                continue
            del running[here]


def _death(code: int | None) -> str:
    """What an exit code says: negative ones are signals."""
    if code == -signal.SIGXCPU:
        return f"no end after {CPU_LIMIT} s of computing"
    return f"the process died with exit code {code}"


def _received(here: Any, process: BaseProcess, case: Case) -> Row:
    try:
        text = here.recv()
    except EOFError:
        process.join()
        return _dead(case, _death(process.exitcode))
    process.join()
    return Row.from_json(text)
