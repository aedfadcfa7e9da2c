"""Every launch of csrc/cuda on the fake CUDA, preloaded; test_gpu_launches.py runs this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.fake import calls, control

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
NAMES = list(calls.ARGUMENTS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """An H100 of one multiprocessor: no row is split, whose tickets torch's kernel would zero."""
    torch.cuda.set_device(0)
    control.reset()
    control.limits(1, 9, 232448, 233472, 16)
    yield
    torch.cuda.set_device(0)
    control.reset()


def equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype
        loose = 2e-2 if true.dtype == torch.bfloat16 else 3e-4
        torch.testing.assert_close(calls.home(mine), true, rtol=loose, atol=1e-2 * loose)


# --- the device, the stream -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_goes_to_its_tensors_device_and_that_devices_stream(name: str) -> None:
    """cuda:0 is current, tensors are on cuda:1, whose current stream is none of the default."""
    args = calls.moved(calls.arguments(name), SECOND)
    side = torch.cuda.Stream(SECOND)
    with torch.cuda.stream(side):
        torch.cuda.set_device(0)
        control.run(control.ALL)
        found = calls.call(name, args)
        assert torch.cuda.current_device() == 0
    asked = [c for c in control.log() if c["call"] == "cudaDeviceGetAttribute"]
    assert {c["of"] for c in asked} <= {1}
    seen = control.launches()
    assert seen
    assert {launch["device"] for launch in seen} == {1}
    assert {launch["stream"] for launch in seen} == {side.cuda_stream}
    equal(found, calls.truth(name))


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_current_stream(name: str) -> None:
    args = calls.moved(calls.arguments(name), FIRST)
    streams = [torch.cuda.Stream(FIRST) for _ in range(2)]
    for stream in streams:
        control.clear()
        with torch.cuda.stream(stream):
            calls.call(name, args)
        assert {launch["stream"] for launch in control.launches()} == {stream.cuda_stream}
    control.clear()
    calls.call(name, args)
    assert {launch["stream"] for launch in control.launches()} == {0}


# --- errors ---------------------------------------------------------------------------------------


def launch_count(name: str) -> int:
    calls.call(name, calls.moved(calls.arguments(name), FIRST))
    return len(control.launches())


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_that_fails_is_an_error_that_names_the_op(name: str) -> None:
    for which in range(launch_count(name)):
        args = calls.moved(calls.arguments(name), FIRST)
        control.fail("fasttax::", control.OUT_OF_RESOURCES, after=which)
        with pytest.raises(RuntimeError) as caught:
            calls.call(name, args)
        said = str(caught.value)
        assert f"fasttax::{calls.op_of(name)}: the CUDA launch failed: " in said
        assert "too many resources" in said
        # nor does the next one, of whatever op, take the blame for it
        assert control.last_error() == 0
        calls.call("ewc_penalty", calls.moved(calls.arguments("ewc_penalty"), FIRST))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (control.NO_IMAGE, ("TORCH_CUDA_ARCH_LIST", "FASTTAX_BACKEND to triton or reference")),
        (control.PTX_TOO_NEW, ("driver", "FASTTAX_BACKEND to triton or reference")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_that_the_library_is_not_for(name: str, error: int, words: tuple[str, ...]) -> None:
    args = calls.moved(calls.arguments(name), FIRST)
    control.fail("fasttax::", error)
    with pytest.raises(RuntimeError, match=f"fasttax::{calls.op_of(name)}: ") as caught:
        calls.call(name, args)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["token_kl", "token_kl_grad", "scale_held_"])
def test_a_device_that_does_not_answer(name: str) -> None:
    args = calls.moved(calls.arguments(name), FIRST)
    control.fail("cudaDeviceGetAttribute", control.INVALID_VALUE)
    with pytest.raises(RuntimeError, match=f"fasttax::{calls.op_of(name)}: .*invalid argument"):
        calls.call(name, args)
    assert control.last_error() == 0


# --- graphs ---------------------------------------------------------------------------------------

# what a captured path may ask beside launches: answers of the host, and the order of streams
ASKS = {
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaOccupancyMaxActiveClusters",
    "cudaEventRecord",
    "cudaStreamWaitEvent",
}


def captured() -> list[control.Call]:
    """What went on while a graph was captured; torch's allocator may take its own memory."""
    seen = [call for call in control.log() if call["capturing"] and not call.get("within")]
    others = {c["call"] for c in seen} - ASKS - {"launch", "cudaMalloc", "cudaMemsetAsync"}
    assert not others, [c for c in seen if c["call"] in others]
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_is_captured(name: str) -> None:
    args = calls.moved(calls.arguments(name), FIRST)
    calls.call(name, args)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(FIRST)
    control.clear()
    with torch.cuda.graph(graph, stream=side):
        calls.call(name, args)
    launches = [c for c in captured() if c["call"] == "launch"]
    assert any("fasttax::" in c["kernel"] for c in launches)
    assert {c["stream"] for c in launches} == {side.cuda_stream}
    graph.replay()


