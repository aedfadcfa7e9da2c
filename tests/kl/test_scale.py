"""scale= multiplies values and gradients of every function of tokens, on every way that they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasttax
from fasttax.kl import gradients
from fasttax.kl import weigh as kl_weigh
from tests.tools.kl_cases import KINDS, run_oracle
from tests.tools.utils import assert_says


@pytest.fixture(autouse=True, params=["plainly", "by ops"])
def way_of_the_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a function as on a CPU, and as on a GPU."""
    if request.param == "by ops":
        for module in (kl_weigh, gradients):
            monkeypatch.setattr(module, "by_ops", lambda device: True)


MASK, WEIGHT = torch.tensor([True, True, False, True, True, True]), torch.linspace(-1, 2, 6)
POWERS, OTHERS = (2.0, -0.25, 1.0), (0.3, -1.7, 0.0)
Leaves = tuple[Tensor, ...]
Function = Callable[..., Tensor]


def logits(dtype: torch.dtype = torch.float32) -> Leaves:
    return tuple(z.to(dtype).requires_grad_() for z in torch.randn(2, 6, 41))


def heads() -> Leaves:
    """Hidden states and heads of both models."""
    return tuple(torch.randn(n, 7).requires_grad_() for n in (6, 41, 6, 41))


def of_stats(name: str) -> Function:
    def value(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        ids = torch.arange(6) * 5
        result: Tensor = getattr(fasttax.token_stats(x, y, ids, outputs=name, **options), name)
        return result

    return value


def topk(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return fasttax.topk_kl(x, *fasttax.topk_logprobs(y.detach(), 5), **options)


def estimate(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return fasttax.kl_estimate(x[:, 0], y[:, 0], old_logp=x[:, 1], **options)


def linear(h: Tensor, w: Tensor, g: Tensor, v: Tensor, **options: Any) -> Tensor:
    options["token_weight"] = options.pop("weight", None)
    value: Tensor = fasttax.linear_token_kl(h, w, g, v, **options)
    return value


def linear_entropy(*leaves: Tensor, **options: Any) -> Tensor:
    kl, entropy = linear(*leaves, return_entropy=True, **options)
    return torch.stack((kl, entropy))


def linear_logp(h: Tensor, w: Tensor, g: Tensor, v: Tensor, **options: Any) -> Tensor:
    options["token_weight"] = options.pop("weight", None)
    logp = fasttax.linear_token_logprobs(h, w, torch.arange(6), **options).logp
    assert logp is not None
    return logp


def inplace(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return fasttax.token_kl(x * 1, y, inplace_backward=True, **options)


WAYS: dict[str, tuple[Function, Callable[[], Leaves], dict[str, Any]]] = {
    "token_kl": (fasttax.token_kl, logits, {}),
    "token_kl of bfloat16": (fasttax.token_kl, lambda: logits(torch.bfloat16), {}),
    "token_kl of float16": (fasttax.token_kl, lambda: logits(torch.float16), {}),
    "token_kl in place": (inplace, logits, {}),
    **{f"token_stats {name}": (of_stats(name), logits, {}) for name in ("logp", "kl", "k3")},
    "token_stats jsd": (of_stats("kl"), logits, {"kind": "jsd"}),
    "topk_kl": (topk, logits, {}),
    "kl_estimate": (estimate, logits, {}),
    "linear_token_kl": (linear, heads, {}),
    "linear_token_kl again": (linear, heads, {"grad_mode": "recompute", "token_chunk": 4}),
    "linear_token_kl by tiles": (linear, heads, {"vocab_chunk": 16}),
    "linear_token_kl and entropy": (linear_entropy, heads, {}),
    "linear_token_logprobs": (linear_logp, heads, {}),
}


def run(function: Function, leaves: Leaves, **options: Any) -> tuple[Tensor, ...]:
    """The value, and the gradients by all leaves of its weighed sum."""
    value = function(*leaves, **options)
    upstream = torch.linspace(1, 2, value.numel()).reshape(value.shape).to(value.dtype)
    d = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
    return value.detach(), *[torch.zeros(()) if g is None else g for g in d]


TOKENS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": MASK},
    "weight and mask": {"weight": WEIGHT, "mask": MASK},
}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_product(way: str, reduction: str) -> None:
    """To the bit for powers of two; else within the roundings of the gradient's dtype."""
    function, make, of_way = WAYS[way]
    leaves = make()
    eps = torch.finfo(leaves[0].dtype).eps
    for tokens in TOKENS.values():
        options = {**of_way, **tokens, "reduction": reduction}
        plain = run(function, leaves, **options)
        for scale in (*POWERS, *OTHERS):
            for given in (scale, torch.tensor(scale)):
                scaled = run(function, leaves, scale=given, **options)
                for one, other in zip(plain, scaled, strict=True):
                    if scale in POWERS and way != "token_kl of float16":  # which underflows
                        assert torch.equal(one * scale, other), scale
                    slack = 4 * max(eps, 1e-6) * abs(scale) * float(one.abs().max())
                    torch.testing.assert_close(one * scale, other, rtol=4 * eps, atol=slack)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str, reduction: str) -> None:
    x, y = logits()
    by_token = -0.3 * WEIGHT * MASK / (5 if reduction == "mean" else 1)
    got = fasttax.token_kl(
        x, y, kind=kind, weight=WEIGHT, mask=MASK, scale=-0.3, reduction=reduction
    )
    value, d_x, d_y = run_oracle(x, y, by_token, torch.float64, kind=kind)
    truth = value * by_token.double()
    if reduction != "none":
        truth = truth.sum()
    torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=1e-7)
    got.sum().backward()
    torch.testing.assert_close(x.grad.double(), d_x, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(y.grad.double(), d_y, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["token_kl", "token_stats k3", "kl_estimate", "linear_token_kl"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(way: str, reduction: str) -> None:
    function, make, _ = WAYS[way]
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in make())
    options = {"scale": -0.7, "reduction": reduction, "weight": WEIGHT, "mask": MASK}
    assert torch.autograd.gradcheck(lambda *z: function(*z, **options), leaves)


@pytest.mark.parametrize("way", ["token_kl", "token_stats k3", "kl_estimate", "linear_token_kl"])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(reduction: str, scale: Any, way: str) -> None:
    function, make, _ = WAYS[way]
    leaves = make()
    options = {"scale": scale, "reduction": reduction, "mask": MASK}
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        run(compiled, leaves, **options), run(function, leaves, **options), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_torch_func() -> None:
    x, y = (z.detach() for z in logits())
    d = torch.func.grad(lambda z: fasttax.token_kl(z, y, scale=0.3, reduction="mean"))(x)
    (expected,) = torch.autograd.grad(
        0.3 * fasttax.token_kl(z := x.clone().requires_grad_(), y, reduction="mean"), z
    )
    torch.testing.assert_close(d, expected)
    rows = torch.func.vmap(lambda a, b: fasttax.token_kl(a, b, scale=0.3))(x, y)
    torch.testing.assert_close(rows, 0.3 * fasttax.token_kl(x, y))


def test_a_tensor_scale_may_be_learned() -> None:
    x, y = logits()
    scale = torch.tensor(0.3, requires_grad=True)
    for reduction in ("none", "mean"):
        (d,) = torch.autograd.grad(
            fasttax.token_kl(x, y, scale=scale, reduction=reduction).sum(), scale
        )
        torch.testing.assert_close(d, fasttax.token_kl(x, y, reduction=reduction).detach().sum())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """One rank, whose shard is the whole vocabulary."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "way", ["token_kl", "token_stats k3", "token_stats jsd", "linear_token_kl"]
)
def test_over_ranks(way: str, group: Any) -> None:
    function, make, of_way = WAYS[way]
    leaves = make()
    for reduction in ("none", "mean"):
        options = {**of_way, "tp_group": group, "reduction": reduction, "mask": MASK}
        plain = run(function, leaves, **options)
        for one, other in zip(plain, run(function, leaves, scale=0.5, **options), strict=True):
            assert torch.equal(one * 0.5, other)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_scale(way: str) -> None:
    function, make, of_way = WAYS[way]
    leaves = make()

    def with_scale(scale: Any) -> Callable[[], Tensor]:
        return lambda: function(*leaves, scale=scale, **of_way)

    for wrong in (math.nan, math.inf, -math.inf, 1e39):
        assert_says(with_scale(wrong), ValueError, ["scale: expected a finite number", repr(wrong)])
    name = "token_weight" if way.startswith("linear") else "weight"
    words = ["scale: expected a finite number or a 0-d tensor", f"pass a factor a token as {name}="]
    assert_says(with_scale(torch.ones(6)), ValueError, words)
    assert_says(
        with_scale(torch.ones((), device="meta")), ValueError, ["scale: expected a tensor on cpu"]
    )
    function(*leaves, **of_way, weight=torch.ones(6))  # the way out


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_weight_under_the_mask_leaves_the_scales_gradient_alone(reduction: str) -> None:
    """NaN where the mask is false, as padding may hold, is in no gradient."""
    torch.manual_seed(3)
    x, y = logits()
    weight = WEIGHT.masked_fill(~MASK, math.nan)
    scale = torch.tensor(0.7, requires_grad=True)
    options = {"mask": MASK, "reduction": reduction}
    value = fasttax.token_kl(x, y, weight=weight, scale=scale, **options).sum()
    plain = fasttax.token_kl(x, y, weight=WEIGHT, **options).sum()
    (found,) = torch.autograd.grad(value, [scale])
    torch.testing.assert_close(found, plain.detach())


def test_half_width_weight_and_scale_are_multiplied_in_the_values_dtype() -> None:
    torch.manual_seed(3)
    x, y = logits()
    weight, scale = WEIGHT.bfloat16(), torch.tensor(0.7).bfloat16()
    found = fasttax.token_kl(x, y, weight=weight, scale=scale)
    torch.testing.assert_close(found, fasttax.token_kl(x, y, weight=weight, scale=float(scale)))
