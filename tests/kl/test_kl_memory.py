"""Where a large gradient lives on the CPU: on the pages of one that was freed, never on those of
one that is in use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax._base import library

pytestmark = pytest.mark.skipif(
    "_C" in library.problems or not sys.platform.startswith("linux"),
    reason="the C++ kernels on Linux keep memory",
)

TOKENS, VOCABULARY = 300, 8192  # 9.8 MB: what is smaller than 8 MB is malloc's


def step(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    leaf = x.detach().requires_grad_()
    fasttax.token_kl(leaf, y, reduction=reduction).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


COUNT_FAULTS = """
import ctypes, resource, torch, fasttax
# PR_SET_THP_DISABLE: with 2 MB pages there would be few faults either way
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
x, y = torch.randn(2, {tokens}, {vocabulary})
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    leaf = x.detach().requires_grad_()
    fasttax.token_kl(leaf, y, reduction="{reduction}").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, max(faults() for _ in range(3)))
"""


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("recycle", [True, False])
def test_a_freed_gradient_makes_room_for_the_next(reduction: str, recycle: bool) -> None:
    code = COUNT_FAULTS.format(tokens=TOKENS, vocabulary=VOCABULARY, reduction=reduction)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTTAX_RECYCLE": str(int(recycle))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    pages, (first, later) = TOKENS * VOCABULARY * 4 // 4096, map(int, run.stdout.split())
    assert first >= pages
    assert (later < pages / 8) == recycle


def test_gradients_in_use_are_apart() -> None:
    x, y = torch.randn(2, TOKENS, VOCABULARY)
    held = [step(x * scale, y) for scale in (1.0, 0.5, 0.25, 0.125)]  # more than are kept
    copies = [gradient.clone() for gradient in held]
    assert len({gradient.data_ptr() for gradient in held}) == len(held)
    del held[1], held[2]
    step(x * 3, y)
    step(x[:280] * 5, y[:280])
    assert torch.equal(held[0], copies[0])
    assert torch.equal(held[1], copies[2])


def test_a_view_keeps_its_memory() -> None:
    x, y = torch.randn(2, TOKENS, VOCABULARY)
    row = step(x, y)[7]
    kept = row.clone()
    step(x * 2, y)
    assert torch.equal(row, kept)


def test_larger_and_smaller_gradients() -> None:
    x, y = torch.randn(2, 2 * TOKENS, VOCABULARY)
    whole = step(x, y, "none").clone()
    for rows in (TOKENS, 2 * TOKENS, TOKENS + 1):
        assert torch.equal(step(x[:rows], y[:rows], "none"), whole[:rows])


def test_threads() -> None:
    pairs = torch.randn(4, 2, TOKENS, VOCABULARY)
    expected = [step(x, y).clone() for x, y in pairs]
    right: list[bool] = []

    def work(which: int) -> None:
        right.extend(torch.equal(step(*pairs[which]), expected[which]) for _ in range(4))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 16


@pytest.mark.parametrize("choice", ["0", "1"])
def test_the_choice(choice: str) -> None:
    """FASTTAX_RECYCLE=0 leaves all memory to torch: the gradient's storage can be resized then."""
    code = (
        "import torch, fasttax\n"
        f"x, y = torch.randn(2, {TOKENS}, {VOCABULARY})\n"
        "fasttax.token_kl(x.requires_grad_(), y, reduction='mean').backward()\n"
        "print(x.grad.untyped_storage().resizable(), bool(x.grad.isfinite().all()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTTAX_RECYCLE": choice},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [str(choice == "0"), "True"], run.stderr
