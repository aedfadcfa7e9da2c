"""Forks after use, threads at once, and Ctrl-C inside long calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fasttax
from fasttax import functional
from fasttax._base import library
from tests.faults.calls import CALLS, all_of_them, same_bits
from tests.faults.children import ended
from tests.tools.cuda_tools import ROOT

native = pytest.mark.skipif("_C" in library.problems, reason="needs the C++ kernels")


@pytest.fixture(params=[1, 2])
def at(request: pytest.FixtureRequest, threads: Callable[[int], None]) -> int:
    """So many threads of torch's."""
    threads(request.param)
    return int(request.param)


OWN = ("token_kl", "token_stats", "kl_estimate", "squares", "quadratics")
X, Y = (torch.randn(256, 4096, generator=torch.Generator().manual_seed(k)) for k in range(2))
D = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(2))


def _busy() -> list[Tensor]:
    """Ops large enough for all threads, whose pool a fork does not take along.

    None of torch's own, which wait for those threads for ever.
    """
    small = [t for name in OWN for t in CALLS[name](0)]
    return [*small, fasttax.token_kl(X, Y), functional.linear_sqgrad(D, D)]


def test_fork_after_use(at: int, soak: bool) -> None:
    """A child computes what its parent does, and again after it.

    With several threads not by torch's own products, which then wait for ever.
    """
    want = _busy()
    for _ in range(20 if soak else 1):
        found = ended(lambda: _check(want))
        assert found == "", f"{at} threads: {found}"
    _check(want)
    if at == 1:
        whole = all_of_them(0)
        assert ended(lambda: _check_all(whole)) == ""


def _check(want: list[Tensor]) -> None:
    assert same_bits(_busy(), want)


def _check_all(want: list[Tensor]) -> None:
    assert same_bits(all_of_them(0), want)


def test_fork_after_torch_alone(at: int) -> None:
    """Threads that torch's own ops have used, and fasttax has not: in a process of its own."""
    code = f"""
import os
import torch
torch.set_num_threads({at})
import fasttax
from tests.faults.children import ended
x = torch.randn(2048, 2048)
x @ x, x.exp().sum()
y = x + 1
def child():
    assert fasttax.token_kl(x, y).shape == (2048,)
assert ended(child) == ""
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_fork_of_a_fork(at: int) -> None:
    want = _busy()

    def child() -> None:
        _check(want)
        assert ended(lambda: _check(want)) == ""

    assert ended(child) == ""


class Rows(Dataset[Tensor]):
    """The KL of a row, computed by the worker that loads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.cat([t.flatten() for t in CALLS["token_kl"](i)])


def test_workers_of_a_loader(at: int) -> None:
    want = [Rows()[i] for i in range(8)]
    _busy()
    loader = DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found: list[Any] = list(loader)
    assert same_bits(found, want)


def test_eight_threads_at_once(at: int, soak: bool) -> None:
    want = [all_of_them(seed) for seed in range(8)]
    gate = threading.Barrier(8)

    def work(seed: int) -> bool:
        gate.wait()
        return all(same_bits(all_of_them(seed), want[seed]) for _ in range(100 if soak else 2))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# --- Ctrl-C --------------------------------------------------------------------------------------


Work = Callable[[], object]


def _wide(rows: int) -> Tensor:
    """Many equal rows in the memory of one."""
    return torch.randn(1, 20_000).expand(rows, 20_000)


def _kl() -> Work:
    x, y = _wide(4_000_000), _wide(4_000_000)
    return lambda: fasttax.token_kl(x, y)


def _stats() -> Work:
    outputs = ("logp", "entropy", "kl")
    ids = torch.zeros(4_000_000, dtype=torch.int64)
    x = _wide(4_000_000)
    return lambda: fasttax.token_stats(x, x, ids, outputs=outputs)


def _square() -> Work:
    d = torch.randn(1, 1024).expand(1, 100_000, 1024)
    return lambda: functional.linear_sqgrad(d, d)


def _tokens() -> Work:
    d = torch.randn(1, 1024).expand(100_000, 1, 1024)
    return lambda: functional.linear_sqgrad(d, d)


def _double() -> Work:
    d = torch.randn(1, 512, dtype=torch.float64).expand(1, 50_000, 512)
    return lambda: functional.linear_sqgrad(d, d)


def _head() -> Work:
    hidden = torch.randn(1, 1024).expand(200_000, 1024)
    weight = torch.randn(20_000, 1024)
    return lambda: functional.lm_head_fisher(hidden, weight)


def _linear_kl() -> Work:
    hidden = torch.randn(1, 1024).expand(400_000, 1024)
    weight = torch.randn(20_000, 1024)
    return lambda: fasttax.linear_token_kl(hidden, weight, hidden, weight)


def _lora() -> Work:
    """Of a rank of which there are two chunks alone, of seconds each."""
    a, b, fisher = torch.randn(4096, 8192), torch.randn(8192, 4096), torch.rand(8192, 8192)
    return lambda: functional.lora_ewc_penalty(a, b, fisher, 1.0, 1.0)


def _lora_double() -> Work:
    a, b = (torch.randn(*s, dtype=torch.float64) for s in ((512, 2048), (2048, 512)))
    fisher = torch.rand(2048, 2048, dtype=torch.float64)
    return lambda: functional.lora_ewc_penalty(a, b, fisher, 1.0, 1.0)


LONG: dict[str, Callable[[], Work]] = {  # whose inputs are there before the signal comes
    call.__name__[1:]: call
    for call in (_kl, _stats, _square, _tokens, _double, _head, _linear_kl, _lora, _lora_double)
}


def _interrupted(work: Work, after: float) -> None:
    """Ctrl-C after a while ends `work` with KeyboardInterrupt within a second."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(after, send).start()
    with pytest.raises(KeyboardInterrupt):
        work()
    late = time.monotonic() - sent[0]
    assert late < 1.0, f"{late:.1f} s after Ctrl-C"


@native
@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_inside_a_long_call(name: str, soak: bool) -> None:
    for after in (0.3, 0.8, 1.6) if soak else (0.4,):

        def child(after: float = after) -> None:
            torch.set_num_threads(1)
            _interrupted(LONG[name](), after)

        assert ended(child) == ""


@native
def test_a_handler_that_raises_nothing_lets_the_call_go_on() -> None:
    """As one that has training stop after the step."""

    def child() -> None:
        torch.set_num_threads(1)
        came: list[float] = []
        signal.signal(signal.SIGINT, lambda *_: came.append(time.monotonic()))
        x = _wide(12_000)
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        kl = fasttax.token_kl(x, x + 1.0)
        end = time.monotonic()
        assert came
        assert end - came[0] > 0.02  # it came while the op computed
        assert bool((kl == kl[0]).all())

    assert ended(child) == ""


@native
def test_another_exception_of_a_handler_comes_out() -> None:
    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop("by a handler")

    def child() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGUSR1, handler)
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(Stop, match="by a handler"):
            _kl()()

    assert ended(child) == ""


@native
def test_an_op_in_another_thread_is_left_alone() -> None:
    """Python's handlers run in the main thread: its Ctrl-C ends what that thread does."""

    def child() -> None:
        torch.set_num_threads(1)
        x = _wide(20_000)
        done: list[Tensor] = []
        thread = threading.Thread(target=lambda: done.append(fasttax.token_kl(x, x)))
        thread.start()
        _interrupted(lambda: time.sleep(30), 0.1)
        thread.join()
        assert done[0].shape == (20_000,)

    assert ended(child) == ""


@pytest.fixture(autouse=True)
def _no_alarm() -> Iterator[None]:
    yield
    assert threading.active_count() < 20
