"""Work on one class after the other, each in a child process that may hang or die."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

from tests.sweep.result import CRASH, Case, Outcome, Row

CPU_LIMIT = 60  # seconds that a class may compute; the slowest needs 8
WALL_LIMIT = 400.0  # seconds until one that waits for ever is given up
Work = Callable[[Case], Row]


def _child(work: Work, case: Case, out: connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)
        out.send(work(case).to_json())


def _dead(case: Case, why: str) -> Row:
    return Row(case.name, case.family, outcomes={"update": Outcome(CRASH, why)})


def sweep(work: Work, cases: list[Case], jobs: int = 1) -> Iterator[Row]:
    """Runs `work` on each of `cases`, `jobs` processes at a time.

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
            process = context.Process(target=_child, args=(work, case, there), daemon=True)
            process.start()
            there.close()
            running[here] = (process, case, time.monotonic() + WALL_LIMIT)
        connection.wait(list(running), timeout=0.5)
        for here, (child, case, end) in list(running.items()):
            if here.poll():
                yield _received(here, child, case)
            elif time.monotonic() > end:
                child.kill()
                child.join()
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
