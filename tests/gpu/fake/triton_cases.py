"""Every launch of fasttax.triton on the fake CUDA; test_gpu_launches.py runs this.

No kernel is compiled and none runs. Triton launches on the current device and in its current
stream, wherever its tensors are: both are written down where Triton would ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fasttax.triton import MODULES
from tests.gpu.fake import calls, cases, control, steps

FIRST, SECOND = cases.FIRST, cases.SECOND
NAMES = list(calls.OF_TRITON)
ON_A_TABLE = ("ewc_penalty", "ewc_add_grad_", "ewc_prox_", "ewc_adamw_", "accumulate_sqgrad_")
GRID = (2**31 - 1, 65535, 65535)  # the most blocks along each axis


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    device: int
    stream: int
    captured: bool
    tensors: list[Tensor]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What was launched, each onto the device that its tensors are on."""
    seen: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        device = torch.cuda.current_device()
        stream = torch.cuda.current_stream().cuda_stream
        tensors = [t for t in tree_leaves([args, constants]) if isinstance(t, Tensor)]
        assert {t.device for t in tensors} == {torch.device("cuda", device)}, self.__name__
        assert len(grid) <= 3
        assert all(0 < blocks <= most for blocks, most in zip(grid, GRID, strict=False)), grid
        captured = torch.cuda.is_current_stream_capturing()
        seen.append(Launch(self.__name__, tuple(grid), device, stream, captured, tensors))

    monkeypatch.setattr(JITFunction, "run", run)
    torch.cuda.set_device(0)
    control.reset()
    yield seen
    torch.cuda.set_device(0)
    control.reset()


def call(name: str, args: list[Any]) -> None:
    getattr(torch.ops.fasttax, calls.op_of(name))(*args)