# --- sizes ----------------------------------------------------------------------------------------

# multiprocessors, compute capability, bytes of shared memory a block and an SM, largest cluster
DEVICES = {
    "A100": (108, 8, 166912, 167936, 1),
    "RTX 3090": (82, 8, 101376, 102400, 1),
    "H100": (132, 9, 232448, 233472, 16),
    "slice of an H100": (16, 9, 232448, 233472, 2),
    "RTX 5090": (170, 12, 101376, 102400, 8),
}
VOCABULARIES = (1, 1000, 10_007, 16_384, 49152, 128256, 151936, 262144, 2**19 + 1, 2**24, 2**28 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", list(DEVICES))
def test_shared_memory_and_grids_fit_the_device(device: str, dtype: torch.dtype) -> None:
    """The fake refuses what does not; clusters and large shared memory are used where they fit."""
    control.limits(*DEVICES[device])
    ops = torch.ops.fasttax
    clusters, shared = 1, 0
    for v in VOCABULARIES:
        for n in (1, 3, 300, 70_000):
            row = torch.empty(1, v, dtype=dtype, device=FIRST)
            x = row.expand(n, v)  # 70 000 rows of 2^28 entries are one in memory
            weight = torch.empty(n, device=FIRST)
            for options in (calls.KL, calls.JSD):
                _, saved = ops.token_kl(x, x, None, *options)
                if n * v < 2**36:
                    ops.token_kl_backward(weight, x, x, None, saved, *options, True, True)
                    ops.token_kl_grad(weight, x, x, None, *options, True, False)
            ops.token_stats(x, x, None, None, *calls.SIDES)
            for launch in control.launches():
                clusters = max(clusters, launch["cluster"])
                shared = max(shared, launch["shared"])
            control.clear()
    assert clusters <= DEVICES[device][4]
    assert (clusters > 1) == (DEVICES[device][4] > 1)
    assert 48 * 1024 < shared <= DEVICES[device][2]


@pytest.mark.parametrize("v", [49152, 151936, 262144])
def test_rows_of_bfloat16_up_to_256k_are_read_once(v: int) -> None:
    """By an H100: a row pair is held on chip, in a cluster's shared memory, and a gradient written
    from there."""
    control.limits(*DEVICES["H100"])
    x, weight = torch.empty(4, v, dtype=torch.bfloat16, device=FIRST), torch.empty(4, device=FIRST)
    torch.ops.fasttax.token_kl_grad(weight, x, x, None, *calls.KL, True, False)
    (launch,) = control.launches()
    assert "kl_resident_kernel" in launch["kernel"]
    assert 4 * v <= launch["cluster"] * launch["shared"]


def test_a_cluster_that_is_refused_leaves_no_error() -> None:
    """The next launch is another one, and goes."""
    control.limits(132, 9, 232448, 233472, 16)
    x = torch.empty(4, 151936, dtype=torch.float32, device=FIRST)
    for failed in ("cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters"):
        control.fail(failed, control.INVALID_VALUE)
        weight = torch.empty(4, device=FIRST)
        torch.ops.fasttax.token_kl_grad(weight, x, x, None, *calls.KL, True, False)
        assert control.last_error() == 0


def last_rows(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of n rows, of which only the last is written, and the last one of each on the CPU."""
    generator = torch.Generator().manual_seed(2)
    ends = [(3 * torch.randn(1, v, generator=generator)).to(dtype) for _ in range(2)]
    x, y = (torch.empty(n, v, dtype=dtype, device=FIRST) for _ in ends)
    x[-1:].copy_(ends[0])
    y[-1:].copy_(ends[1])
    return x, y, ends[0], ends[1]


@pytest.mark.parametrize(("n", "v"), [(70_001, 40), (16_600, 131_072)])
def test_rows_beyond_65_535_and_entries_beyond_2_to_the_31(n: int, v: int) -> None:
    """The last row's block runs: at such an offset it finds the row, and writes its own."""
    ops, one = torch.ops.fasttax, torch.tensor([0.7])
    x, y, x_end, y_end = last_rows(n, v, torch.bfloat16)
    weight = torch.empty(n, device=FIRST)
    weight[-1:].copy_(one)
    control.run(1)
    kl, saved = ops.token_kl(x, y, None, *calls.KL)
    d_x, d_y = ops.token_kl_backward(weight, x, y, None, saved, *calls.KL, True, True)
    true_kl, true_saved = ops._reference_token_kl(x_end, y_end, None, *calls.KL)
    true = ops._reference_token_kl_backward(
        one, x_end, y_end, None, true_saved, *calls.KL, True, True
    )
    equal([kl[-1:], d_x[-1:], d_y[-1:]], [true_kl, *true])
    control.run(16)  # a cluster
    kl, d_x, _ = ops.token_kl_grad(weight, x, y, None, *calls.KL, True, False)
    equal([kl[-1:], d_x[-1:]], [true_kl, true[0]])
    values, _ = ops.token_stats(x, y, None, None, *calls.SIDES)
    true_values, _ = ops._reference_token_stats(x_end, y_end, None, None, *calls.SIDES)
    equal([row[-1:] for row in values.unbind()], list(true_values.unbind()))


HUGE = 2**31 + 70_001  # elements of one tensor
TAIL = 4_465  # of its last chunks, of 2^16 and of 2^15 elements alike


@pytest.fixture
def _zeros() -> Iterator[None]:
    """Memory is fresh, and 0: what blocks that do not run leave of a sum."""
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        yield


def with_end(value: Tensor) -> Tensor:
    """A tensor of HUGE elements that is zero before its end."""
    whole = torch.empty(HUGE, dtype=value.dtype, device=FIRST)
    whole[-TAIL:].copy_(value)
    return whole


@pytest.mark.usefixtures("_zeros")
def test_parameters_beyond_2_to_the_31_elements() -> None:
    ops = torch.ops.fasttax
    generator = torch.Generator().manual_seed(3)
    ends = [torch.rand(TAIL, generator=generator).bfloat16() for _ in range(4)]
    control.run(1)
    theta, grad, anchor, fisher = map(with_end, ends)
    value = ops.ewc_add_grad_([theta], [grad], [anchor], [fisher], [], 0.5, 1.0, None)
    expected = ops._reference_ewc_add_grad_(*([t] for t in ends), [], 0.5, 1.0, None)
    equal([value, grad[-TAIL:]], [expected, ends[1]])
    ops.ewc_prox_([theta], [anchor], [fisher], [], 0.5, None)
    ops._reference_ewc_prox_([ends[0]], [ends[2]], [ends[3]], [], 0.5, None)
    equal([theta[-TAIL:]], [ends[0]])
    sums = torch.rand(TAIL, generator=generator)
    whole = with_end(sums)
    ops.accumulate_sqgrad_([whole], [grad], 0.25)
    ops._reference_accumulate_sqgrad_([sums], [ends[1]], 0.25)
    equal([whole[-TAIL:]], [sums])


@pytest.mark.usefixtures("_zeros")
def test_a_step_beyond_2_to_the_31_elements() -> None:
    generator = torch.Generator().manual_seed(4)
    ends = [torch.rand(TAIL, generator=generator) for _ in range(6)]
    steps = [torch.tensor(3.0), torch.tensor(3.0).to(FIRST)]
    numbers = [False, 0.5, 0.0, torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.01, False, None, None]
    theta, grad, first, second, anchor, fisher = map(with_end, ends)
    control.run(1)
    ops = torch.ops.fasttax
    value = ops.ewc_adamw_(
        [theta], [grad], [first], [second], [], [steps[1]], [anchor], [fisher], [], *numbers
    )
    t, g, m, s, a, f = ends
    expected = ops._reference_ewc_adamw_([t], [g], [m], [s], [], [steps[0]], [a], [f], [], *numbers)
    equal([value, theta[-TAIL:], first[-TAIL:], second[-TAIL:]], [expected, t, m, s])
    assert float(steps[1].cpu()) == 4.0


def test_a_held_gradient_beyond_2_to_the_31_entries() -> None:
    rows, width = 16_600, 131_072
    end, factor = torch.randn(1, width).bfloat16(), torch.full((rows,), 3.0)
    held = torch.empty(rows, width, dtype=torch.bfloat16, device=FIRST)
    held[-1:].copy_(end)
    control.limits(40_000, 9, 232448, 233472, 16)  # a block a chunk
    control.run(width // 8192)
    torch.ops.fasttax.scale_held_(held, factor.to(FIRST))
    equal([held[-1:]], [3 * end])


def test_tokens_beyond_65_535() -> None:
    n = 70_001
    values = torch.randn(6, n, generator=torch.Generator().manual_seed(6))
    args = [[values], [0, -1], [3, 4], None, None, 0, 1.0, 5.0, False]
    control.run(control.ALL)
    found = torch.ops.fasttax.weigh_tokens(*calls.moved(args, FIRST))
    equal(found, torch.ops.fasttax._reference_weigh_tokens(*args))
