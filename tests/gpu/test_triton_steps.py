"""How often the Triton kernels over logits sum a step of a row a second time, from registers.

A row's first step, and a last one that is not whole, take `slow_step` alone. Any other takes it
after the fast sums where an entry stands far above the frame, which then moves there, or where the
sums hold a NaN: 0 * inf, of a logit of -inf, or a NaN itself. Counted in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import fasttax

pytest.importorskip("triton", reason="Triton kernels need triton: `pip install triton`")
from fasttax.triton import jsd, kl, sums
from tests.tools.triton_tools import check_in_the_interpreter

ROWS, V = 2, 4 * 8192  # a step has 8192 bfloat16 entries of a KL at most
FINITE = {
    **dict.fromkeys(("equal", "moved .01", "moved .3", "far"), (torch.bfloat16,)),
    **dict.fromkeys(("moved .1", "confident"), (torch.bfloat16, torch.float32)),
}
PEAKS = 2  # of a confident row, each of which may move its frame once

Call = Callable[[Tensor, Tensor], object]
CALLS: dict[str, Call] = {
    "policy_ref": lambda x, y: fasttax.token_kl(x, y),
    "ref_policy": lambda x, y: fasttax.token_kl(x, y, kind="ref_policy"),
    "jsd": lambda x, y: fasttax.token_kl(x, y, kind="jsd"),
    "softcap": lambda x, y: fasttax.token_kl(x, y, softcap=30.0, ref_softcap=30.0),
    "stats": lambda x, y: fasttax.token_stats(x, y, outputs=("entropy", "kl_policy_ref")),
    "alone": lambda x, y: fasttax.token_stats(x, outputs=("entropy",)),
}
WITHOUT_INFINITIES = ("softcap",)  # -inf is -cap


class Steps(NamedTuple):
    """Slow steps of some rows, but for each row's first one and a last one that is not whole."""

    moved: int  # into another frame
    unmoved: int  # summed again where they were: for a NaN, or for nothing
    most: int  # steps of a row that were summed again, moved or not


def slow_steps(call: Call, x: Tensor, y: Tensor) -> Steps:
    """Those that `call` takes over the rows."""
    original, moved, rows = sums.slow_step, [], [0]

    def counted(xs: Any, ys: Any, start: Any, V: Any, *rest: Any) -> Any:
        result = original(xs, ys, start, V, *rest)
        first = int(start)
        if first == 0:
            rows.append(0)
        elif first + sum(vector.numel.value for vector in xs) <= int(V):
            before, after = rest[2], result[3]
            moved.append(any(bool(a != b) for a, b in zip(before, after, strict=True)))
            rows[-1] += 1
        return result

    with mock.patch.object(sums, "slow_step", counted):
        call(x, y)
    assert len(rows) == 1 + len(x), "slow_step was not seen to begin every row"
    return Steps(sum(moved), len(moved) - sum(moved), max(rows))


def check_finite_rows(name: str) -> None:
    """No finite row is summed again in its own frame; frames move for peaks alone."""
    from bench import logits

    for kind, dtypes in FINITE.items():
        for dtype in dtypes:
            x, y = logits.pair(kind, ROWS, V, dtype)
            steps = slow_steps(CALLS[name], x, y)
            assert steps.unmoved == 0, (kind, dtype, steps)
            assert steps.most <= (PEAKS if kind == "confident" else 0), (kind, dtype, steps)


def check_odd_rows(name: str) -> None:
    """-inf and NaN take it in the steps that hold them, once each; peaks that rise, in each."""
    from bench import logits

    x, y = logits.pair("moved .1", 1, V, torch.bfloat16)
    assert slow_steps(CALLS[name], x, y).most == 0
    both = (x.clone(), y.clone())
    for t in both:
        t[0, 2 * 8192 + 5] = float("nan")
    assert slow_steps(CALLS[name], *both).unmoved == 1
    suppressed = (x.clone(), y.clone())
    for t in suppressed:
        t[0, 8192 + 7 :: 8192] = -torch.inf
    taken = slow_steps(CALLS[name], *suppressed)
    assert taken.unmoved == (0 if name in WITHOUT_INFINITIES else 3), taken
    rising = (x + torch.arange(V).div(8192, rounding_mode="floor") * 16).bfloat16()
    taken = slow_steps(CALLS[name], rising, rising)
    assert (taken.unmoved, taken.most) == (0, 2 if name == "softcap" else 3), taken


def check_jsd_is_read_once() -> None:
    """Rows that are near each other or equal; of those far apart most are swept again."""
    from bench import logits

    original, again = jsd.doubtful, []

    def counted(*args: Any) -> Any:
        again.append(bool(result := original(*args)))
        return result

    for kind in FINITE:
        x, y = logits.pair(kind, ROWS, V, torch.bfloat16)
        for beta in (0.1, 0.5):
            again.clear()
            with mock.patch.object(kl, "doubtful", counted):
                fasttax.token_kl(x, y, kind="jsd", beta=beta)
            assert len(again) == ROWS
            assert kind in ("far", "moved .3") or not any(again), (kind, beta)


def test_jsd_is_read_once() -> None:
    check_in_the_interpreter(__file__, "t.check_jsd_is_read_once()")


@pytest.mark.parametrize("name", CALLS)
def test_slow_steps(name: str) -> None:
    check_in_the_interpreter(__file__, f"t.check_finite_rows({name!r}); t.check_odd_rows({name!r})")