def test_every_op_is_called() -> None:
    assert {calls.op_of(name) for name in NAMES} == set(MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_goes_to_its_tensors_device_and_that_devices_stream(
    name: str, launched: list[Launch]
) -> None:
    """cuda:0 is current, tensors are on cuda:1, whose current stream is none of the default."""
    args = calls.moved(calls.arguments(name), SECOND)
    launched.clear()
    side = torch.cuda.Stream(SECOND)
    with torch.cuda.stream(side):
        torch.cuda.set_device(0)
        call(name, args)
        assert torch.cuda.current_device() == 0
    assert {(one.device, one.stream) for one in launched} == {(1, side.cuda_stream)}
    # torch's own kernels and copies beside them
    others = [c for c in control.log() if c["call"] in ("launch", "cudaMemcpyAsync")]
    assert {c["stream"] for c in others} <= {side.cuda_stream}


@pytest.mark.parametrize("name", NAMES)
def test_waits_for_no_device(name: str) -> None:
    """Nor does a call that comes again bring anything over."""
    args = calls.moved(calls.arguments(name), FIRST)
    call(name, args)
    control.clear()
    call(name, args)
    asked = {c["call"] for c in control.log() if not c.get("within")}
    assert not {what for what in asked if "Synchronize" in what or "Memcpy" in what}


@pytest.mark.parametrize("name", NAMES)
def test_is_captured(name: str, launched: list[Launch]) -> None:
    args = calls.moved(calls.arguments(name), FIRST)
    call(name, args)
    before = {t.data_ptr() for one in launched for t in one.tensors if t.dtype == torch.int64}
    given = {t.data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
    launched.clear()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(FIRST)
    control.clear()
    with torch.cuda.graph(graph, stream=side):
        call(name, args)
    cases.captured()
    assert launched
    assert all(one.captured and one.stream == side.cuda_stream for one in launched)
    # a table that is kept may be another's memory when the graph runs
    tables = {t.data_ptr() for one in launched for t in one.tensors if t.dtype == torch.int64}
    assert not (tables & before) - given
    graph.replay()


@pytest.mark.parametrize("name", ON_A_TABLE)
def test_a_table_crosses_once_in_each_stream(name: str) -> None:
    """One that another stream brought may not be there yet."""
    args = calls.moved(calls.arguments(name), FIRST)
    for side in (torch.cuda.Stream(FIRST), torch.cuda.Stream(FIRST)):
        for expected in ({side.cuda_stream}, set()):
            control.clear()
            with torch.cuda.stream(side):
                call(name, args)
            copies = [c for c in control.log() if c["call"] == "cudaMemcpyAsync"]
            assert {c["stream"] for c in copies} == expected
            assert not any(c["pageable"] for c in copies)


def of_many_tokens(n: int) -> dict[str, list[Any]]:
    """Arguments of every op that takes tokens."""
    x, ids = torch.empty(n, 40, device=FIRST), torch.empty(n, dtype=torch.int64, device=FIRST)
    one, width = torch.empty(n, device=FIRST), torch.empty(40, device=FIRST)
    values, ends = torch.empty(6, n, device=FIRST), torch.arange(n + 1).to(FIRST)
    saved = torch.ops.fasttax.token_kl(x, x, None, *calls.KL)[1]
    of_both = torch.ops.fasttax.token_stats(x, x, None, None, *calls.SIDES)[1]
    weigh = [[values], [0, -1], [3, 4], None, None]
    return {
        "token_kl": [x, x, None, *calls.KL],
        "token_kl_grad": [one, x, x, None, *calls.KL, True, False],
        "token_kl_backward": [one, x, x, None, saved, *calls.KL, True, True],
        "token_kl_backward_": [one, x, x, None, saved, *calls.KL, False],
        "token_stats": [x, x, ids, None, *calls.SIDES],
        "token_stats_backward": [values, x, x, ids, None, of_both, *calls.SIDES, True, True],
        "token_weights": [one, None, None, 0, 1.0],
        "weigh_tokens": [*weigh, 0, 1.0, 5.0, False],
        "weigh_tokens_backward": [[one, one], [0, 1], *weigh, 0, 1.0, 5.0, False],
        "scale_held_": [x, one],
        "linear_sqgrad_": [torch.empty(40, 40, device=FIRST), x, x, ends, None],
        "bias_sqgrad_": [width, x, ends, None],
        "norm_sqgrad_": [width, x, x, ends, None],
        "embedding_sqgrad_": [torch.empty(9, 40, device=FIRST), ids, x, ends, None, -1],
        "label_variance_": [x],
    }


def test_tokens_beyond_65_535(launched: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks beyond that are along x: `run` refuses them along the others."""
    monkeypatch.setattr(Tensor, "sort", lambda t, stable: (t, t))  # torch's asks for more CUDA
    of_lists = ("ewc_", "accumulate_", "lora_")
    many = of_many_tokens(70_001)
    assert set(many) == {op for op in MODULES if not op.startswith(of_lists)}
    for name, args in many.items():
        launched.clear()
        call(name, args)
        assert launched, name


@pytest.mark.parametrize("mode", ["grad", "prox_adam"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_step_is_captured(mode: str, reduction: str, launched: list[Launch]) -> None:
    """Forward, backward, EWC and AdamWEWC: nothing waits, nothing allocates by itself."""
    step = steps.step_of(FIRST, mode, True, reduction)
    side = torch.cuda.Stream(FIRST)
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    control.clear()
    launched.clear()
    with torch.cuda.graph(graph, stream=side):
        step()
    cases.captured()
    assert all(one.captured and one.stream == side.cuda_stream for one in launched)
    assert {"forward_kernel", "ewc_kernel", "adamw_kernel"} <= {one.kernel for one in launched}
    graph.replay()


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_that_fails_is_an_error_that_names_the_op(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = calls.moved(calls.arguments(name), FIRST)

    def run(self: Any, *args: Any, **options: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    monkeypatch.setattr(JITFunction, "run", run)
    said = rf"^fasttax::{calls.op_of(name)}: the Triton launch failed: Triton Error \[CUDA\]: inv"
    with pytest.raises(RuntimeError, match=said) as caught:
        call(name, args)
    assert "FASTTAX_BACKEND=reference" in str(caught.value)
