"""What users call, on the fake CUDA: a training step in a graph, offloaded EWC, a second device.

Torch's own kernels do not run there: these look at what is asked of CUDA, not at numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import EWC, AdamWEWC
from tests.gpu.fake import cases, control

N, V = 64, 5000


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    control.reset()
    yield
    control.reset()


class Rows(nn.Module):
    """Logits that are its parameter: no product, for which the fake has no cuBLAS."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(N, V, device=device))


def fishers(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU, where their values can be looked at."""
    return {n: torch.ones(p.shape) for n, p in model.named_parameters()}


def step_of(device: torch.device, mode: str, on_device: bool, reduction: str) -> Callable[[], None]:
    """`on_device`: the rate is a tensor there, as a graph wants it."""
    model = Rows(device)
    ref = torch.empty(N, V, device=device)
    mask = torch.empty(N, dtype=torch.bool, device=device)
    ewc = EWC(model, fishers(model), strength=0.1)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-3, mode=mode)
    if on_device:  # torch asks a tensor whether it is right as it makes the optimizer
        optimizer.param_groups[0]["lr"] = torch.empty((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        kl = fasttax.token_kl(model.rows, ref, mask=mask, reduction=reduction)
        kl.backward(torch.empty_like(kl))
        ewc.add_grad_()
        optimizer.step()

    return step


@pytest.mark.parametrize("mode", ["grad", "prox_adam"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_step_is_captured(mode: str, reduction: str) -> None:
    """Forward, backward, EWC and AdamWEWC: nothing waits, nothing allocates by itself."""
    step = step_of(cases.FIRST, mode, True, reduction)
    side = torch.cuda.Stream(cases.FIRST)
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    control.clear()
    with torch.cuda.graph(graph, stream=side):
        step()
    kernels = [call for call in cases.captured() if call["call"] == "launch"]
    assert {call["stream"] for call in kernels} == {side.cuda_stream}
    for name in ("kl_", "ewc_kernel", "adamw_kernel"):
        assert any(f"fasttax::{name}" in call["kernel"] for call in kernels)
    graph.replay()


def test_a_step_asks_nothing_back() -> None:
    """Nor does one that is not captured wait for the device, with a number for its rate."""
    step = step_of(cases.FIRST, "grad", False, "mean")
    step()
    control.clear()
    step()
    asked = {call["call"] for call in control.log()}
    assert not {name for name in asked if "Synchronize" in name or name == "cudaMemcpy"}
    assert not any(call.get("pageable") for call in control.log())


@pytest.mark.parametrize("storage", ["fp32", "u8log"])
def test_offloaded_anchors_outlive_the_stream_that_brings_them(storage: str) -> None:
    """They come on a stream of their own: what computes waits for them, and their memory goes back
    to that stream only once what computes is past them."""
    model = Rows(cases.FIRST)
    ewc = EWC(model, fishers(model), strength=1.0, offload="cpu", storage=storage)
    compute = torch.cuda.Stream(cases.FIRST)
    with torch.cuda.stream(compute):
        ewc.add_grad_()
        control.clear()
        ewc.add_grad_()
        torch.cuda.current_stream().query()
    seen = control.log()
    copies = {c["stream"] for c in seen if c["call"] == "cudaMemcpyAsync"}
    assert len(copies) == 1
    assert compute.cuda_stream not in copies
    recorded = [
        c["event"] for c in seen if c["call"] == "cudaEventRecord" and c["stream"] in copies
    ]
    waits = [
        i
        for i, c in enumerate(seen)
        if c["call"] == "cudaStreamWaitEvent"
        and c["stream"] == compute.cuda_stream
        and c["event"] in recorded
    ]
    first = next(i for i, c in enumerate(seen) if "fasttax::" in c.get("kernel", ""))
    assert waits
    assert waits[0] < first
    # the allocator's events, one for each tensor that this stream has used and let go
    held = [
        c
        for c in seen[first:]
        if c["call"] == "cudaEventRecord" and c["stream"] == compute.cuda_stream
    ]
    assert len(held) >= (3 if storage == "u8log" else 2)


def test_offloaded_copies_wait_for_no_host() -> None:
    model = Rows(cases.FIRST)
    ewc = EWC(model, fishers(model), strength=1.0, offload="cpu")
    ewc.add_grad_()
    control.clear()
    ewc.add_grad_()
    assert not any("Synchronize" in c["call"] or c.get("pageable") for c in control.log())


@pytest.mark.parametrize("step", ["add_grad_", "AdamWEWC"])
def test_what_is_held_goes_once_where_the_model_went(step: str) -> None:
    """Trainers move models whose EWC was made before: at every step it would come over again."""
    model = Rows(torch.device("cpu"))
    ewc = EWC(model, fishers(model), strength=1.0)
    optimizer = AdamWEWC(model.parameters(), ewc=ewc, lr=1e-3)
    model.to(cases.FIRST)
    model.rows.grad = torch.empty_like(model.rows)
    for asked in (True, False):
        control.clear()
        ewc.add_grad_() if step == "add_grad_" else optimizer.step()
        assert any(c["call"] == "cudaMemcpyAsync" for c in control.log()) == asked


def test_a_model_on_another_device_than_the_current_one() -> None:
    step = step_of(cases.SECOND, "grad", False, "mean")
    with torch.cuda.device(0):
        control.clear()
        step()
        assert torch.cuda.current_device() == 0
    assert {call["device"] for call in control.launches()} == {1}


def test_large_tables_where_the_driver_takes_them() -> None:
    """300 parameters: with drivers of CUDA 12.0 a launch has 4 KB of arguments."""
    many = [torch.empty(5, device=cases.FIRST) for _ in range(300)]
    torch.ops.fasttax.ewc_penalty(many, many, many, [], 0.5)
    steps = [torch.empty((), device=cases.FIRST) for _ in many]
    numbers = [False, 0.5, 0.0, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.0, False, None, None]
    torch.ops.fasttax.ewc_adamw_(many, many, many, many, [], steps, many, many, [], *numbers)
    torch.ops.fasttax.accumulate_sqgrad_(many, many, 0.5)
    largest = max(call["arguments"] for call in control.launches())
    if int(os.environ["FAKE_CUDA_DRIVER"]) < 12010:
        assert 2048 < largest <= 4096
    else:
        assert 4096 < largest <= 32764
