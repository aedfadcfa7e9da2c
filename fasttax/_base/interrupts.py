"""Ctrl-C while something must be done as a whole, and while an op computes for long."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, SIGINT waits; what it does by default or by the user's handler comes at the end.

    In the main thread, which alone runs signal handlers in Python.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])


def surfaced(f: Callable[P, R]) -> Callable[P, R]:
    """`f`, out of which comes what a signal's handler raised inside an op, and no other error.

    An op of C++ that computes for long runs the handlers of signals, and ends with a RuntimeError
    where one raised (csrc/cpu/parallel.cpp). What it raised, KeyboardInterrupt for Ctrl-C, waits
    for Python's next step, which may lie beyond the `except` that it is meant for.
    """

    @functools.wraps(f)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return f(*args, **kwargs)
        except RuntimeError:
            _step()
            raise

    return wrapper


def _step() -> None:
    """Python looks for what waits where a function begins."""
