"""The CUDA EWC kernels on a GPU against fasttax.reference; tests/gpu/test_cuda_ewc.py is what can
be shown without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttax
from fasttax import reference
from fasttax._base import library

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("native"),
]

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
MIXES = {  # theta, anchor, fisher, grad
    "float32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.bfloat16, torch.float32, torch.float16),
    "u8log": (torch.float32, torch.bfloat16, torch.uint8, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64, torch.float64),
}


@pytest.fixture
def native() -> None:
    if "_C_cuda" in library.problems:
        pytest.skip(f"_C_cuda is not loaded: {library.problems['_C_cuda']}")


def lists(mix: str) -> Lists:
    """theta, grads, anchors, fishers, scales: 140 small tensors (a large table), two of several
    chunks, one of them misaligned.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    out: Lists = ([], [], [], [], [])
    kinds = MIXES[mix]
    for n in [*range(140), 3 * 65536 + 5, 200_001]:
        tensors = []
        for k, dtype in enumerate(kinds):
            shift = 1 if n == 200_001 else 0
            x = torch.randn(n + shift, generator=generator, device="cuda", dtype=torch.float64)
            values = (
                torch.randint(0, 256, x.shape, generator=generator, device="cuda")
                if dtype == torch.uint8
                else x.square()
                if k == 2
                else x
            )
            tensors.append(values.to(dtype)[shift:])
        blocks = (n + 255) // 256
        scales = torch.stack([torch.full((blocks,), -20.0), torch.full((blocks,), 0.08)], 1).cuda()
        for target, tensor in zip(
            out, (tensors[0], tensors[3], tensors[1], tensors[2], scales), strict=True
        ):
            target.append(tensor)
    return out


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To two roundings of the tensor's dtype, and eight of the arithmetic's at the tensor's scale
    (sums cancel); exp2 of u8log costs 2e-5.
    """
    for g, w in zip(got, want, strict=True):
        inner = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
        scale = w.abs().max().item() if w.numel() else 0.0
        rtol = 2 * torch.finfo(w.dtype).eps + (0 if w.dtype == torch.float64 else 2e-5)
        torch.testing.assert_close(g, w, rtol=rtol, atol=8 * inner * scale)


@pytest.mark.parametrize("mix", list(MIXES))
def test_equals_reference(mix: str) -> None:
    theta, grads, anchors, fishers, scales = lists(mix)
    value = torch.ops.fasttax.ewc_penalty(theta, anchors, fishers, scales, 3.0)
    torch.testing.assert_close(
        value, reference.ewc_penalty(theta, anchors, fishers, scales, 3.0), rtol=1e-5, atol=0
    )
    upstream = torch.tensor(0.7, device="cuda", dtype=value.dtype)
    assert_close(
        torch.ops.fasttax.ewc_penalty_backward(upstream, theta, anchors, fishers, scales, 3.0),
        reference.ewc_penalty_backward(upstream, theta, anchors, fishers, scales, 3.0),
    )
    got, want = clones(grads), clones(grads)
    value = torch.ops.fasttax.ewc_add_grad_(theta, got, anchors, fishers, scales, 3.0, 0.5)
    torch.testing.assert_close(
        value,
        reference.ewc_add_grad_(theta, want, anchors, fishers, scales, 3.0, 0.5),
        rtol=1e-5,
        atol=0,
    )
    assert_close(got, want)
    got, want = clones(theta), clones(theta)
    torch.ops.fasttax.ewc_prox_(got, anchors, fishers, scales, 0.3)
    reference.ewc_prox_(want, anchors, fishers, scales, 0.3)
    assert_close(got, want)


@pytest.mark.parametrize("mix", [m for m in MIXES if m != "u8log"])
def test_accumulate_sqgrad_equals_reference(mix: str) -> None:
    grads = lists(mix)[1]
    got = [
        torch.rand_like(g, dtype=torch.float64 if mix == "float64" else torch.float32)
        for g in grads
    ]
    want = clones(got)
    torch.ops.fasttax.accumulate_sqgrad_(got, grads, 0.3)
    torch.ops.fasttax._reference_accumulate_sqgrad_(want, grads, 0.3)
    assert_close(got, want)


def test_autograd_and_the_anchor() -> None:
    theta, _, anchors, fishers, _ = lists("float32")
    leaves = [t.requires_grad_() for t in theta]
    value = fasttax.functional.ewc_penalty(leaves, anchors, fishers, 3.0)
    gradients = torch.autograd.grad(2 * value, leaves)
    assert_close(
        gradients, [6 * f * (t - a) for t, a, f in zip(theta, anchors, fishers, strict=True)]
    )
    at_anchor = [a.clone().requires_grad_() for a in anchors]
    value = fasttax.functional.ewc_penalty(at_anchor, anchors, fishers, 3.0)
    assert value.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(value, at_anchor))


def test_is_deterministic() -> None:
    theta, _, anchors, fishers, scales = lists("bf16")
    values = {
        torch.ops.fasttax.ewc_penalty(theta, anchors, fishers, scales, 1.0).item()
        for _ in range(20)
    }
    assert len(values) == 1


def test_graph_capture() -> None:
    """Capture refuses a synchronisation, and a replay must read the tensors anew."""
    theta, grads, anchors, fishers, scales = lists("float32")
    torch.ops.fasttax.ewc_add_grad_(theta, clones(grads), anchors, fishers, scales, 1.0, 1.0)
    captured = clones(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = torch.ops.fasttax.ewc_add_grad_(theta, captured, anchors, fishers, scales, 1.0, 1.0)
        d_theta = torch.ops.fasttax.ewc_penalty_backward(
            value, theta, anchors, fishers, scales, 1.0
        )
    for t in theta:
        t.mul_(1.5)
    graph.replay()
    want = clones(grads)
    expected = reference.ewc_add_grad_(theta, want, anchors, fishers, scales, 1.0, 1.0)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert_close(captured, want)
    assert_close(
        d_theta, reference.ewc_penalty_backward(expected, theta, anchors, fishers, scales, 1.0)
    )


def test_uses_the_current_stream() -> None:
    theta, _, anchors, fishers, scales = lists("float32")
    want = torch.ops.fasttax.ewc_penalty(theta, anchors, fishers, scales, 1.0) * 4
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            10_000_000
        )  # work on another stream would read theta before it is doubled
        for t, a in zip(theta, anchors, strict=True):
            t.copy_(a + 2 * (t - a))
        value = torch.ops.fasttax.ewc_penalty(theta, anchors, fishers, scales, 1.0)
    stream.synchronize()
    torch.testing.assert_close(value, want, rtol=1e-4, atol=0)


def test_refuses_lists_on_two_devices() -> None:
    theta, _, anchors, fishers, scales = lists("float32")
    with pytest.raises(RuntimeError, match=r"anchors\[3\].*device of params"):
        torch.ops.fasttax.ewc_penalty(
            theta, [*anchors[:3], anchors[3].cpu(), *anchors[4:]], fishers, scales, 1.0
        )


def adamw_arguments(mix: str, prox: bool) -> dict[str, Any]:
    theta, grads, anchors, fishers, scales = lists(mix)
    m, v = (
        [torch.rand_like(t, dtype=torch.float32).add(0.1).to(t.dtype) for t in theta]
        for _ in range(2)
    )
    steps = [torch.full((), float(i % 3), device="cuda") for i in range(len(theta))]
    # not held
    anchors = [torch.empty(0, device="cuda") if i % 5 == 4 else a for i, a in enumerate(anchors)]
    rate = torch.tensor(0.01, device="cuda")
    return {
        "params": theta,
        "grads": grads,
        "exp_avgs": m,
        "exp_avg_sqs": v,
        "max_exp_avg_sqs": [],
        "steps": steps,
        "anchors": anchors,
        "fishers": fishers,
        "scales": scales,
        "prox_mode": prox,
        "strength": 0.4,
        "second_moment": 0.0,
        "lr": rate,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-3,
        "weight_decay": 0.01,
        "maximize": False,
        "grad_scale": torch.tensor(8.0, device="cuda"),
        "found_inf": torch.tensor(0.0, device="cuda"),
    }


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps")


@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("mix", [m for m in MIXES if m != "fp16"])
def test_adamw_equals_reference(mix: str, prox: bool) -> None:
    got, want = adamw_arguments(mix, prox), adamw_arguments(mix, prox)
    value = torch.ops.fasttax.ewc_adamw_(**got)
    torch.testing.assert_close(value, reference.ewc_adamw_(**want), rtol=1e-4, atol=0)
    for k in WRITTEN:
        assert_close(got[k], want[k])


def test_adamw_in_a_graph_reads_its_scalars_anew() -> None:
    captured, want = adamw_arguments("float32", True), adamw_arguments("float32", True)
    torch.ops.fasttax.ewc_adamw_(**adamw_arguments("float32", True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.fasttax.ewc_adamw_(**captured)
    for rate in (0.02, 0.03):
        for arguments in (captured, want):
            arguments["lr"].fill_(rate)
        graph.replay()
        reference.ewc_adamw_(**want)
    captured["found_inf"].fill_(1.0)
    graph.replay()  # a skipped step
    for k in WRITTEN:
        assert_close(captured[k], want[k])
