"""Forked children that are killed, that hang, or that say how they ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator


def ended(work: Callable[[], object], limit: float = 60.0) -> str:
    """What `work` said in a fork of this process: "" at its end, else its error.

    Raises:
        AssertionError: it did not end in time.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        _run(work, into)
    os.close(into)
    said = b""
    with contextlib.closing(os.fdopen(out, "rb", buffering=0)) as pipe:
        until = time.monotonic() + limit
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            more = pipe.read(1 << 16) if ready else None
            if not more:
                break
            said += more
    if more is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert more is not None, f"no end after {limit:g} s: {said.decode()}"
    code = os.waitstatus_to_exitcode(status)
    return said.decode() or ("" if code == 0 else f"exit code {code}")


def _run(work: Callable[[], object], into: int) -> None:
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        os.write(into, traceback.format_exc().encode())
    finally:
        os._exit(code)  # nothing of pytest's runs in the child


@contextlib.contextmanager
def running(work: Callable[[], object]) -> Iterator[int]:
    """A child that repeats `work` until it is killed, at the end of the block.

    Yields:
        Its process id.
    """
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == -signal.SIGKILL, f"the child ended by itself with {code}"
