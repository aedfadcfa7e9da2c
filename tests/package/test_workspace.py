"""Memory that one call leaves to the next: never to two at once, and in no result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fasttax
from fasttax._base import workspace
from fasttax._base.workspace import Workspace
from fasttax.kl import linear_sweep

WANTED = [(5, torch.float32), (7, torch.bfloat16), (0, torch.float32), (3, torch.float64)]


def test_parts_do_not_overlap_and_are_whole_lines() -> None:
    with Workspace().lent(WANTED) as parts:
        for number, part in enumerate(parts):
            part.fill_(number)
        for number, (part, (count, dtype)) in enumerate(zip(parts, WANTED, strict=True)):
            assert part.shape == (count,)
            assert part.dtype == dtype
            assert (part == number).all()
            assert not count or part.data_ptr() % 64 == parts[0].data_ptr() % 64


def test_the_next_call_gets_it_and_a_call_inside_another_does_not() -> None:
    space = Workspace()
    with space.lent(WANTED) as outer, space.lent(WANTED) as inner:
        assert outer[0].data_ptr() != inner[0].data_ptr()
        places = {outer[0].data_ptr(), inner[0].data_ptr()}
    with pytest.raises(KeyError):
        fail(space)
    with space.lent(WANTED) as again, space.lent(WANTED) as other:
        assert again[0].data_ptr() in places
        assert other[0].data_ptr() != again[0].data_ptr()


def fail(space: Workspace) -> None:
    with space.lent(WANTED):
        raise KeyError


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "KEPT_BYTES", 1 << 10)
    space = Workspace()
    with space.lent([(1 << 11, torch.uint8)]):
        pass
    assert not space.holds
    with space.lent([(1 << 9, torch.uint8)]):
        pass
    assert space.holds == 1 << 9


def kl(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = fasttax.linear_token_kl(*leaves, h + 1, w * 2, reduction="sum", token_chunk=5)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_their_own(dtype: torch.dtype) -> None:
    """Of calls one after the other, in threads, and after one in inference mode."""
    cases = [(torch.randn(13, 8).to(dtype), torch.randn(40 + n, 8).to(dtype)) for n in range(8)]
    with torch.inference_mode():
        fasttax.linear_token_kl(*cases[0], *cases[1][:1], cases[0][1])
    first = [kl(*case) for case in cases]
    kept = [tuple(t.clone() for t in result) for result in first]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda case: kl(*case), cases * 4))
    for result, copy in zip(first, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, copy, strict=True))
    for n, result in enumerate(again):
        assert all(torch.equal(a, b) for a, b in zip(result, kept[n % 8], strict=True))


@pytest.mark.parametrize("fake_first", [True, False])
def test_tensors_that_hold_nothing_and_real_ones_do_not_meet(fake_first: bool) -> None:
    def call() -> Tensor:
        leaves = [torch.randn(n, 16).requires_grad_() for n in (23, 301, 23, 301)]
        value: Tensor = fasttax.linear_token_kl(*leaves, reduction="sum")
        return value

    if not fake_first:
        call()
    with FakeTensorMode():
        assert type(call()) is not Tensor
    assert type(call()) is Tensor
    with linear_sweep.WORKSPACE.lent([(3, torch.float32)]) as parts:
        assert type(parts[0]) is Tensor
