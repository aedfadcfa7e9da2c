"""EWC's factors that lie in tensors (a GradScaler's scale, found_inf, a learning rate): in the one
pass over the parameters, without a look at them from the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttax
from fasttax import reference
from fasttax._base.packed import SPLIT, encode, encode_anchor
from tests.tools.syncs import NoSync
from tests.tools.utils import assert_says

SIZES = (3, 700, 65536 + 9)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 9)).to(dtype)


def held(model: nn.Module, storage: str = "fp32") -> fasttax.EWC:
    """Weights that have moved from their anchors, with gradients."""
    torch.manual_seed(1)
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    ewc = fasttax.EWC(model, fisher, strength=0.7, storage=storage)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
        p.grad = torch.randn_like(p)
    return ewc


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_only_takes_what_is_gone_through_once() -> None:
    """Of module.parameters() nothing would be left for the second look: no gradient, no word."""
    one, other = net(), net()
    for model, only in ((one, one[0].parameters()), (other, list(other[0].parameters()))):
        ewc = held(model)
        assert float(ewc.add_grad_(only=only)) > 0
        ewc.prox_(0.1, only=model[2].parameters())
    assert all(map(torch.equal, grads(one), grads(other)))
    fresh = net()
    held(fresh)
    assert not torch.equal(fresh[2].weight, one[2].weight)
    assert torch.equal(fresh[0].weight, one[0].weight)


@pytest.mark.parametrize("only", ["weight", torch.ones(2), 3, ["0.weight"]], ids=str)
def test_what_is_no_parameters_is_refused(only: Any) -> None:
    ewc = held(net())
    assert_says(
        lambda: ewc.add_grad_(only=only), TypeError, ("EWC.add_grad_", "only", "parameters")
    )
    assert_says(lambda: ewc.prox_(0.1, only=only), TypeError, ("EWC.prox_", "only", "parameters"))


@pytest.mark.parametrize("storage", ["fp32", "bf16", "u8log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_scales_as_its_number(dtype: torch.dtype, storage: str) -> None:
    plain = net(dtype)
    scaled = copy.deepcopy(plain)
    want = held(plain, storage).add_grad_(384.0)
    for scale in (
        torch.tensor(384.0),
        torch.tensor([384.0], dtype=torch.float64),
        torch.tensor(384, dtype=torch.int64),
        torch.tensor(384.0, dtype=torch.bfloat16, requires_grad=True),
    ):
        model = copy.deepcopy(scaled)
        ewc = held(model, storage)
        with NoSync() as seen:
            value = ewc.add_grad_(scale)
        assert torch.equal(value, want)
        assert all(map(torch.equal, grads(model), grads(plain)))
        assert seen.calls["fasttax::ewc_add_grad_"] == 1
        assert not any(name.startswith("fasttax::ewc_pen") for name in seen.calls)
        assert seen.largest <= 1  # nothing of the model's size


def test_a_tensor_of_several_is_refused() -> None:
    ewc = held(net())
    with pytest.raises(ValueError, match=r"scale: expected a number, or a tensor of one element"):
        ewc.add_grad_(torch.ones(2))


@pytest.mark.parametrize("times", [0.0, 3.0, 1e30])
def test_the_ops_multiply_on_the_device(times: float) -> None:
    """C++ against the reference, in every storage, and where the product is beyond float32."""
    torch.manual_seed(2)
    theta, start = ([torch.randn(n) for n in SIZES] for _ in range(2))
    for storage in ("fp32", "bf16", "u8log"):
        stored = [encode(torch.rand(n), storage) for n in SIZES]
        fishers, scales = (
            [s.values for s in stored],
            [s.scales for s in stored if s.scales is not None],
        )
        for anchors in (start, [encode_anchor(a, SPLIT) for a in start]):
            rest = anchors, fishers, scales
            found = []
            for f in (torch.ops.fasttax, reference):
                for factor in (torch.tensor(times), torch.tensor(times, dtype=torch.float64)):
                    grad, moved = ([t.clone() for t in x] for x in (theta, theta))
                    value = f.ewc_add_grad_(theta, grad, *rest, 0.5, 2.0, factor)
                    f.ewc_prox_(moved, *rest, 1e20, factor)
                    found.append([value, *grad, *moved])
            for got in found[1:]:
                for g, w in zip(got, found[0], strict=True):
                    torch.testing.assert_close(g, w, rtol=2e-5, atol=1e-5)


def test_a_factor_of_another_shape_or_dtype_is_refused() -> None:
    x = [torch.ones(4)]
    for times in (torch.ones(2), torch.ones((), dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="times: expected one float32 or float64 value"):
            torch.ops.fasttax.ewc_add_grad_(x, [torch.ones(4)], x, x, [], 1.0, 1.0, times)


class Scaled(torch.optim.Optimizer):
    """Has a GradScaler's tensors as fused optimizers do, and leaves the weights alone itself."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(params, options)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        """Nothing."""


@pytest.mark.parametrize("maximize", [False, True])
def test_an_attached_gradient_follows_grad_scale(maximize: bool) -> None:
    model, twin = net(), net()
    ewc, plain = held(model), held(twin)
    optimizer = Scaled(model.parameters(), lr=0.0, maximize=maximize)
    with ewc.attach(optimizer, every=1) as handle:
        optimizer.grad_scale = torch.tensor(64.0)
        with NoSync() as seen:
            optimizer.step()
        assert seen.calls["fasttax::ewc_add_grad_"] == 1
        want = plain.add_grad_(-64.0 if maximize else 64.0)
        assert handle.penalty is not None
        assert torch.equal(handle.penalty, want)
    assert all(map(torch.equal, grads(model), grads(twin)))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("in_a_tensor", [False, True])
def test_an_attached_prox_looks_at_nothing(skipped: bool, in_a_tensor: bool) -> None:
    """A step that the scaler skips leaves the weights' bits; lr may lie in a tensor."""
    model, twin = net(), net()
    ewc, plain = held(model), held(twin)
    lr = torch.tensor(0.3, dtype=torch.float64) if in_a_tensor else 0.3
    optimizer = Scaled(model.parameters(), lr=lr)
    with ewc.attach(optimizer, mode="prox_euclidean", every=2):
        optimizer.step()
        optimizer.found_inf = torch.tensor([float(skipped)])
        with NoSync() as seen:
            optimizer.step()
        assert seen.calls["fasttax::ewc_prox_"] == 1
    if not skipped:
        plain.prox_(0.6)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_negative_rate_in_a_tensor_ruins_the_weights_loudly() -> None:
    model = net()
    optimizer = Scaled(model.parameters(), lr=torch.tensor(-0.1))
    with held(model).attach(optimizer, mode="prox_euclidean"):
        optimizer.step()
    assert all(bool(p.isnan().all()) for p in model.parameters())


def test_lora_factors_follow_a_tensor_too() -> None:
    peft = pytest.importorskip("peft")
    models = []
    for scale in (32.0, torch.tensor(32.0)):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = peft.get_peft_model(net(), config)
        base = {n: torch.rand(s) for n, s in (("0.weight", (30, 40)), ("2.weight", (9, 30)))}
        fasttax.EWC(model, base, strength=2.0).add_grad_(scale)
        models.append(grads(model))
    assert len(models[0]) == 4
    assert all(map(torch.equal, *models))
